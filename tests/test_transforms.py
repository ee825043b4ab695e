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
from tests.strategies import implementations, normal, rules, seeds

IMPLEMENTATIONS = implementations("xla", "cpu")
X64 = {"xla": True, "cpu": False}
PRODUCTS = {
    "matmul": (adder_matmul, (4, 6), (6, 5)),
    "conv": (functools.partial(adder_conv, strides=2), (4, 5, 5, 2), (3, 3, 2, 3)),
}
EUCLID_PRODUCTS = {
    "matmul": (euclid_matmul, (4, 6), (6, 5)),
    "conv": (functools.partial(euclid_conv, strides=2), (4, 5, 5, 2), (3, 3, 2, 3)),
}
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture(params=[*IMPLEMENTATIONS, "euclid"])
def implementation(request):
    """An implementation of the adder product, in the widest type that it has, or Euclid's."""
    with jax.enable_x64(X64.get(request.param, True)):
        yield request.param


@pytest.fixture(params=PRODUCTS)
def problem(implementation, request):
    """A scalar function of (x, w), and its operands."""
    if implementation == "euclid":
        product, x_shape, w_shape = EUCLID_PRODUCTS[request.param]
    else:
        product, x_shape, w_shape = PRODUCTS[request.param]
        product = functools.partial(product, implementation=implementation)
    x, w = normal(5, x_shape, w_shape)

    def loss(x, w):
        return jnp.sum(jnp.sin(product(x, w)))

    return loss, x, w


def agree(actual, expected):
    """To rounding, of the largest value, in the type at hand."""

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        tolerance = 1e-11 if jax.config.jax_enable_x64 else 3e-5
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=1))

    jax.tree.map(compare, actual, expected)


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


SECOND_RULES = (GradientRule(), SIGN, GradientRule((4, 1), (1, 2)))


def gradient_of(product, rule, implementation):
    """The gradient of a scalar function of (x, w)."""

    def loss(x, w):
        return jnp.sum(jnp.sin(product(x, w, rule=rule, implementation=implementation)))

    return jax.grad(loss, (0, 1))


@pytest.mark.parametrize("rule", SECOND_RULES)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_second_derivatives_are_the_slopes_of_the_first(implementation, name, rule):
    """Forward over reverse, reverse over reverse, and finite differences."""
    product, *shapes = PRODUCTS[name]
    gradient = jax.jit(gradient_of(product, rule, implementation))
    point, way, other = (normal(seed, *shapes) for seed in (5, 6, 7))

    def moved(t):
        return gradient(*(a + t * v for a, v in zip(point, way, strict=True)))

    def along_other(x, w):
        return sum(jnp.vdot(a, b) for a, b in zip(gradient(x, w), other, strict=True))

    with jax.enable_x64(True):
        step = 1e-7
        slopes = jax.tree.map(lambda b, a: (b - a) / (2 * step), moved(step), moved(-step))
        _, tangents = jax.jvp(gradient, point, way)
        for actual, expected in zip(tangents, slopes, strict=True):
            scale = np.abs(expected).max(initial=1)
            np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-6)
        pulled = jax.grad(along_other, (0, 1))(*point)
        agree(
            sum(jnp.vdot(a, b) for a, b in zip(pulled, way, strict=True)),
            sum(jnp.vdot(a, b) for a, b in zip(tangents, other, strict=True)),
        )


@functools.cache
def high_derivatives(implementation, name, rule):
    """Of second and third order, through jit, vmap, remat and nested gradients."""
    product, *shapes = PRODUCTS[name]
    x, w = (a.astype(np.float32) for a in normal(5, *shapes))

    def penalty(x, w):
        gradient = jax.checkpoint(gradient_of(product, rule, implementation))
        return sum(jnp.sum(a**2) for a in gradient(x, w))

    @jax.jit
    def derivatives(x, w):
        first = jax.grad(penalty, (0, 1))
        mapped = jax.vmap(lambda t: first(x + t, w))(jnp.arange(2.0))
        third = jax.grad(lambda x: jnp.sum(first(x, w)[0] ** 2))(x)
        corner = jax.hessian(lambda c: penalty(x.at[(0,) * x.ndim].set(c), w))(x.reshape(-1)[0])
        return mapped, third, corner

    return [np.asarray(leaf) for leaf in jax.tree.leaves(derivatives(x, w))]


def agree_with_xla(implementation, name, rule):
    ours, theirs = (high_derivatives(which, name, rule) for which in (implementation, "xla"))
    for actual, expected in zip(ours, theirs, strict=True):
        scale = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("rule", SECOND_RULES)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("implementation", implementations("cpu"))
def test_second_derivatives_of_native_kernels_are_xla_s(implementation, name, rule):
    agree_with_xla(implementation, name, rule)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("implementation", [*implementations("cpu_fast"), None])
