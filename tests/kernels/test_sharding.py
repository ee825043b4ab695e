"""Products of sharded arrays: each device computes with what it holds, and sums are all-reduced."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadder
from jadder import SIGN, GradientRule, adder_conv, adder_matmul
from jadder.kernels import cpu, xla
from jadder.kernels.partitioned import Partitioned
from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip
from tests.strategies import normal

IMPLEMENTATIONS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not jadder.implementations()[name].available,
            reason=f"{name}: {jadder.implementations()[name].about}",
        ),
    )
    for name in ("xla", "cpu")
]
RULES = [
    pytest.param(GradientRule(), id="published"),
    pytest.param(GradientRule((4, 1), (1, 2)), id="bounded"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shardings of the operands and of y, and the passes that end in an all-reduce."""

    x: P
    w: P
    y: P
    summed: tuple[str, ...]


MATMULS = {
    "batch": Case(P("i"), P(), P("i"), ("dw",)),
    "features": Case(P(), P(None, "i"), P(None, "i"), ("dx",)),
    "contraction": Case(P(None, "i"), P("i"), P(), ("y",)),
    "batch, features": Case(P("i"), P(None, "j"), P("i", "j"), ("dx", "dw")),
    "batch, contraction": Case(P("i", "j"), P("j"), P("i"), ("y", "dw")),
    "batch over two axes": Case(P(("i", "j")), P(), P(("i", "j")), ("dw",)),
}


def _last(x, w, y):
    """Shardings of the images and of the last dimensions, as a convolution's."""
    return P(x[0], None, None, x[1]), P(None, None, *w), P(y[0], None, None, y[1])


CONVS = {
    "batch": Case(P("i"), P(), P("i"), ("dw",)),
    "features": Case(*_last((None, None), (None, "i"), (None, "i")), ("dx",)),
    "contraction": Case(*_last((None, "i"), ("i", None), (None, None)), ("y",)),
    "batch, features": Case(*_last(("i", None), (None, "j"), ("i", "j")), ("dx", "dw")),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """An implementation, in float64 if it has it."""
    with jax.enable_x64(request.param == "xla"):
        yield request.param


def two_axes(axis_type):
    half = len(jax.devices()) // 2
    return jax.make_mesh((half, 2), ("i", "j"), axis_types=(axis_type,) * 2)


def put(mesh, *arrays_and_specs):
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    return tuple(
        jax.device_put(array.astype(dtype), NamedSharding(mesh, spec))
        for array, spec in arrays_and_specs
    )


def whole(*arrays):
    """The same arrays on one device, with nothing said of a mesh."""
    return tuple(jnp.asarray(np.asarray(array)) for array in arrays)


def agree(actual, expected):
    """To 1e-9 in float64, and in float32 to 3e-5 of the largest value."""
    tolerance = 1e-9 if jax.config.jax_enable_x64 else 3e-5

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=1))

    jax.tree.map(compare, actual, expected)


def collectives(compiled):
    names = (
        "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    )
    return re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())


def check_passes(product, case, mesh, x, w):
    """The three passes, one program each: their numbers, and their collectives."""
    g = np.cos(np.arange(np.prod(product(x, w).shape))).reshape(product(x, w).shape)
    passes = {
        "y": lambda x, w, g: product(x, w),
        "dx": lambda x, w, g: jax.vjp(product, x, w)[1](g)[0],
        "dw": lambda x, w, g: jax.vjp(product, x, w)[1](g)[1],
    }
    sharded = put(mesh, (x, case.x), (w, case.w), (g, case.y))
    for name, function in passes.items():
        compiled = jax.jit(function).lower(*sharded).compile()
        agree(compiled(*sharded), jax.jit(function)(*whole(*sharded)))
        assert collectives(compiled) == ["all-reduce"] * (name in case.summed), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", MATMULS)
def test_matmuls_gather_nothing_and_reduce_once(implementation, case, rule):
    x, w = normal(0, (16, 8), (8, 12 * 2))
    product = functools.partial(adder_matmul, rule=rule, implementation=implementation)
    check_passes(product, MATMULS[case], two_axes(AxisType.Auto), x, w)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions_gather_nothing_and_reduce_once(implementation, case, rule):
    x, w = normal(0, (4, 6, 5, 8), (3, 3, 8, 8))
    product = functools.partial(
        adder_conv, strides=2, kernel_dilation=(1, 2), rule=rule, implementation=implementation
    )
    check_passes(product, CONVS[case], two_axes(AxisType.Auto), x, w)


