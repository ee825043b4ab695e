"""Shifts: short multipliers where they are exact enough, and other shifts that give the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jadder.integer import Activation, Convolution, IntegerProgram, Requantization
from jadder.integer.c.shifts import with_shifts_of_32
from jadder.integer.calibrate import Moments
from jadder.integer.quantize import _requantization
from tests.integer import oracle
from tests.integer.programs import images, programs


@given(programs(), st.integers(0, 99))
def test_shifts_of_32_change_no_result(program: IntegerProgram, seed: int) -> None:
    moved = with_shifts_of_32(program)
    x = images(program, 2, seed)
    expected = oracle.every_value(program, x)
    for a, b in zip(oracle.every_value(moved, x), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_short_multipliers_are_exact_enough(seed: int, residual: bool) -> None:
    """Values fit 32 bits wherever the sums lie, and results are right to a fraction of a level."""
    random = np.random.default_rng(seed)
    features = 5
    reach = (0, int(random.integers(500, 60_000)))
    sums = Moments(1000, random.uniform(0.2, 0.5, features) * reach[1],
                   (random.uniform(0.02, 0.1, features) * reach[1]) ** 2)  # fmt: skip
    scale = -random.uniform(0.5, 1.5, features) * 40 / sums.deviation
    offset = random.uniform(-50, 50, features) - scale * sums.mean
    output = Activation((1, 1, features), (0.9,), (7,))
    added = [(0, 0.6, 3)] if residual else []
    each = _requantization(
        scale, offset, added, output, sums=sums, reach=reach, residual_levels=[255] * residual
    )
    assert each.shift < 32
    q = random.integers(0, 256, (200, features)) * residual
    factors = [one.multiplier << one.left_shift for one in each.residuals]
    for end in (*reach, 0):
        value = end * each.multiplier.astype(np.int64) + each.bias
        assert value.min() + sum(255 * min(0, factor) for factor in factors) >= -(2**31)
        assert value.max() + sum(255 * max(0, factor) for factor in factors) < 2**31
    s = np.rint(sums.mean + np.clip(random.normal(size=(200, features)), -4, 4) * sums.deviation)
    exact = (scale * s + offset + (0.6 * (q - 3) if residual else 0)) / 0.9 + 7
    found = s.astype(np.int64) * each.multiplier + each.bias + q * sum(factors)
    np.testing.assert_allclose(found / 2.0**each.shift - 0.5, exact, atol=1 / 8)


@pytest.mark.parametrize("low", [-(10**6), 0])
def test_long_multipliers_where_short_ones_are_too_coarse(low: int) -> None:
    """Sums that vary by far more than a byte's levels, or reach far out of them."""
    sums = Moments(10, np.array([5e5]), np.array([(4e5 if low == 0 else 1e3) ** 2]))
    scale = np.array([1e-3 if low == 0 else 0.25])
    output = Activation((1, 1, 1), (1.0,))
    reach = (low, 10**8)
    each = _requantization(scale, -scale * 5e5, [], output, sums=sums, reach=reach)
    assert each.shift == 32


def test_biases_are_whole_units_where_that_is_fine() -> None:
    """Of the sums, beside half a result, where nothing else is added."""
    sums = Moments(10, np.array([9000.0]), np.array([800.0**2]))
    output = Activation((1, 1, 1), (1.0,))
    fine, coarse = (
        _requantization(
            np.array([factor]), np.array([-factor * 9000.3]), [], output, sums=sums,
            reach=(0, 30_000),
        )
        for factor in (0.05, 0.5)
    )  # fmt: skip
    assert (fine.bias[0] - (1 << (fine.shift - 1))) % fine.multiplier[0] == 0
    assert (coarse.bias[0] - (1 << (coarse.shift - 1))) % coarse.multiplier[0] != 0


def one_operation(multiplier: int, bias: int, shift: int) -> IntegerProgram:
    each = Requantization(np.array([multiplier], np.int32), np.array([bias]), shift, 0, 255)
    last = Requantization(np.array([1], np.int32), np.array([0]), 0, -(2**31), 2**31 - 1)
    kernel = np.zeros((1, 1, 1, 1), np.uint8)
    shape = (1, 1, 1)
    operations = (
        Convolution(0, "adder", kernel, each, Activation(shape, (1.0,))),
        Convolution(1, "adder", kernel, last, Activation(shape, (1.0,), (0,), "int32")),
    )
    return IntegerProgram(Activation(shape, (1.0,)), operations)


def test_a_program_of_short_multipliers_is_widened() -> None:
    first, last = with_shifts_of_32(one_operation(900, -5000, 12)).operations
    assert first.requantization.shift == 32
    assert first.requantization.multiplier.tolist() == [900 << 20]
    assert first.requantization.bias.tolist() == [-5000 << 20]
    assert last.requantization.shift == 0  # its multiplier would not fit


@pytest.mark.parametrize(
    ("multiplier", "bias", "shift"),
    [(1, 2**40 - 1, 10), (1, -(2**40), 10), (2**11, 0, 12), (1, 0, 40)],
    ids=["bias", "negative bias", "multiplier", "longer already"],
)
def test_what_would_not_fit_stays(multiplier: int, bias: int, shift: int) -> None:
    program = one_operation(multiplier, bias, shift)
    assert with_shifts_of_32(program).operations[0].requantization.shift == shift
