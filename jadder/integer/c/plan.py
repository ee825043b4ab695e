"""Where activations lie: borders, channels between pixels, and who shares memory with whom."""

import dataclasses
from collections.abc import Sequence

from jadder.integer.program import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Operation,
    Rescale,
    Reshape,
    Shape,
    SumPool,
)

ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """An activation in memory, row after row, within a border that holds its zero point.

    Attributes:
      shape: (height, width, channels) without the border.
      pitch: bytes from one pixel to the next, at least the channels.
      top, bottom, left, right: rows and columns of the border.
    """

    shape: Shape
    pitch: int
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @property
    def row(self) -> int:
        """Bytes from one row to the next."""
        return (self.left + self.shape[1] + self.right) * self.pitch

    @property
    def size(self) -> int:
        """Bytes in all."""
        return (self.top + self.shape[0] + self.bottom) * self.row

    @property
    def bordered(self) -> bool:
        """Whether there is any border."""
        return any((self.top, self.bottom, self.left, self.right))

    def at(self, y: int, x: int) -> int:
        """Bytes from the beginning to the pixel (y, x)."""
        return (self.top + y) * self.row + (self.left + x) * self.pitch


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of a network.

    Attributes:
      layouts: of every value but the last, which goes to the caller.
      offsets: where in the arena each of them begins; None for an image that is read where the
        caller has it.
      scratch: where each operation's own memory begins.
      size: bytes of the arena.
    """

    layouts: tuple[Layout, ...]
    offsets: tuple[int | None, ...]
    scratch: tuple[int, ...]
    size: int


def make_plan(
    program: IntegerProgram,
    pitches: Sequence[int],
    scratch: Sequence[int],
    *,
    in_place: Sequence[bool],
    copy_image: bool,
    slack: int,
) -> Plan:
    """Lays out all activations.

    Args:
      program: the network.
      pitches: of every value but the last.
      scratch: bytes that each operation needs for itself.
      in_place: for each operation, whether its result may overwrite an activation of the same
        layout that it reads only at the position that it writes.
      copy_image: whether the image must lie in the arena in any case.
      slack: bytes that may be read, and are not used, behind the last byte.
    """
    borders = _borders(program)
    last_use = _last_uses(program)
    values = program.values[:-1]
    owner = list(range(len(values)))
    for index in range(len(program.operations) - 1):
        other = _overwritten(program, index, last_use) if in_place[index] else None
        if other is not None and pitches[other] == pitches[index + 1]:
            owner[index + 1] = owner[other]
    joint = [
        tuple(max(borders[v][side] for v in range(len(values)) if owner[v] == owner[i])
              for side in range(4))
        for i in range(len(values))
    ]  # fmt: skip
    layouts = tuple(
        Layout(value.shape, pitch, *border)
        for value, pitch, border in zip(values, pitches, joint, strict=True)
    )
    dense = not layouts[0].bordered and pitches[0] == values[0].shape[2]
    direct = dense and not copy_image and owner.count(0) == 1
    blocks = []
    for i in sorted(set(owner)):
        if i == 0 and direct:
            continue
        members = [v for v in range(len(values)) if owner[v] == i]
        end = max(last_use[v] for v in members)
        blocks.append((layouts[i].size, members[0] - 1, end, ("value", i)))
    for i, size in enumerate(scratch):
        if size:
            blocks.append((size, i, i, ("scratch", i)))
    placed = _place(blocks)
    size = max((placed[key] + _up(size) for size, _, _, key in blocks), default=0) + slack
    offsets = tuple(placed.get(("value", owner[v])) for v in range(len(values)))
    return Plan(
        layouts, offsets, tuple(placed.get(("scratch", i), 0) for i in range(len(scratch))), size
    )


def _borders(program: IntegerProgram) -> list[tuple[int, int, int, int]]:
    """The largest padding (top, bottom, left, right) with which each value is read."""
    borders = [(0, 0, 0, 0)] * len(program.values)
    for operation in program.operations:
        if isinstance(operation, Convolution | SumPool):
            (top, bottom), (left, right) = operation.padding
            old = borders[operation.input]
            borders[operation.input] = (
                max(old[0], top), max(old[1], bottom), max(old[2], left), max(old[3], right)
            )  # fmt: skip
    return borders


def reads(operation: Operation) -> tuple[int, ...]:
    """The values that an operation reads."""
    if isinstance(operation, MaxPool | Reshape):
        return (operation.input,)
    return (operation.input, *(each.value for each in operation.requantization.residuals))


def _last_uses(program: IntegerProgram) -> list[int]:
    """The last operation that reads each value, or the one that makes it."""
    uses = [index - 1 for index in range(len(program.values))]
    for index, operation in enumerate(program.operations):
        for value in reads(operation):
            uses[value] = max(uses[value], index)
    return uses


def _overwritten(program: IntegerProgram, index: int, last_use: Sequence[int]) -> int | None:
    """A value that operation ``index`` may put its result in place of."""
    operation = program.operations[index]
    if isinstance(operation, MaxPool | Reshape):
        return None
    candidates = [each.value for each in operation.requantization.residuals]
    if isinstance(operation, Rescale):
        candidates.append(operation.input)
    else:
        candidates = [value for value in candidates if value != operation.input]
    ended = [value for value in candidates if last_use[value] == index]
    return ended[0] if ended else None


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _place(blocks: Sequence[tuple[int, int, int, tuple[str, int]]]) -> dict[tuple[str, int], int]:
    """Offsets of blocks (size, first step, last step, key): the largest first, each at the lowest
    place that is free while it lives."""
    placed: list[tuple[int, int, int, int]] = []
    offsets = {}
    for size, start, end, key in sorted(blocks, key=lambda block: (-block[0], block[3])):
        offset = 0
        for low, high, first, last in sorted(placed):
            if first <= end and start <= last:
                if offset + _up(size) <= low:
                    break
                offset = max(offset, high)
        placed.append((offset, offset + _up(size), start, end))
        offsets[key] = offset
    return offsets


def zero_bytes(value: Activation) -> tuple[int, ...]:
    """The zero point of each channel."""
    zero = value.zero_point
    return zero if len(zero) > 1 else zero * value.shape[2]
