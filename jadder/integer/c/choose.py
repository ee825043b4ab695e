"""Which code computes an operation, as far as that does not depend on where activations lie."""

import dataclasses
from typing import Literal

from jadder.integer.c import thumb
from jadder.integer.c.targets import Target
from jadder.integer.program import (
    INT32,
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Operation,
    Requantization,
    Reshape,
    sum_bounds,
)

Way = Literal["portable", "vector", "thumb"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How an operation is computed.

    Attributes:
      way: by portable loops, by C with intrinsics or by assembly.
      epilogue: of assembly; None where C makes the results of its sums.
      why: what keeps an operation of a network for Cortex-M from assembly, for the README.
    """

    way: Way
    epilogue: thumb.Epilogue | None = None
    why: str = ""

    @property
    def whole(self) -> bool:
        """Whether assembly does all of it."""
        return self.epilogue is not None


def up4(count: int) -> int:
    """The next multiple of four."""
    return -(-count // 4) * 4


def choose(program: IntegerProgram, index: int, target: Target) -> Choice:
    """The fastest code that ``target`` has for operation ``index``."""
    operation = program.operations[index]
    if target.kernels == "portable" or not isinstance(operation, Convolution):
        return Choice("portable")
    if operation.feature_group_count > 1:
        return Choice("portable", why="groups")
    if target.kernels == "vector":
        return Choice("vector")
    channels, features = operation.kernel.shape[2:]
    element = 1 if operation.product == "adder" else 2
    step = operation.strides[1] * up4(channels) * element
    if not thumb.fits(step) or up4(features) > 1020:
        return Choice("portable", why="very many channels")
    epilogue = _epilogue(program, operation)
    return Choice("thumb", epilogue if isinstance(epilogue, thumb.Epilogue) else None,
                  why="" if isinstance(epilogue, thumb.Epilogue) else epilogue)  # fmt: skip


def _epilogue(program: IntegerProgram, operation: Convolution) -> thumb.Epilogue | str:
    """What follows the sums in assembly, or why that is left to C."""
    each, output = operation.requantization, operation.output
    if output.dtype == "int32":
        return "results in int32"
    if operation.center:
        return "centred sums"
    if len(each.residuals) > 1:
        return "several residuals"
    if output.shape[2] % 4 and not each.low <= output.zero_point[0] <= each.high:
        return "a zero point out of bounds"
    if output.shape[2] % 4 and each.residuals:
        return "a residual of channels that are no multiple of four"
    low, high = value_bounds(operation, program.values[operation.input], program)
    if each.shift < 32 and (low < INT32.min or high > INT32.max):
        return "values beyond 32 bits"
    residual: Literal["unsigned", "signed"] | None = None
    left_shift = 0
    if each.residuals:
        factor = each.residuals[0].multiplier << each.residuals[0].left_shift
        residual = "unsigned" if 0 <= factor < 1 << 32 else "signed"
        if residual == "signed" and not INT32.min <= factor <= INT32.max:
            left_shift = each.residuals[0].left_shift
    starts = offset_starts(operation, program.values[operation.input])
    narrow = low >= -(1 << 15) and high < 1 << 15
    return thumb.Epilogue(
        starts is not None, starts is not None and narrow, each.shift, each.low, each.high,
        residual, left_shift,
    )  # fmt: skip


def value_bounds(
    operation: Convolution, source: Activation, program: IntegerProgram
) -> tuple[int, int]:
    """The least and the largest result before its bounds."""
    each = operation.requantization
    sums = sum_bounds(operation, source)
    low, high = 0, 0
    for residual in each.residuals:
        factor = residual.multiplier << residual.left_shift
        most = factor * program.values[residual.value].maximum
        low, high = low + min(0, most), high + max(0, most)
    ends = [
        total * multiplier + bias
        for multiplier, bias in zip(each.multiplier.tolist(), each.bias.tolist(), strict=True)
        for total in sums
    ]
    return (low + min(ends)) >> each.shift, (high + max(ends)) >> each.shift


def offset_starts(operation: Convolution, source: Activation) -> list[int] | None:
    """The biases in units of the sums, where they are whole beside half a unit of the result.

    Then q = (sum · m + bias) >> 32 = ((sum + offset) · m + 2^31) >> 32, one instruction.
    """
    each = operation.requantization
    if each.shift != 32 or each.residuals or operation.center:
        return None
    if operation.output.shape[2] % 4 and each.low != operation.output.zero_point[0]:
        return None  # what fills the last four comes out as the low bound
    low, high = sum_bounds(operation, source)
    offsets = []
    for multiplier, bias in zip(each.multiplier.tolist(), each.bias.tolist(), strict=True):
        rest = bias - (1 << 31)
        if multiplier == 0 or rest % multiplier:
            return None
        offset = rest // multiplier
        if not (INT32.min <= low + min(offset, 0) and high + max(offset, 0) <= INT32.max):
            return None
        offsets.append(offset)
    return offsets


def requantization_of(operation: Operation) -> Requantization | None:
    """The requantization of an operation that has one."""
    return None if isinstance(operation, MaxPool | Reshape) else operation.requantization


def scratch_bytes(operation: Operation, choice: Choice, output: Activation) -> int:
    """Bytes for the sums that C takes on: of one position, or of a row from assembly."""
    if isinstance(operation, MaxPool | Reshape) or choice.whole:
        return 0
    positions = output.shape[1] if choice.way == "thumb" else 1
    return 4 * positions * up4(output.shape[2])


def pitches(program: IntegerProgram, choices: list[Choice]) -> list[int]:
    """Bytes from one pixel to the next, of every value but the last."""
    found = [value.shape[2] for value in program.values[:-1]]
    for index, (operation, choice) in enumerate(zip(program.operations, choices, strict=True)):
        if choice.way != "thumb":
            continue
        assert isinstance(operation, Convolution)
        if operation.product == "adder":
            found[operation.input] = up4(found[operation.input])
        if choice.whole:
            found[index + 1] = up4(found[index + 1])
    return found


def needs_fill(
    program: IntegerProgram, choices: list[Choice], pitches: list[int], value: int
) -> bool:
    """Whether a value has bytes between its pixels that nobody writes."""
    channels = program.values[value].shape[2]
    return pitches[value] != channels and (value == 0 or not choices[value - 1].whole)
