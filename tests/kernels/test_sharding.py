"""Products of sharded arrays: each device computes with what it holds, and sums are all-reduced."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadder
from jadder import ADDERNET, SIGN, GradientRule, adder_conv, adder_dot_general, adder_matmul
from jadder.kernels import cpu, xla
from jadder.kernels.partitioned import Partitioned
from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip
from tests.strategies import implementations, normal

IMPLEMENTATIONS = implementations("xla", "cpu")
BOUNDED = GradientRule((4, 1), (1, 2))
"""A rule of which no gradient is a matrix product."""
PUBLISHED = ADDERNET
TOLERANCES = {"float64": 1e-9, "float32": 3e-5}
"""Between one device and eight, of an array's largest value."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options with which the compiler spends less time on each device's own program."""


@pytest.fixture(autouse=True, scope="module")
def _eight_devices():
    if len(jax.devices()) != 8:
        pytest.skip("needs the eight devices that tests/conftest.py makes of a CPU")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """An implementation, in float64 if it has it."""
    with jax.enable_x64(request.param == "xla"):
        yield request.param


def two_axes(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("i", "j"), axis_types=(axis_type,) * 2)


def put(mesh, *arrays_and_specs):
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    return tuple(
        jax.device_put(
            array.astype(dtype) if array.dtype.kind == "f" else array, NamedSharding(mesh, spec)
        )
        for array, spec in arrays_and_specs
    )


def whole(*arrays):
    """The same arrays on one device, with nothing said of a mesh."""
    return tuple(jnp.asarray(np.asarray(array)) for array in arrays)


def agree(actual, expected):
    tolerance = TOLERANCES["float64" if jax.config.jax_enable_x64 else "float32"]

    def compare(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=1))

    jax.tree.map(compare, actual, expected)


def compiled(function, *operands):
    return jax.jit(function).lower(*operands).compile(QUICK)


def collectives(program):
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|ragged-all-to-all|collective-[a-z]+"
    return re.findall(rf" ({names})(?:-start)?\(", program.as_text())


# -- What is shared out, and what it costs ---------------------------------------------------------


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
    "features, contraction": Case(P(None, "j"), P("j", "i"), P(None, "i"), ("y", "dx")),
    "batch over two axes": Case(P(("j", "i")), P(), P(("j", "i")), ("dw",)),
}
CONVS = {
    name: Case(
        P(*case.x[:1], None, None, *case.x[1:]),
        P(None, None, *case.w),
        P(*case.y[:1], None, None, *case.y[1:]),
        case.summed,
    )
    for name, case in MATMULS.items()
}


def operands_of(product):
    return (
        normal(0, (16, 8), (8, 16))
        if product == "matmul"
        else normal(0, (8, 4, 3, 8), (2, 2, 8, 8))
    )


def function_of(product, implementation, rule=BOUNDED):
    function = {"matmul": adder_matmul, "conv": adder_conv}[product]
    return functools.partial(function, rule=rule, implementation=implementation)


def passes_of(product):
    return {
        "y": lambda x, w, g: product(x, w),
        "dx": lambda x, w, g: jax.vjp(product, x, w)[1](g)[0],
        "dw": lambda x, w, g: jax.vjp(product, x, w)[1](g)[1],
    }


def check_passes(product, case, mesh, x, w, single=None):
    """The three passes, one program each: their numbers, and their collectives."""
    single = single or product
    x, w = put(mesh, (x, case.x), (w, case.w))
    shape = jax.eval_shape(single, *whole(x, w)).shape
    (g,) = put(mesh, (np.cos(np.arange(np.prod(shape))).reshape(shape), case.y))
    expected = compiled(lambda *a: [f(*a) for f in passes_of(single).values()], *whole(x, w, g))
    expected = expected(*whole(x, w, g))
    for (name, function), numbers in zip(passes_of(product).items(), expected, strict=True):
        program = compiled(function, x, w, g)
        agree(program(x, w, g), numbers)
        assert collectives(program) == ["all-reduce"] * (name in case.summed), name


@pytest.mark.parametrize(
    ("axis_type", "case"),
    [
        *((AxisType.Auto, case) for case in MATMULS),
        *((AxisType.Explicit, case) for case in ("batch, features", "batch, contraction")),
        *((AxisType.Explicit, case) for case in ("features, contraction", "batch over two axes")),
    ],
)
def test_matmuls_gather_nothing_and_reduce_once(implementation, axis_type, case):
    product = function_of("matmul", implementation)
    check_passes(product, MATMULS[case], two_axes(axis_type), *operands_of("matmul"))


@pytest.mark.parametrize(
    ("axis_type", "case"),
    [
        *((AxisType.Auto, case) for case in ("batch", "features", "contraction")),
        *((AxisType.Auto, case) for case in ("batch, features", "batch, contraction")),
        *((AxisType.Explicit, case) for case in ("batch, features", "batch, contraction")),
    ],
)
def test_convolutions_gather_nothing_and_reduce_once(implementation, axis_type, case):
    product = function_of("conv", implementation)
    check_passes(product, CONVS[case], two_axes(axis_type), *operands_of("conv"))


@pytest.mark.parametrize("case", ["batch, features", "batch, contraction"])
@pytest.mark.parametrize("product", ["matmul", "conv"])
def test_so_do_gradients_that_are_matrix_products(implementation, product, case):
    rule = PUBLISHED if case == "batch, features" else GradientRule((1, np.inf), (1, np.inf))
    function = function_of(product, implementation, rule)
    case = (MATMULS if product == "matmul" else CONVS)[case]
    check_passes(function, case, two_axes(), *operands_of(product))


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no native code")
@pytest.mark.parametrize("case", ["batch, features", "batch, contraction"])
@pytest.mark.parametrize("product", ["matmul", "conv"])
def test_so_do_native_euclid_products(product, case):
    function = {"matmul": jadder.euclid_matmul, "conv": jadder.euclid_conv}[product]
    case = (MATMULS if product == "matmul" else CONVS)[case]
    function = functools.partial(function, implementation="cpu")
    check_passes(function, case, two_axes(), *operands_of(product))


@pytest.mark.parametrize("case", ["batch, features", "batch, contraction"])
@pytest.mark.parametrize("product", ["matmul", "conv"])
def test_so_do_products_in_a_shard_map(implementation, product, case):
    summed = case.endswith("contraction")
    case = (MATMULS if product == "matmul" else CONVS)[case]
    single, mesh = function_of(product, implementation), two_axes()

    def on_blocks(x, w):
        return lax.psum(single(x, w), "j") if summed else single(x, w)

    mapped = jax.shard_map(on_blocks, mesh=mesh, in_specs=(case.x, case.w), out_specs=case.y)
    check_passes(mapped, case, mesh, *operands_of(product), single)


@pytest.mark.parametrize(("channels", "features"), [(1, 1), (2, 3)])
def test_groups_of_channels_and_features_stay_where_they_are(implementation, channels, features):
    x, w = normal(0, (2, 5, 8 * channels), (2, channels, 8 * features))
    case = Case(P(None, None, "i"), P(None, None, "i"), P(None, None, "i"), ())
    product = functools.partial(
        adder_conv, feature_group_count=8, rule=SIGN, implementation=implementation
    )
    check_passes(product, case, two_axes(), x, w)


def test_a_sharded_space_is_gathered_and_nothing_else(implementation):
    over_height, mesh = P("j", "i"), two_axes()
    x, w, g = normal(0, (4, 8, 6, 2), (3, 3, 2, 4), (4, 8, 6, 4))
    operands = put(mesh, (x, over_height), (w, P()), (g, over_height))
    product = function_of("conv", implementation)
    for name, function in passes_of(product).items():
        program = compiled(function, *operands)
        agree(program(*operands), jax.jit(function)(*whole(*operands)))
        # x; and y's gradient, whose images' parts are summed over "j" for that of the kernel.
        expected = {"y": 1, "dx": 2, "dw": 2}[name]
        assert sorted(collectives(program)) == ["all-gather"] * expected + ["all-reduce"] * (
            name == "dw"
        )


@pytest.mark.parametrize("name", ["cpu", "cpu_fast", "xla", None])
def test_bytes_and_narrow_floats(name):
    if name and not (found := jadder.implementations()[name]).available:
        pytest.skip(found.about)
    case, mesh = MATMULS["batch, contraction"], two_axes()
    x, w = normal(0, (16, 8), (8, 16))
    narrow = functools.partial(adder_matmul, implementation=name)
    sums = functools.partial(
        adder_dot_general,
        dimension_numbers=(((1,), (0,)), ((), ())),
        preferred_element_type=jnp.int32,
        implementation=name,
    )
    for product, dtype in (
        (sums, "int8"),
        (sums, "uint8"),
        (narrow, "float16"),
        (narrow, "bfloat16"),
    ):
        pair = (np.asarray(jnp.asarray(3 * np.abs(a), dtype)) for a in (x, w))
        pair = put(mesh, *zip(pair, (case.x, case.w), strict=True))
        program = compiled(product, *pair)
        expected = product(*whole(*pair))
        np.testing.assert_array_equal(np.asarray(program(*pair)), np.asarray(expected))
        assert program(*pair).dtype == expected.dtype
        assert collectives(program) == ["all-reduce"]


def test_explicit_axes_are_those_of_the_result_and_of_each_gradient(implementation):
    case, mesh = MATMULS["batch, contraction"], two_axes(AxisType.Explicit)
    x, w = put(mesh, *zip(operands_of("matmul"), (case.x, case.w), strict=True))
    y, back = jax.vjp(function_of("matmul", implementation), x, w)
    dx, dw = back(y)
    assert (jax.typeof(dx), jax.typeof(dw)) == (jax.typeof(x), jax.typeof(w))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, case.y), 2)


# -- Shardings that fit less well ------------------------------------------------------------------


def test_blocks_of_unequal_size_do_not_count_their_padding(implementation):
    mesh = two_axes()
    x, w = put(mesh, *zip(normal(0, (8, 7), (7, 8)), (P(), P()), strict=True))

    def product(x, w, *specs):
        if specs:
            x, w = (
                lax.with_sharding_constraint(a, NamedSharding(mesh, spec))
                for a, spec in zip((x, w), specs, strict=True)
            )
        return adder_matmul(x, w, implementation=implementation)

    uneven = compiled(lambda x, w: product(x, w, P(None, "i"), P("i")), x, w)
    agree(uneven(x, w), product(*whole(x, w)))


def test_a_dimension_over_part_of_an_axis(implementation):
    """8 images over 4 devices, split into 2 x 4: each new dimension has half of the axis."""
    x, w = put(two_axes(), *zip(normal(0, (8, 3, 5), (5, 4)), (P("i"), P()), strict=True))
    product = jax.vmap(functools.partial(adder_matmul, implementation=implementation), (0, None))

    def split(x, w):
        return product(x.reshape(2, 4, 3, 5), w).reshape(8, 3, 4)

    program = compiled(split, x, w)
    agree(program(x, w), split(*whole(x, w)))
    assert collectives(program) == []


def test_numbers_of_devices_that_are_no_power_of_two(implementation):
    x, w = normal(0, (12, 6), (6, 9))
    for shape in ((3, 2), (2, 3)):
        mesh = jax.make_mesh(shape, ("i", "j"), axis_types=(AxisType.Auto,) * 2)
        pair = put(mesh, (x, P("i", "j")), (w, P("j")))
        product = functools.partial(adder_matmul, implementation=implementation)
        program = compiled(product, *pair)
        agree(program(*pair), product(*whole(*pair)))
        assert collectives(program) == ["all-reduce"]


def test_several_meshes_in_a_program(implementation):
    product = functools.partial(adder_matmul, implementation=implementation)
    line = jax.make_mesh((8,), ("k",), axis_types=(AxisType.Auto,))
    x, w = normal(0, (16, 8), (8, 8))
    x, w = *put(two_axes(), (x, P("i"))), *put(line, (w, P()))
    mapped = jax.shard_map(product, mesh=line, in_specs=(P("k"), P()), out_specs=P("k"))

    def gradients(product, mapped):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(mapped(x, w), w))), (0, 1))

    program = compiled(gradients(product, mapped), x, w)
    agree(program(x, w), jax.jit(gradients(product, product))(*whole(x, w)))
    assert "all-gather" not in collectives(compiled(product, x, w))


# -- Transformations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "over_x", "over_w", "reduced"),
    [
        ((0, None), P("i"), P(), 0),
        ((0, 0), P("i", "j"), P("i"), 0),
        ((None, 0), P(), P("i", None, "j"), 0),
        ((1, None), P(None, "i", "j"), P("j"), 1),
    ],
)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mapped_dimension_stays_sharded(implementation, axis_type, axes, over_x, over_w, reduced):
    shapes = [(8, 8) if axis is None else (4, 8, 8) for axis in axes]
    x, w = normal(0, *shapes)
    if axes[0] == 1:
        x = np.swapaxes(x, 0, 1)
    x, w = put(two_axes(axis_type), (x, over_x), (w, over_w))
    product = jax.vmap(functools.partial(adder_matmul, implementation=implementation), axes)
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1))
    agree(compiled(gradient, x, w)(x, w), jax.jit(gradient)(*whole(x, w)))
    assert collectives(compiled(product, x, w)) == ["all-reduce"] * reduced


def test_a_mapped_convolution_stays_sharded(implementation):
    x, w = normal(0, (4, 2, 6, 3), (4, 3, 3, 4))
    x, w = put(two_axes(), (x, P("i", "j")), (w, P("i")))
    product = jax.vmap(functools.partial(adder_conv, implementation=implementation))
    program = compiled(product, x, w)
    agree(program(x, w), product(*whole(x, w)))
    assert collectives(program) == []


def test_in_a_scan_of_rematerialised_steps(implementation):
    x, w = put(two_axes(), *zip(normal(0, (3, 8, 4), (4, 4)), (P(None, "i"), P()), strict=True))
    product = functools.partial(adder_matmul, implementation=implementation)

    @jax.checkpoint
    def step(w, x):
        value, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(product(x, w))))(w)
        return w - 0.1 * gradient, value

    def descend(w, xs):
        return lax.scan(step, w, xs)

    program = compiled(descend, w, x)
    agree(program(w, x), descend(*whole(w, x)))
    assert set(collectives(program)) == {"all-reduce"}


def test_a_second_derivative_is_the_one_of_the_kernels():
    with jax.enable_x64(True):
        x, w = put(two_axes(), *zip(normal(0, (8, 4), (4, 4)), (P("i"), P()), strict=True))

        def norm(kernels, x, w):
            options = {"out_dtype": x.dtype, "precision": lax.Precision.HIGHEST}
            g = jnp.sin(x[None] @ w[None])
            dx = kernels.matmul_dx(x[None], w[None], g, Clip(1.0, 2.0), **options)
            return jnp.sum(jnp.cos(dx))

        bare, wrapped = (
            compiled(jax.grad(functools.partial(norm, kernels), (0, 1)), x, w)(x, w)
            for kernels in (xla, Partitioned(xla))
        )
        agree(wrapped, bare)


# -- What is as it is without partitioning ---------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
def test_on_one_device_the_program_is_that_of_the_kernels(native):
    if native and cpu.unavailable():
        pytest.skip(cpu.unavailable())
    kernels = cpu.CpuKernels() if native else xla
    spec = ConvSpec((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    x, w, g = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((4, 8, 8, 8), (3, 3, 8, 16), (4, 8, 8, 16))
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


def operations(program):
    """How often each operation occurs."""
    names = re.findall(r" = \S+ ([a-z][a-z0-9-]*)\(", program.as_text())
    return {name: names.count(name) for name in names}


def is_partitioned(lowered):
    return "CustomSPMDPartitioning" in lowered.as_text()


def test_where_there_is_no_partitioning_the_kernels_are_used_as_they_are():
    product = functools.partial(adder_matmul, implementation="xla")
    x, w = put(two_axes(), *zip(operands_of("matmul"), (P("i"), P()), strict=True))
    traced = jax.jit(product).trace(x, w)
    assert is_partitioned(traced.lower())
    for platform in ("tpu", "cuda"):
        assert not is_partitioned(traced.lower(lowering_platforms=(platform,)))
    assert not is_partitioned(jax.jit(product).lower(*whole(x, w)))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        assert not is_partitioned(jax.jit(product).lower(x, w))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_export_for_many_devices(axis_type):
    product = functools.partial(adder_matmul, implementation="xla")
    mesh = two_axes(axis_type)
    x, w = put(mesh, *zip(operands_of("matmul"), (P("i", "j"), P("j")), strict=True))
    exported = jax.export.export(jax.jit(product))(x, w)
    assert exported.nr_devices == 8
    agree(jax.jit(exported.call)(x, w), product(*whole(x, w)))


@pytest.mark.parametrize("length", [2, 4])
def test_lower_for_devices_that_are_not_there(length):
    mesh = AbstractMesh((4, length), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    x, w = operands_of("matmul")
    specs = (
        jax.ShapeDtypeStruct(a.shape, np.float32, sharding=NamedSharding(mesh, spec))
        for a, spec in ((x, P("i", "j")), (w, P("j")))
    )
    product = functools.partial(adder_matmul, implementation="xla")
    lowered = jax.jit(product).trace(*specs).lower(lowering_platforms=("cpu",))
    if mesh.size == len(jax.devices()):
        program = lowered.compile(QUICK, device_assignment=tuple(jax.devices()))
        assert collectives(program) == ["all-reduce"]
        pair = put(two_axes(), (x, P("i", "j")), (w, P("j")))
        agree(program(*pair), product(*whole(*pair)))


def test_traced_with_float64_and_lowered_without():
    product = functools.partial(adder_matmul, implementation="xla")
    with jax.enable_x64(True):
        x, w = put(two_axes(), *zip(operands_of("matmul"), (P("i"), P()), strict=True))
        traced, expected = jax.jit(product).trace(x, w), product(*whole(x, w))
    program = traced.lower().compile(QUICK)
    with jax.enable_x64(True):
        agree(program(x, w), expected)


def test_a_compiled_program_can_be_kept_in_a_file():
    product = functools.partial(adder_matmul, implementation="xla")
    x, w = put(two_axes(), *zip(operands_of("matmul"), (P("i"), P()), strict=True))
    loaded = deserialize_and_load(
        *serialize(compiled(product, x, w)), execution_devices=jax.devices()
    )
    agree(loaded(x, w), product(*whole(x, w)))


def test_without_their_pointers_programs_are_told_apart_by_name():
    """What jax_remove_custom_partitioning_ptr_from_cache_key=True relies on."""
    x, w = put(two_axes(), *zip(operands_of("matmul"), (P("i"), P()), strict=True))

    def text(rule):
        jax.clear_caches()
        product = functools.partial(adder_matmul, rule=rule, implementation="xla")
        lowered = jax.jit(lambda x, w: jax.grad(lambda x: product(x, w).sum())(x)).lower(x, w)
        assert is_partitioned(lowered)
        return re.sub(r'backend_config = "\d+"', "", lowered.as_text())

    assert text(BOUNDED) == text(BOUNDED)
    assert text(BOUNDED) != text(SIGN)