@pytest.mark.parametrize("features", [1, 2])
@pytest.mark.parametrize("channels", [1, 2])
def test_groups_of_channels_and_features_stay_where_they_are(implementation, channels, features):
    x, w = normal(0, (2, 5, 8 * channels), (3, channels, 8 * features))
    case = Case(P(None, None, "i"), P(None, None, "i"), P(None, None, "i"), ())
    product = functools.partial(
        adder_conv, feature_group_count=8, rule=SIGN, implementation=implementation
    )
    check_passes(product, case, two_axes(AxisType.Auto), x, w)


def test_a_sharded_space_is_gathered_and_nothing_else(implementation):
    x, w = put(
        two_axes(AxisType.Auto),
        *zip(normal(0, (4, 8, 6, 2), (3, 3, 2, 4)), (P("j", "i"), P()), strict=True),
    )
    product = jax.jit(functools.partial(adder_conv, implementation=implementation))
    compiled = product.lower(x, w).compile()
    agree(compiled(x, w), product(*whole(x, w)))
    assert collectives(compiled) == ["all-gather"]


def test_blocks_of_unequal_size_do_not_count_their_padding(implementation):
    mesh = two_axes(AxisType.Auto)
    x, w = put(mesh, *zip(normal(0, (8, 7), (7, 8)), (P(), P()), strict=True))

    def product(x, w, *specs):
        if specs:
            x, w = (
                lax.with_sharding_constraint(a, NamedSharding(mesh, spec))
                for a, spec in zip((x, w), specs, strict=True)
            )
        return adder_matmul(x, w, implementation=implementation)

    uneven = functools.partial(product, x, w, P(None, "i"), P("i"))
    agree(jax.jit(uneven)(), product(*whole(x, w)))


