"""Euclid products in native code, exact and of 16-bit integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jadder
from jadder import euclid_conv, euclid_conv_general_dilated, euclid_einsum, euclid_matmul
from tests.strategies import normal, seeds

FOUND = jadder.implementations()["cpu"]
pytestmark = pytest.mark.skipif(not FOUND.available, reason=f"cpu: {FOUND.about}")

sizes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(20, 70))
native = pytest.mark.parametrize("implementation", ["cpu", "cpu_int16"])


def float32(*arrays):
    return [np.asarray(a, np.float32) for a in arrays]


def with_gradients(product, x, w, g):
    """The product of x and w, and its gradients for y's gradient g, as arrays of NumPy."""
    y, pullback = jax.vjp(product, x, w)
    return [np.asarray(a) for a in (y, *pullback(g))]


@native
@given(sizes=sizes, seed=seeds, shift=st.floats(-3, 3), scale=st.floats(1e-3, 1e3))
def test_matmul_against_float64(implementation, sizes, seed, shift, scale):
    m, k, n = sizes
    x, w, g = float32(*normal(seed, (m, k), (k, n), (m, n)))
    x, w = float32(scale * (x + shift), scale * w)
    product = functools.partial(euclid_matmul, implementation=implementation)
    y, dx, dw = with_gradients(product, x, w, g)
    d, of_g = x.astype(float)[:, :, None] - w, g.astype(float)[:, None]
    largest, largest_g = max(np.abs(x).max(), np.abs(w).max()), np.abs(g).max()
    rounding = 0.0 if implementation == "cpu" else 1.0
    step = 2 * largest / 4094
    exact = (d**2).sum(1)
    error = rounding * (2 * np.abs(d) * step + step**2).sum(1) + 2e-5 * exact.max()
    assert (np.abs(y + exact) <= error).all()
    of_product = 2 * largest * largest_g
    error = n * of_product * (2 * rounding * (1 / 4095 + 2 / 8191) + 2e-6)
    np.testing.assert_allclose(dx, (-2 * d * of_g).sum(2), atol=error)
    error = m * of_product * (2 * rounding * (1 / 2047 + 1 / 4095) + 2e-6)
    np.testing.assert_allclose(dw, (2 * d * of_g).sum(0), atol=error)


@given(
    seed=seeds,
    channels=st.integers(1, 9),
    features=st.integers(1, 40),
    groups=st.sampled_from([1, 2, 8]),
    strides=st.sampled_from([1, 2]),
    dilations=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    rank=st.sampled_from([1, 2]),
)
def test_convolution_against_xla(seed, channels, features, groups, strides, dilations, rank):
    shapes = (2, 7, 8, channels * groups), (3, 2, channels, features * groups)
    x, w = float32(*normal(seed, *shapes))
    padding = ((1, 2), (0, 3))
    if rank == 1:
        x, w, padding = x[:, 0], w[0], padding[1:]
    options = {
        "strides": strides,
        "padding": padding,
        "input_dilation": dilations[0],
        "kernel_dilation": dilations[1],
        "feature_group_count": groups,
    }
    shape = jax.eval_shape(functools.partial(euclid_conv, **options), x, w).shape
    (g,) = float32(*normal(seed + 1, shape))
    exact, native, rounded = (
        with_gradients(functools.partial(euclid_conv, implementation=name, **options), x, w, g)
        for name in ("xla", "cpu", "cpu_int16")
    )
    positions = g.size / features / groups
    for terms, theirs, ours, near in zip(
        (6 * channels, 6 * features, positions), exact, native, rounded, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * terms)
        np.testing.assert_allclose(near, theirs, rtol=1e-4, atol=0.02 * terms)


@given(seed=seeds, low=st.integers(-4094, 0), depth=st.integers(1, 700))
def test_integers_that_fit_the_grid_have_exact_sums(seed, low, depth):
    random = np.random.default_rng(seed)
    x, w = (random.integers(low, low + 4095, shape) for shape in ((9, depth), (depth, 35)))
    x[0, 0], x[1, 0] = low, low + 4094
    exact = -((x[:, :, None] - w) ** 2).sum(1)
    y = euclid_matmul(*float32(x, w), implementation="cpu_int16")
    np.testing.assert_allclose(y, exact, rtol=1e-6)


@pytest.mark.parametrize("depth", [63, 64, 65, 127, 128, 129, 257, 1100])
@pytest.mark.parametrize("low", [-4094, -2000, 0])
def test_whole_chunks_of_the_largest_differences_do_not_overflow(depth, low):
    ends = np.array([low, low + 4094])
    x, w = np.repeat(ends[:, None], depth, 1), np.repeat(ends[None, ::-1], depth, 0)
    exact = -((x[:, :, None] - w).astype(float) ** 2).sum(1)
    y = euclid_matmul(*float32(x, np.tile(w, 20)), implementation="cpu_int16")
    np.testing.assert_allclose(y[:, :2], exact, rtol=1e-6)


