"""Gradient rules: ψ is what it says, the derivative of ρ, and odd."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jadder import ADDER_VIT, ADDERNET, SIGN, GradientRule
from jadder.rules import Clip
from tests import literal
from tests.strategies import clips

differences = st.floats(-10, 10).filter(lambda d: abs(d) > 1e-3)


@given(clips, differences)
def test_psi_is_the_derivative_of_the_potential(clip, d):
    with jax.enable_x64(True):
        psi, step = float(Clip(*clip)(np.float64(d))), 1e-6
        slope = (literal.potential(clip, d + step) - literal.potential(clip, d - step)) / (2 * step)
    assert psi == pytest.approx(slope, rel=1e-6, abs=1e-5)


@given(clips, differences)
def test_potential_is_the_plain_one(clip, d):
    with jax.enable_x64(True):
        rho = float(Clip(*clip).potential(np.float64(d)))
    assert rho == pytest.approx(literal.potential(clip, d), rel=1e-12)


@given(clips, differences)
def test_psi_is_odd_and_bounded(clip, d):
    psi = Clip(*clip)
    assert float(psi(-d)) == -float(psi(d))
    assert abs(float(psi(d))) <= np.float32(clip[1])


@pytest.mark.parametrize("rule", [ADDERNET, ADDER_VIT, SIGN])
def test_nan_stays_nan(rule):
    assert math.isnan(rule.x(math.nan))
    assert math.isnan(rule.kernel(math.nan))


def test_published_rules():
    assert GradientRule(x=(1, 1), kernel=(1, math.inf)) == ADDERNET == GradientRule()
    assert GradientRule(x=(4, 1), kernel=(1, math.inf)) == ADDER_VIT
    assert GradientRule(x=(math.inf, 1), kernel=(math.inf, 1)) == SIGN
    assert [float(SIGN.x(d)) for d in (-0.1, 0.0, 7.0)] == [-1, 0, 1]


@pytest.mark.parametrize(
    "pair", [(0, 1), (-1, 1), (1, 0), (1, -2), (math.nan, 1), (math.inf, math.inf), (1,), "ab", 3]
)
def test_bad_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="GradientRule kernel"):
        GradientRule(kernel=pair)
