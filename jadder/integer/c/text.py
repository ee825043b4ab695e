"""Numbers as C."""

from collections.abc import Iterable
from typing import Any

import numpy as np

_WIDTH = 100


def array(kind: str, name: str, values: Any) -> str:
    """``static const kind name[] = {...};`` in lines of at most 100 characters."""
    flat = np.asarray(values).reshape(-1)
    return f"static const {kind} {name}[{flat.size}] = {{\n{_lines(_literals(kind, flat))}}};\n"


def _literals(kind: str, values: Any) -> list[str]:
    numbers = values.tolist()
    if kind == "uint32_t":
        return [f"0x{number:08x}" for number in numbers]
    if kind == "int64_t":
        return [int64(number) for number in numbers]
    if kind == "int32_t":
        return [int32(number) for number in numbers]
    return [str(number) for number in numbers]


def int32(value: int) -> str:
    """A literal; the least one has none of its own in C."""
    return "(-2147483647 - 1)" if value == -(1 << 31) else str(value)


def int64(value: int) -> str:
    """A literal of 64 bits."""
    return f"INT64_C({value})"


def _lines(literals: Iterable[str]) -> str:
    lines, line = [], "   "
    for literal in literals:
        if len(line) + len(literal) + 2 > _WIDTH:
            lines.append(line)
            line = "   "
        line += f" {literal},"
    return "\n".join([*lines, line]) + "\n"