def test_a_dimension_over_part_of_an_axis(implementation):
    """8 rows over 4 devices, split into 2 x 4: each of the new dimensions has half of the axis."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    x, w = put(mesh, *zip(normal(0, (8, 3, 5), (5, 4)), (P("i"), P()), strict=True))
    product = functools.partial(adder_matmul, implementation=implementation)

    @jax.jit
    def split(x, w):
        return jax.vmap(product, (0, None))(x.reshape(2, 4, 3, 5), w)

    agree(split(x, w), split(*whole(x, w)))


@pytest.mark.parametrize(
    ("axes", "over_x", "over_w", "reduced"),
    [
        ((0, None), P("i"), P(), 0),
        ((0, 0), P("i", "j"), P("i"), 0),
        ((None, 0), P(), P("i", None, "j"), 0),
        ((1, None), P(None, "i", "j"), P("j"), 1),
    ],
)
def test_a_mapped_dimension_stays_sharded(implementation, axes, over_x, over_w, reduced):
    shapes = [(8, 8) if axis is None else (4, 8, 8) for axis in axes]
    x, w = normal(0, *shapes)
    if axes[0] == 1:
        x = np.swapaxes(x, 0, 1)
    x, w = put(two_axes(AxisType.Auto), (x, over_x), (w, over_w))
    product = jax.vmap(functools.partial(adder_matmul, implementation=implementation), axes)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1)))
    agree(gradient(x, w), gradient(*whole(x, w)))
    compiled = jax.jit(product).lower(x, w).compile()
    assert collectives(compiled) == ["all-reduce"] * reduced


def test_a_mapped_convolution_stays_sharded(implementation):
    x, w = put(
        two_axes(AxisType.Auto),
        *zip(normal(0, (4, 2, 6, 3), (4, 3, 3, 4)), (P("i", "j"), P("i")), strict=True),
    )
    product = jax.jit(jax.vmap(functools.partial(adder_conv, implementation=implementation)))
    compiled = product.lower(x, w).compile()
    agree(compiled(x, w), product(*whole(x, w)))
    assert collectives(compiled) == []


def test_in_a_scan_of_rematerialised_steps(implementation):
    x, w = put(
        two_axes(AxisType.Auto),
        *zip(normal(0, (3, 8, 4), (4, 4)), (P(None, "i"), P()), strict=True),
    )
    product = functools.partial(adder_matmul, implementation=implementation)

    @jax.checkpoint
    def step(w, x):
        value, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(product(x, w))))(w)
        return w - 0.1 * gradient, value

    descend = jax.jit(lambda w, xs: lax.scan(step, w, xs))
    agree(descend(w, x), descend(*whole(w, x)))
    assert "all-gather" not in collectives(descend.lower(w, x).compile())


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("case", MATMULS)
def test_explicit_axes_are_those_of_the_result_and_of_each_gradient(implementation, case, is_set):
    case, mesh = MATMULS[case], two_axes(AxisType.Explicit)
    x, w = normal(0, (16, 8), (8, 8))
    x, w = put(mesh, (x, case.x), (w, case.w))
    product = functools.partial(adder_matmul, implementation=implementation)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1)))
    expected = gradient(*whole(x, w))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        y, (dx, dw) = jax.jit(product)(x, w), gradient(x, w)
    agree((dx, dw), expected)
    assert (jax.typeof(dx), jax.typeof(dw)) == (jax.typeof(x), jax.typeof(w))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, case.y), 2)


def test_explicit_axes_of_a_mapped_convolution(implementation):
    mesh = two_axes(AxisType.Explicit)
    x, w = put(mesh, *zip(normal(0, (4, 4, 6, 2), (3, 2, 4)), (P("i", "j"), P()), strict=True))
    product = functools.partial(adder_conv, implementation=implementation)
    loss = jax.vmap(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, None))
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(loss(x, w)), (0, 1)))
    agree(gradient(x, w), gradient(*whole(x, w)))


def test_a_shard_map_beside_sharded_products(implementation):
    mesh = two_axes(AxisType.Auto)
    x, w = put(mesh, *zip(normal(0, (8, 4), (4, 4)), (P("i"), P()), strict=True))
    product = functools.partial(adder_matmul, implementation=implementation)
    mapped = jax.shard_map(product, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
    loss, whole = (
        jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(product(f(x, w), w))), (0, 1)))
        for f in (mapped, product)
    )
    agree(loss(x, w), whole(*whole(x, w)))


def test_a_second_derivative_is_the_one_of_the_kernels():
    with jax.enable_x64(True):
        x, w = put(
            two_axes(AxisType.Auto), *zip(normal(0, (8, 4), (4, 4)), (P("i"), P()), strict=True)
        )

        def norm(kernels, x, w):
            options = {"out_dtype": x.dtype, "precision": lax.Precision.HIGHEST}
            clip = Clip(1.0, 2.0)
            g = jnp.sin(x[None] @ w[None])
            return jnp.sum(jnp.cos(kernels.matmul_dx(x[None], w[None], g, clip, **options)))

        agree(
            jax.jit(jax.grad(functools.partial(norm, Partitioned(xla)), (0, 1)))(x, w),
            jax.jit(jax.grad(functools.partial(norm, xla), (0, 1)))(x, w),
        )


@pytest.mark.parametrize("native", [False, True])
def test_on_one_device_the_program_is_that_of_the_kernels(native):
    if native and cpu.unavailable():
        pytest.skip(cpu.unavailable())
    kernels = cpu.CpuKernels() if native else xla
    spec = ConvSpec((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    x, w, g = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((8, 16, 16, 24), (3, 3, 24, 32), (8, 16, 16, 32))
    )

    def step(kernels, x, w, g):
        y = jax.nn.relu(kernels.conv(2 * x, w, spec, out_dtype=jnp.float32))
        options = {"out_dtype": jnp.float32, "precision": lax.Precision.HIGHEST}
        dx = kernels.conv_dx(x, w, g * y, spec, Clip(1.0, 1.0), **options)
        return dx + x, kernels.conv_dw(x, w, g * y, spec, Clip(1.0, 1.0), **options)

    bare, wrapped = (
        jax.jit(functools.partial(step, k)).lower(x, w, g).compile()
        for k in (kernels, Partitioned(kernels))
    )
    assert wrapped.memory_analysis().temp_size_in_bytes == bare.memory_analysis().temp_size_in_bytes
    assert operations(wrapped) == operations(bare)


def operations(compiled):
    """How often each operation occurs."""
    names = re.findall(r" = \S+ ([a-z][a-z0-9-]*)\(", compiled.as_text())
    return {name: names.count(name) for name in names}


def test_export_for_one_device_and_with_explicit_axes():
    product = functools.partial(adder_matmul, implementation="xla")
    for mesh in (None, two_axes(AxisType.Explicit)):
        x, w = (jnp.asarray(a, jnp.float32) for a in normal(0, (8, 4), (4, 4)))
        expected = product(x, w)
        if mesh is not None:
            x, w = put(mesh, (x, P("i")), (w, P()))
        exported = jax.export.export(jax.jit(product))(x, w)
        agree(exported.call(x, w), expected)