@pytest.mark.parametrize("terms", [62, 63, 64, 65, 128, 130, 500])
def test_whole_chunks_of_the_largest_gradients_do_not_overflow(terms):
    w, g = np.full((40, terms), 4095.0), np.full((3, terms), 8191.0)
    x = np.zeros((3, 40))
    product = functools.partial(euclid_matmul, implementation="cpu_int16")
    _, dx, _ = with_gradients(product, *float32(x, w, g))
    np.testing.assert_allclose(dx, 2 * g @ w.T, rtol=1e-6)


@native
def test_values_that_are_not_finite_are_not_rounded(implementation):
    x, w = float32(*normal(0, (3, 60), (60, 40)))
    x[1, 2], w[5, 3] = np.inf, np.nan
    y = np.asarray(euclid_matmul(x, w, implementation=implementation))
    assert (y[1, :3] == -np.inf).all()
    assert np.isnan(y[:, 3]).all()
    assert np.isfinite(np.delete(y, 3, 1)[[0, 2]]).all()


@native
def test_second_derivatives_are_those_of_the_formula(implementation):
    x, w, v = float32(*normal(0, (3, 4), (4, 5), (3, 4)))

    def loss(x, name):
        return jnp.sin(euclid_matmul(x, w, implementation=name)).sum()

    def product_with_hessian(name):
        return jax.grad(lambda x: (jax.grad(loss)(x, name) * v).sum())(x)

    expected = product_with_hessian("xla")
    np.testing.assert_allclose(product_with_hessian(implementation), expected, rtol=2e-2, atol=1e-1)
    if implementation == "cpu":
        np.testing.assert_allclose(product_with_hessian("cpu"), expected, rtol=1e-4, atol=1e-4)


@native
def test_vmap_and_half_precision(implementation):
    x, w = float32(*normal(0, (4, 3, 30), (4, 30, 40)))
    product = functools.partial(euclid_matmul, implementation=implementation)
    mapped = jax.jit(jax.vmap(product))(x, w)
    each = [product(*pair) for pair in zip(x, w, strict=True)]
    np.testing.assert_allclose(mapped, each, rtol=1e-5)
    short = product(jnp.asarray(x[0], jnp.bfloat16), jnp.asarray(w[0], jnp.bfloat16))
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(short, np.float32), each[0], rtol=3e-2)


@native
def test_a_masked_convolution_is_that_of_xla(implementation):
    x, w = float32(*normal(0, (1, 5, 5, 2), (3, 3, 2, 4)))
    mask = np.zeros((3, 3, 2, 4), bool)
    mask[1] = True
    ours = euclid_conv(x, w, mask=mask, implementation=implementation)
    np.testing.assert_array_equal(ours, euclid_conv(x, w, mask=mask))


def lowered(function, *operands):
    return jax.jit(function).lower(*operands).as_text()


@pytest.mark.parametrize(
    ("implementation", "target"),
    [
        (None, "jadder_euclid"),
        ("cpu", "jadder_euclid"),
        ("cpu_fast", "jadder_euclid"),
        ("cpu_int16", "jadder_int16_euclid"),
    ],
)
def test_who_asks_for_native_code_gets_it(implementation, target):
    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    chosen = {"implementation": implementation}
    assert f"{target}_matmul" in lowered(functools.partial(euclid_matmul, **chosen), x, w)
    einsum = functools.partial(euclid_einsum, "ab,bc->ac", **chosen)
    assert f"{target}_matmul" in lowered(einsum, x, w)
    image, filters = jnp.ones((1, 2, 5)), jnp.ones((4, 2, 3))
    conv = functools.partial(euclid_conv_general_dilated, **chosen)
    assert f"{target}_conv" in lowered(lambda x, w: conv(x, w, (1,), "VALID"), image, filters)


@pytest.mark.parametrize("implementation", ["xla", "reference", "mosaic_gpu"])
def test_others_are_left_to_xla_and_forward_mode_works(implementation):
    x, w = float32(*normal(0, (3, 4), (4, 5)))
    product = functools.partial(euclid_matmul, implementation=implementation)
    assert "jadder" not in lowered(product, x, w)
    _, tangent = jax.jvp(lambda x: product(x, w), (x,), (np.ones_like(x),))
    np.testing.assert_allclose(tangent, -2 * (x[:, :, None] - w).sum(1), rtol=1e-4, atol=1e-4)


def test_products_on_their_way_to_adders_are_native_where_those_are():
    layer = jadder.AdderLinear(30, 40, implementation="cpu_int16", rngs=nnx.Rngs(0))
    jadder.set_l1_share(layer, 0.5)
    x = jnp.ones((2, 30))
    loss = nnx.value_and_grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))
    program = lowered(loss, layer, x)
    for target in ("int16_euclid_matmul", "int16_matmul", "int16_matmul_dx", "int16_matmul_dw"):
        assert f"jadder_{target}" in program


def test_what_native_code_cannot_do_is_said():
    x, w = np.ones((1, 3, 3, 3, 2), np.float32), np.ones((2, 2, 2, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"euclid_conv_general_dilated: implementation='cpu' can"):
        euclid_conv(x, w, implementation="cpu")
    np.testing.assert_array_equal(euclid_conv(x, w, implementation=None), euclid_conv(x, w))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        euclid_matmul(jnp.ones((2, 3)), jnp.ones((3, 2)), implementation="fast")