def test_second_derivatives_of_what_shares_their_gradients(implementation, name):
    agree_with_xla(implementation, name, GradientRule())


@each_implementation
def test_second_derivatives_in_shard_map(implementation):
    x, w = normal(5, (4, 6), (6, 5))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def penalty(x, w):
        return jnp.sum(gradient_of(adder_matmul, GradientRule(), implementation)(x, w)[0] ** 2)

    def sharded(x, w):
        return lax.psum(penalty(x, w), "i")

    specs = PartitionSpec("i"), PartitionSpec()
    mapped = jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    with jax.enable_x64(X64[implementation]):
        agree(jax.jit(jax.grad(mapped, (0, 1)))(x, w), jax.grad(penalty, (0, 1))(x, w))


def test_second_derivatives_need_no_memory_for_each_term():
    x, w = jnp.zeros((1024, 256)), jnp.zeros((256, 256))

    def penalty(x, w):
        return sum(jnp.sum(a**2) for a in gradient_of(adder_matmul, GradientRule(), None)(x, w))

    program = jax.jit(jax.grad(penalty, (0, 1))).lower(x, w).compile()
    terms = x.size * w.shape[1]
    assert program.memory_analysis().temp_size_in_bytes < terms  # a quarter of them in float32


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_second_derivatives_lower_for_other_hardware(platform):
    name = {"cuda": "mosaic_gpu", "tpu": "mosaic_tpu"}[platform]

    def loss(x, w):
        return jnp.sum(adder_matmul(x, w, implementation=name) ** 2)

    x = jnp.zeros((16, 16))
    jax.jit(jax.hessian(loss)).trace(x, x).lower(lowering_platforms=(platform,))


@each_implementation
def test_jacrev_is_the_gradient_of_each_output(implementation):
    x, w = normal(0, (2, 4), (4, 3))
    product = functools.partial(adder_matmul, implementation=implementation)
    with jax.enable_x64(X64[implementation]):
        jacobian = jax.jacrev(product)(x, w)
        for i, j in np.ndindex(2, 3):
            agree(jacobian[i, j], jax.grad(lambda x, i=i, j=j: product(x, w)[i, j])(x))


@given(rule=rules, seed=seeds, shards=st.sampled_from(["batch", "features"]))
@each_implementation
def test_shard_map_gives_the_gradients_of_one_device(implementation, rule, seed, shards):
    """A kernel that is replicated over the batch's devices gets the sum of their gradients."""
    x, w = normal(seed, (8, 6), (6, 8))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    over_x, over_w = (
        (PartitionSpec("i"), PartitionSpec())
        if shards == "batch"
        else (PartitionSpec(), PartitionSpec(None, "i"))
    )

    def loss(x, w):
        y = adder_matmul(x, w, rule=rule, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(over_x, over_w), out_specs=PartitionSpec()
    )
    def sharded_loss(x, w):
        return lax.psum(loss(x, w), "i")

    with jax.enable_x64(X64[implementation]):
        agree(
            jax.jit(jax.value_and_grad(sharded_loss, (0, 1)))(x, w),
            jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w),
        )


@pytest.mark.parametrize("rule", [GradientRule(), SIGN, GradientRule((4, 1), (1, 2))])
@each_implementation
def test_shard_map_of_a_convolution(implementation, rule):
    x, w = normal(0, (4, 6, 6, 2), (3, 3, 2, 4))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, w):
        y = adder_conv(x, w, 2, rule=rule, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("i"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    def sharded_loss(x, w):
        return lax.psum(loss(x, w), "i")

    with jax.enable_x64(X64[implementation]):
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
@each_implementation
def test_sharded_jit_gives_the_numbers_of_one_device(implementation, over_x, over_w):
    x, w = normal(1, (8, 8), (8, 8))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    product = functools.partial(adder_matmul, implementation=implementation)
    gradient = jax.jit(jax.value_and_grad(lambda x, w: product(x, w).sum(), (0, 1)))
    with jax.enable_x64(X64[implementation]):
        expected = gradient(x, w)
        placed = (
            jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, over_x), (w, over_w))
        )
        agree(gradient(*placed), expected)


def test_out_sharding_is_the_result_s(implementation):
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, w = normal(1, (8, 8), (8, 8))
    with jax.set_mesh(mesh):
        for product in (
            [euclid_matmul]
            if implementation == "euclid"
            else [functools.partial(adder_matmul, implementation=implementation)]
        ):
            y = jax.jit(functools.partial(product, out_sharding=PartitionSpec("i")))(x, w)
            assert y.sharding.spec == PartitionSpec("i", None)
            agree(np.asarray(y), np.asarray(product(x, w)))
