"""The products of 16-bit integers: what they lose, and what they must not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jadder
from jadder import GradientRule, adder_conv, adder_matmul
from tests.strategies import normal, seeds

FOUND = jadder.implementations()["cpu_int16"]
pytestmark = pytest.mark.skipif(not FOUND.available, reason=f"cpu_int16: {FOUND.about}")

matmul = functools.partial(adder_matmul, implementation="cpu_int16")
conv = functools.partial(adder_conv, implementation="cpu_int16")
sizes = st.tuples(st.integers(1, 40), st.integers(1, 150), st.integers(20, 70))
scales = st.floats(1e-3, 1e3)


def float32(*arrays):
    return [np.asarray(a, np.float32) for a in arrays]


def differences(x, w):
    """x - w of a matmul, (m, k, n), in float64."""
    return x.astype(float)[:, :, None] - w.astype(float)[None]


@given(sizes=sizes, seed=seeds, shift=st.floats(-3, 3), scale=scales)
def test_forward_errors_are_within_half_a_step_for_each_operand(sizes, seed, shift, scale):
    m, k, n = sizes
    x, w = float32(*normal(seed, (m, k), (k, n)))
    x, w = float32(scale * (x + shift), scale * w)
    step = (max(x.max(), 0) - min(x.min(), 0)) / 2046
    exact = -np.abs(differences(x, w)).sum(1)
    error = np.abs(matmul(x, w) - exact)
    assert (error <= k * step * 1.001 + 1e-6 * np.abs(exact)).all()
    assert error.std() <= 0.6 * np.sqrt(k) * step + 1e-6 * np.abs(exact).max()


@given(seed=seeds, low=st.integers(-2046, 0), depth=st.integers(1, 700))
def test_integers_that_fit_the_grid_have_exact_sums(seed, low, depth):
    """Also those of kernels that reach beyond what x does."""
    random = np.random.default_rng(seed)
    x = random.integers(low, low + 2047, (9, depth))
    x[0, 0], x[1, 0] = low, low + 2046
    w = random.integers(-4000, 4000, (depth, 35))
    exact = -np.abs(x[:, :, None] - w).sum(1)
    np.testing.assert_array_equal(matmul(*float32(x, w)), exact)


@pytest.mark.parametrize("low", [-2046, -1000, 0])
@pytest.mark.parametrize("depth", [63, 64, 65, 125, 126, 127, 128, 129, 130, 257, 1100])
def test_whole_chunks_of_the_largest_and_the_least_do_not_overflow(depth, low):
    """Integers at both ends of the grid, in each of the halves of a pair and everywhere."""
    high = low + 2046
    even = np.arange(depth) % 2 == 0
    x = np.stack([np.full(depth, low), np.full(depth, high), np.where(even, low, high),
                  np.where(even, high, low)])  # fmt: skip
    w = np.concatenate([x, x[:, ::-1]]).T
    exact = -np.abs(x[:, :, None] - w).sum(1)
    np.testing.assert_array_equal(matmul(*float32(x, np.tile(w, 5)))[:, :8], exact)


@given(sizes=sizes, seed=seeds, scale=scales, slope=st.sampled_from([1.0, 4.0]))
def test_errors_of_dx_are_those_of_rounding(sizes, seed, scale, slope):
    m, k, n = sizes
    x, w, g = float32(*normal(seed, (m, k), (k, n), (m, n)))
    g = np.float32(scale) * g
    rule = GradientRule((slope, 1.0), (slope, 1.0))
    _, pullback = jax.vjp(functools.partial(matmul, rule=rule), x, w)
    psi = np.clip(-slope * differences(x, w), -1, 1)
    exact = (psi * g.astype(float)[:, None]).sum(2)
    error = np.abs(np.asarray(pullback(g)[0]) - exact)
    step = slope * (np.abs(x).max() + 1 / slope) / 3900
    largest = np.abs(g).max()
    assert (error <= 1.01 * n * largest * (step + 1 / 8191) + 1e-5 * largest).all()
    assert error.std() <= np.sqrt(n) * largest * (step + 1 / 8191) + 1e-5 * largest


@given(
    seed=seeds,
    channels=st.integers(1, 5),
    features=st.integers(1, 20),
    groups=st.sampled_from([1, 2]),
    strides=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
)
def test_convolutions_agree_with_the_exact_ones(
    seed, channels, features, groups, strides, dilation
):
    shapes = (2, 7, 8, channels * groups), (3, 2, channels, features * groups)
    x, w = float32(*normal(seed, *shapes))
    options = {
        "strides": strides,
        "padding": ((1, 2), (0, 3)),
        "kernel_dilation": dilation,
        "feature_group_count": groups,
    }
    y, pullback = jax.vjp(functools.partial(conv, **options), x, w)
    exact, exact_pullback = jax.vjp(
        functools.partial(adder_conv, implementation="cpu", **options), x, w
    )
    terms = 6 * channels
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=terms * 2 * np.abs(x).max() / 2046)
    (g,) = float32(*normal(seed + 1, y.shape))
    (dx, dw), (exact_dx, exact_dw) = pullback(g), exact_pullback(g)
    step = (np.abs(x).max() + 1) / 3900 + 1 / 8191
    np.testing.assert_allclose(dx, exact_dx, atol=6 * features * np.abs(g).max() * step)
    # Of x and of g, each of all positions.
    rounding = np.abs(x).max() * np.abs(g).max() * (0.5 / 2047 + 0.5 / 4095)
    positions = g.size / g.shape[-1]
    np.testing.assert_allclose(dw, exact_dw, rtol=1e-5, atol=positions * rounding + 1e-4)


@pytest.mark.parametrize(("shape", "window"), [((8, 16, 16, 16), 3), ((6, 7, 7, 48), 3)])
def test_typical_errors_are_a_part_in_some_hundreds(shape, window):
    """At the shapes of networks, relative to the standard deviation of what is computed."""
    x, w = float32(*normal(0, shape, (window, window, shape[-1], 32)))
    x = np.maximum(x, 0)
    found = []
    for name in ("cpu_int16", "cpu"):
        product = functools.partial(adder_conv, implementation=name)
        y, pullback = jax.vjp(product, x, w)
        (g,) = float32(*normal(1, y.shape))
        found.append([np.asarray(a) for a in (y, *pullback(g))])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).std() < 0.005 * exact.std()


@given(seed=seeds, counts=st.tuples(*[st.integers(0, 2)] * 3))
def test_nan_and_infinities_are_where_exact_products_have_them(seed, counts):
    shapes = (2, 5, 6, 3), (3, 2, 3, 6), (2, 3, 8, 6)
    random = np.random.default_rng(seed)
    operands = float32(*normal(seed, *shapes))
    for array, count in zip(operands, counts, strict=True):
        for _ in range(count):
            array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -np.inf])
    x, w, g = operands
    options = {"strides": (2, 1), "padding": ((1, 1), (1, 2))}
    found = []
    for name in ("cpu_int16", "cpu"):
        product = functools.partial(adder_conv, implementation=name, **options)
        y, pullback = jax.vjp(product, x, w)
        found.append((y, *pullback(g)))
    for ours, exact in zip(*found, strict=True):
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(exact))
        infinite = np.isinf(exact)
        np.testing.assert_array_equal(np.where(infinite, ours, 0), np.where(infinite, exact, 0))
        assert np.isfinite(np.asarray(ours)[np.isfinite(exact)]).all()


@pytest.mark.parametrize("largest", [0.0, 1e-38, 1e-30, 1e30, 3e38])
def test_values_without_a_grid_are_summed_as_floats(largest):
    x, w = float32(*normal(0, (6, 8), (8, 5)))
    x = np.float32(largest) * np.clip(x, -1, 1)
    y, pullback = jax.vjp(matmul, x, w)
    exact, exact_pullback = jax.vjp(functools.partial(adder_matmul, implementation="cpu"), x, w)
    tolerance = 8 * 2 * largest / 2046 if np.isfinite(8 * largest) else 0
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=tolerance)
    for ours, other in zip(pullback(y * 0 + 1), exact_pullback(y * 0 + 1), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=5e-3)


def test_bfloat16_operands_are_rounded_to_the_grid_too():
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in normal(0, (30, 64), (64, 30)))
    y = matmul(x, w, preferred_element_type=jnp.float32)
    exact = adder_matmul(x, w, preferred_element_type=jnp.float32, implementation="cpu")
    error = np.abs(np.asarray(y) - np.asarray(exact))
    assert 0 < error.max() <= 64 * 2 * float(jnp.abs(x).max()) / 2046


def test_mapped_products_agree_with_one_at_a_time():
    x, w = float32(*normal(0, (3, 6, 11), (11, 7)))
    mapped = jax.vmap(matmul, (0, None))(x, w)
    each = np.stack([matmul(a, w) for a in x])
    np.testing.assert_allclose(mapped, each, atol=11 * 2 * np.abs(x).max() / 2046)
