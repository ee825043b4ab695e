"""jadder.annealing: mixed distances against formulas in NumPy, in every kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jadder
from jadder.annealing import MixedProduct
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral, AdderEinsum

CONTRACT = (((1,), (0,)), ((), ()))
shares = st.floats(0, 1)


@given(shares, st.integers(0, 2**32 - 1))
def test_product_and_its_gradients(l1_share, seed):
    rng = np.random.default_rng(seed)
    x, w, g = (rng.normal(size=shape) for shape in ((3, 5), (5, 2), (3, 2)))
    product = MixedProduct(AdderDotGeneral(jadder.ADDER_VIT), l1_share)
    with jax.enable_x64(True):
        y, backward = jax.vjp(lambda x, w: product(x, w, CONTRACT), x, w)
        gradients = backward(jnp.asarray(g))
    d = x[:, :, None] - w
    expected = -(l1_share * np.abs(d) + (1 - l1_share) * d**2 / 2).sum(1)
    dx = (g[:, None] * (l1_share * np.clip(-4 * d, -1, 1) + (1 - l1_share) * -d)).sum(2)
    dw = np.einsum("mn,mkn->kn", g, d)  # full precision, whatever the share
    for ours, theirs in zip((y, *gradients), (expected, dx, dw), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_convolution():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 5, 5, 3)), rng.normal(size=(3, 3, 3, 4))
    product = MixedProduct(AdderConvGeneralDilated(), 0.25)
    numbers = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    y = product(x, w, (1, 1), "VALID", dimension_numbers=numbers)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    d = windows.transpose(0, 1, 2, 4, 5, 3)[..., None] - w
    expected = -(0.25 * np.abs(d) + 0.375 * d**2).sum((3, 4, 5))
    np.testing.assert_allclose(y, expected, rtol=2e-5)


def test_one_gradient_of_the_kernel_is_enough():
    x, w = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))

    def work(product):
        numbers = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        total = jax.grad(lambda w: product(x, w, (1, 1), "VALID", dimension_numbers=numbers).sum())
        return jax.jit(total).lower(w).compile().as_text().count(" convolution(")

    adder = AdderConvGeneralDilated(implementation="xla")
    bounded = AdderConvGeneralDilated(jadder.GradientRule((1, 1), (1, 1)), "xla")
    assert work(MixedProduct(adder, 0.5)) == work(adder)
    assert work(MixedProduct(bounded, 0.5)) > work(bounded)


def test_einsum():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3)), rng.normal(size=(3, 4))
    y = MixedProduct(AdderEinsum(), 0.5)("ab,bc->ac", x, w)
    d = x[:, :, None] - w
    np.testing.assert_allclose(y, -(0.5 * np.abs(d) + d**2 / 4).sum(1), rtol=2e-5)


LAYERS = {
    "linear": (lambda rngs: jadder.AdderLinear(3, 4, rngs=rngs), (2, 3)),
    "scaled": (lambda rngs: jadder.ScaledAdderLinear(3, 4, rngs=rngs), (2, 3)),
    "conv": (lambda rngs: jadder.AdderConv(3, 4, (3, 3), rngs=rngs), (2, 5, 5, 3)),
    "transpose": (lambda rngs: jadder.AdderConvTranspose(3, 4, (2, 2), rngs=rngs), (2, 5, 5, 3)),
    "attention": (
        lambda rngs: jadder.AdderAttention(2, 4, scores="adder", rngs=rngs), (2, 5, 4)
    ),
    "einsum": (
        lambda rngs: jadder.adderize(nnx.Einsum("na,ab->nb", (3, 4), rngs=rngs)), (2, 3)
    ),
    "converted attention": (
        lambda rngs: jadder.adderize(nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)),
        (2, 5, 4),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:adderize. no normalisation:jadder.AdderWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_goes_there_and_back(name):
    make, shape = LAYERS[name]
    layer = make(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), shape)
    own, structure, parameters = layer(x), nnx.graphdef(layer), nnx.state(layer)
    ends = []
    for l1_share in (0.0, 0.5):
        jadder.set_l1_share(layer, l1_share)
        ends.append(layer(x))
    assert not np.allclose(ends[0], own, rtol=1e-2)
    assert not np.allclose(ends[0], ends[1], rtol=1e-2)
    jadder.set_l1_share(layer, 1)
    assert nnx.graphdef(layer) == structure
    np.testing.assert_array_equal(layer(x), own)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), parameters)


def test_no_share_is_half_of_euclid():
    x = jax.random.normal(jax.random.key(0), (2, 3))
    adder, euclid = (
        kind(3, 4, rngs=nnx.Rngs(0)) for kind in (jadder.AdderLinear, jadder.EuclidLinear)
    )
    jadder.set_l1_share(adder, 0.0)
    np.testing.assert_allclose(adder(x), 0.5 * euclid(x), rtol=1e-6)


def test_equal_shares_are_equal_programs():
    first, second = (jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0)) for _ in range(2))
    for layer in (first, second):
        jadder.set_l1_share(layer, 0.25)
    assert nnx.graphdef(first) == nnx.graphdef(second)


@pytest.mark.parametrize("l1_share", [-0.1, 1.5, float("nan")])
def test_what_is_no_share(l1_share):
    layer = jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"between 0 and 1, got {l1_share}"):
        jadder.set_l1_share(layer, l1_share)


def test_a_model_without_adders():
    with pytest.raises(ValueError, match="no adder products"):
        jadder.set_l1_share(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), 0.5)
