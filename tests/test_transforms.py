"""Under every transformation of JAX the products are the same functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jadder import SIGN, GradientRule, adder_conv, adder_matmul, euclid_conv, euclid_matmul
from tests.strategies import normal, rules, seeds

PRODUCTS = {
    "adder_matmul": (adder_matmul, (4, 6), (6, 5)),
    "adder_conv": (functools.partial(adder_conv, strides=2), (4, 5, 5, 2), (3, 3, 2, 3)),
    "euclid_matmul": (euclid_matmul, (4, 6), (6, 5)),
    "euclid_conv": (functools.partial(euclid_conv, strides=2), (4, 5, 5, 2), (3, 3, 2, 3)),
}


@pytest.fixture(params=PRODUCTS)
def problem(request):
    """A scalar function of (x, w), and its operands."""
    product, x_shape, w_shape = PRODUCTS[request.param]
    x, w = normal(5, x_shape, w_shape)

    def loss(x, w):
        return jnp.sum(jnp.sin(product(x, w)))

    return loss, x, w


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def agree(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), actual, expected
    )


def test_jit_and_remat_change_nothing(problem):
    loss, x, w = problem
    expected = jax.value_and_grad(loss, (0, 1))(x, w)
    agree(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w), expected)
    agree(jax.value_and_grad(jax.checkpoint(loss), (0, 1))(x, w), expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 0)])
def test_vmap_is_a_loop(problem, axes):
    loss, x, w = problem
    gradient = jax.value_and_grad(loss, (0, 1))
    stacked = [
        a if axis is None else np.stack([a, a + 0.3, 2 * a], axis)
        for a, axis in zip((x, w), axes, strict=True)
    ]
    loop = [
        gradient(
            *(
                a if axis is None else np.take(a, i, axis)
                for a, axis in zip(stacked, axes, strict=True)
            )
        )
        for i in range(3)
    ]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *loop)
    agree(jax.vmap(gradient, axes)(*stacked), expected)


def test_scan_is_a_loop(problem):
    loss, x, w = problem

    def step(w, x):
        value, gradient = jax.value_and_grad(loss, 1)(x, w)
        return w - 0.1 * gradient, value

    xs = np.stack([x, 2 * x, -x])
    expected, values = w, []
    for x in xs:
        expected, value = step(expected, x)
        values.append(value)
    agree(jax.jit(lambda w, xs: lax.scan(step, w, xs))(w, xs), (expected, np.stack(values)))


def test_jacrev_is_the_gradient_of_each_output():
    x, w = normal(0, (2, 4), (4, 3))
    jacobian = jax.jacrev(adder_matmul)(x, w)
    for i, j in np.ndindex(2, 3):
        agree(jacobian[i, j], jax.grad(lambda x, i=i, j=j: adder_matmul(x, w)[i, j])(x))


@given(rule=rules, seed=seeds, shards=st.sampled_from(["batch", "features"]))
def test_shard_map_gives_the_gradients_of_one_device(rule, seed, shards):
    """A kernel that is replicated over the batch's devices gets the sum of their gradients."""
    x, w = normal(seed, (8, 6), (6, 8))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    over_x, over_w = (
        (PartitionSpec("i"), PartitionSpec())
        if shards == "batch"
        else (PartitionSpec(), PartitionSpec(None, "i"))
    )

    def loss(x, w):
        return jnp.sum(jnp.sin(adder_matmul(x, w, rule=rule)))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(over_x, over_w), out_specs=PartitionSpec()
    )
    def sharded_loss(x, w):
        return lax.psum(loss(x, w), "i")

    agree(
        jax.jit(jax.value_and_grad(sharded_loss, (0, 1)))(x, w),
        jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w),
    )


@pytest.mark.parametrize("rule", [GradientRule(), SIGN, GradientRule((4, 1), (1, 2))])
def test_shard_map_of_a_convolution(rule):
    x, w = normal(0, (4, 6, 6, 2), (3, 3, 2, 4))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, w):
        return jnp.sum(jnp.sin(adder_conv(x, w, 2, rule=rule)))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("i"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    def sharded_loss(x, w):
        return lax.psum(loss(x, w), "i")

    agree(
        jax.jit(jax.value_and_grad(sharded_loss, (0, 1)))(x, w),
        jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w),
    )


@pytest.mark.parametrize(
    ("over_x", "over_w"),
    [
        (PartitionSpec("i"), PartitionSpec()),
        (PartitionSpec(), PartitionSpec(None, "i")),
        (PartitionSpec(None, "i"), PartitionSpec("i")),
    ],
)
def test_sharded_jit_gives_the_numbers_of_one_device(over_x, over_w):
    x, w = normal(1, (8, 8), (8, 8))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    gradient = jax.jit(jax.value_and_grad(lambda x, w: adder_matmul(x, w).sum(), (0, 1)))
    expected = gradient(x, w)
    placed = (
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, over_x), (w, over_w))
    )
    agree(gradient(*placed), expected)


def test_out_sharding_is_the_result_s():
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, w = normal(1, (8, 8), (8, 8))
    with jax.set_mesh(mesh):
        for product in (adder_matmul, euclid_matmul):
            y = jax.jit(functools.partial(product, out_sharding=PartitionSpec("i")))(x, w)
            assert y.sharding.spec == PartitionSpec("i", None)
            agree(np.asarray(y), np.asarray(product(x, w)))
