"""Requantizations as processors like them whose products have a high half of 32 bits."""

import dataclasses

import numpy as np

from jadder.integer.program import (
    INT32,
    IntegerProgram,
    MaxPool,
    Operation,
    Requantization,
    Reshape,
    Residual,
)

_MOST_LEFT_SHIFT = 22


def with_shifts_of_32(program: IntegerProgram) -> IntegerProgram:
    """The program with every shift that can be 32 made so, which changes no result.

    (S · m + b) >> s = (S · m · 2^d + b · 2^d) >> (s + d): then a processor that multiplies into two
    registers has the result in one of them.
    """
    operations = tuple(_with_shift_of_32(operation) for operation in program.operations)
    return dataclasses.replace(program, operations=operations)


def _with_shift_of_32(operation: Operation) -> Operation:
    if isinstance(operation, MaxPool | Reshape):
        return operation
    each = operation.requantization
    by = 32 - each.shift
    multipliers = [multiplier << by for multiplier in each.multiplier.tolist()] if by > 0 else []
    residuals = [_times(residual, by) for residual in each.residuals] if by > 0 else []
    if (
        not multipliers
        or any(not INT32.min <= multiplier <= INT32.max for multiplier in multipliers)
        or any(bias.bit_length() + by > 62 for bias in each.bias.tolist())
        or None in residuals
    ):
        return operation
    moved = Requantization(
        np.array(multipliers, np.int32),
        np.array([bias << by for bias in each.bias.tolist()], np.int64),
        32, each.low, each.high,
        tuple(residual for residual in residuals if residual is not None),
    )  # fmt: skip
    return dataclasses.replace(operation, requantization=moved)


def _times(residual: Residual, by: int) -> Residual | None:
    """The residual · 2^by, if it has such a form."""
    multiplier, left_shift = residual.multiplier, residual.left_shift + by
    while left_shift > 0 and INT32.min <= 2 * multiplier <= INT32.max:
        multiplier, left_shift = 2 * multiplier, left_shift - 1
    if left_shift > _MOST_LEFT_SHIFT:
        return None
    return Residual(residual.value, multiplier, left_shift)
