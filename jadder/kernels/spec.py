"""The convolution that every kernel computes, in one layout, and the arithmetic of its windows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

MANY_PHASES = 1024


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """What a convolution of x (batch, *spatial, C) with w (*window, C // groups, F) does.

    Each field but the last has one entry for each spatial dimension, with the meaning that
    ``lax.conv_general_dilated`` gives it; negative padding crops.
    """

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_group_count: int = 1

    def out_spatial(self, spatial: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
        """The output's spatial shape; a dimension that the window does not fit has length 0."""
        shape = []
        for d, (size, taps) in enumerate(zip(spatial, window, strict=True)):
            dilated = 0 if size == 0 else (size - 1) * self.lhs_dilation[d] + 1
            room = dilated + sum(self.padding[d]) - ((taps - 1) * self.rhs_dilation[d] + 1)
            shape.append(0 if taps == 0 else max(0, room // self.window_strides[d] + 1))
        return tuple(shape)


class Phase(NamedTuple):
    """The targets ``residue + j · period`` of one dimension, which all meet the same taps.

    Target number j meets source ``start + j · step`` through tap ``tap``, for each (tap, start).
    """

    residue: int
    size: int
    taps: tuple[tuple[int, int], ...]


class Phases(NamedTuple):
    """One spatial dimension of a strided or dilated window, split into residue classes.

    Attributes:
      targets: of all classes.
      phases: each class, or of more than ``MANY_PHASES`` those that meet a tap.
    """

    period: int
    step: int
    targets: int
    phases: tuple[Phase, ...]

    @property
    def are_complete(self) -> bool:
        """Whether every target is in one of ``phases``."""
        return len(self.phases) == min(self.period, self.targets)


def split_phases(targets: int, multiply: int, divide: int, offsets: Sequence[int]) -> Phases:
    """Splits targets i, that meet source (i · multiply + offset[tap]) / divide where whole.

    A forward convolution reads input (o · stride + tap · rhs_dilation - low) / lhs_dilation for
    output o, and its transpose reads output (i · lhs_dilation - tap · rhs_dilation + low) / stride
    for input i. Within a residue class the quotient advances by a constant step, so that a strided
    slice serves all of its targets and no product with an inserted zero is ever computed.
    """
    common = math.gcd(multiply, divide)
    period, step = divide // common, multiply // common
    inverse = pow(step, -1, period)
    taps: dict[int, list[tuple[int, int]]] = {}
    for tap, offset in enumerate(offsets):
        residue = -(offset // common) * inverse % period
        if offset % common == 0 and residue < targets:
            start = (residue * multiply + offset) // divide
            taps.setdefault(residue, []).append((tap, start))
    classes = min(period, targets)
    phases = (
        Phase(residue, -(-(targets - residue) // period), tuple(taps.get(residue, ())))
        for residue in (range(classes) if classes <= MANY_PHASES else sorted(taps))
    )
    return Phases(period, step, targets, tuple(phases))


def without_distant_taps(phases: Phases, sources: int) -> Phases:
    """The same without taps through which no target of a class meets a source."""

    def meets(phase: Phase, start: int) -> bool:
        return start < sources and start + (phase.size - 1) * phases.step >= 0

    return phases._replace(
        phases=tuple(
            phase._replace(taps=tuple(each for each in phase.taps if meets(phase, each[1])))
            for phase in phases.phases
        )
    )


def forward_phases(
    spec: ConvSpec, spatial: Sequence[int], window: Sequence[int]
) -> tuple[Phases, ...]:
    """For each dimension, which input each output meets through which tap."""
    out = spec.out_spatial(spatial, window)
    return tuple(
        split_phases(
            out[d],
            spec.window_strides[d],
            spec.lhs_dilation[d],
            [tap * spec.rhs_dilation[d] - spec.padding[d][0] for tap in range(window[d])],
        )
        for d in range(len(window))
    )


def transpose_phases(
    spec: ConvSpec, spatial: Sequence[int], window: Sequence[int]
) -> tuple[Phases, ...]:
    """For each dimension, which output each input meets through which tap."""
    return tuple(
        split_phases(
            spatial[d],
            spec.lhs_dilation[d],
            spec.window_strides[d],
            [spec.padding[d][0] - tap * spec.rhs_dilation[d] for tap in range(window[d])],
        )
        for d in range(len(window))
    )


def reach(phases: Phases, sources: int) -> tuple[int, int]:
    """Zeros to put (before, after) ``sources`` values so that each slice of a phase lies inside."""
    low, high = 0, sources
    for phase in phases.phases:
        for _, start in phase.taps:
            low = min(low, start)
            high = max(high, start + (phase.size - 1) * phases.step + 1)
    return -low, high - sources
