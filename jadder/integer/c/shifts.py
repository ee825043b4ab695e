"""Requantizations as processors like them whose products have a high half of 32 bits."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jadder.integer.program import (
    INT32,
    LARGEST_VALUE,
    MOST_LEFT_SHIFT,
    Activation,
    IntegerProgram,
    MaxPool,
    Operation,
    Requantization,
    Reshape,
    Residual,
    largest_value,
    sum_bounds,
)


def with_shifts_of_32(program: IntegerProgram) -> IntegerProgram:
    """The program with every shift that can be 32 made so, which changes no result.

    (S · m + b) >> s = (S · m · 2^d + b · 2^d) >> (s + d): then a processor that multiplies into two
    registers has the result in one of them.
    """
    operations = tuple(
        _with_shift_of_32(operation, program.values) for operation in program.operations
    )
    return dataclasses.replace(program, operations=operations)


def _with_shift_of_32(operation: Operation, values: Sequence[Activation]) -> Operation:
    if isinstance(operation, MaxPool | Reshape):
        return operation
    each = operation.requantization
    by = 32 - each.shift
    if by <= 0:
        return operation
    largest = largest_value(each, sum_bounds(operation, values[operation.input]), values) << by
    multipliers = [multiplier << by for multiplier in each.multiplier.tolist()]
    fit = all(INT32.min <= multiplier <= INT32.max for multiplier in multipliers)
    residuals = [_times(residual, by) for residual in each.residuals]
    if largest >= LARGEST_VALUE or not fit or None in residuals:
        return operation
    moved = Requantization(
        np.array(multipliers, np.int32), each.bias << by, 32, each.low, each.high,
        tuple(residual for residual in residuals if residual is not None),
    )  # fmt: skip
    return dataclasses.replace(operation, requantization=moved)


def _times(residual: Residual, by: int) -> Residual | None:
    """The residual · 2^by, if it has such a form."""
    multiplier, left_shift = residual.multiplier, residual.left_shift + by
    while left_shift > 0 and abs(2 * multiplier) <= INT32.max:
        multiplier, left_shift = 2 * multiplier, left_shift - 1
    return (
        Residual(residual.value, multiplier, left_shift) if left_shift <= MOST_LEFT_SHIFT else None
    )
