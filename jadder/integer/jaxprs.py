"""What reading and evaluating jaxprs have in common."""

import os
from typing import Any

import flax
import jax
from jax.extend import core

_LIBRARIES = tuple(f"{module.__path__[0]}{os.sep}" for module in (jax, flax))


def bind(equation: Any, operands: list[Any]) -> list[Any]:
    """What an equation computes that is no call of a function (see `call_of`)."""
    results = equation.primitive.bind(*operands, **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def call_of(equation: Any) -> Any:
    """The jaxpr that a call of a function evaluates, or None for what is no such call."""
    if equation.primitive.name in ("while", "scan", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if isinstance(inner, core.ClosedJaxpr):
            return inner
        if isinstance(inner, core.Jaxpr):
            return core.ClosedJaxpr(inner, ())
    return None


def layer_of(equation: Any) -> str:
    """Where in the user's program an equation comes from: the innermost line outside of JAX."""
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        if not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.function_name} ({frame.file_name}:{frame.line_num})"
    return "an unknown place"
