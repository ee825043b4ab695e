"""An integer program on a batch of images."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from jadder.integer import xla
from jadder.integer.program import IntegerProgram


def run(program: IntegerProgram, images: ArrayLike) -> Array:
    """The int32 outputs (batch, *output.shape) of uint8 images (batch, *input.shape)."""
    return _compiled(program)(images)


_PROGRAMS: dict[int, Any] = {}


def _compiled(program: IntegerProgram) -> Callable[[Any], Array]:
    key = id(program)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = jax.jit(functools.partial(xla.run, program))
        weakref.finalize(program, _PROGRAMS.pop, key)
    function: Callable[[Any], Array] = _PROGRAMS[key]
    return function
