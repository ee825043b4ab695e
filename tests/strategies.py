"""Hypothesis strategies for products: shapes, conv arguments, gradient rules."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

import jadder
from jadder import ADDER_VIT, ADDERNET, SIGN, GradientRule

clips = st.one_of(
    st.tuples(st.floats(0.25, 8), st.floats(0.25, 4)),
    st.tuples(st.floats(0.25, 8), st.just(math.inf)),
    st.tuples(st.just(math.inf), st.floats(0.25, 4)),
)
rules = st.one_of(
    st.sampled_from([ADDERNET, ADDER_VIT, SIGN]), st.builds(GradientRule, x=clips, kernel=clips)
)
seeds = st.integers(0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """The shapes and arguments of one convolution whose output is not empty."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int

    @property
    def arguments(self):
        """In the order of `jadder.adder_conv`."""
        return (self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, self.groups)

    @property
    def out(self):
        """The output's shape."""
        sizes = [
            ((n - 1) * d + 1 + low + high - (k - 1) * r - 1) // s + 1
            for n, d, (low, high), k, r, s in zip(
                self.x[1:-1],
                self.lhs_dilation,
                self.padding,
                self.w[:-2],
                self.rhs_dilation,
                self.strides,
                strict=True,
            )
        ]
        return (self.x[0], *sizes, self.w[-1])


@st.composite
def conv_cases(draw, max_size=5, max_channels=3):
    """Convolutions of one to three dimensions, small enough for loops in Python."""
    rank = draw(st.integers(1, 3))
    size, most = (max_size, 3) if rank < 3 else (3, 2)

    def for_each(strategy):
        return tuple(draw(strategy) for _ in range(rank))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = draw(st.integers(1, max_channels))
    features = draw(st.integers(1, max_channels))
    case = ConvCase(
        x=(draw(st.integers(1, 2)), *for_each(st.integers(1, size)), groups * channels),
        w=(*for_each(st.integers(1, 3)), channels, groups * features),
        strides=for_each(st.integers(1, most)),
        padding=for_each(st.tuples(st.integers(-1, 2), st.integers(-1, 2))),
        lhs_dilation=for_each(st.integers(1, most)),
        rhs_dilation=for_each(st.integers(1, 2)),
        groups=groups,
    )
    crops_all = any(
        (n - 1) * d + 1 + min(low, 0) + min(high, 0) < 1
        for n, d, (low, high) in zip(case.x[1:-1], case.lhs_dilation, case.padding, strict=True)
    )
    assume(not crops_all and min(case.out) > 0 and math.prod(case.out) < 400)
    return case


def normal(seed, *shapes):
    """Arrays of N(0, 1) in float64."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape) for shape in shapes)


def implementations(*names):
    """Parameters for pytest; those that are not available here are skipped, with the reason."""
    found = jadder.implementations()
    return tuple(
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not found[name].available, reason=f"{name}: {found[name].about}"
            ),
        )
        for name in names
    )
