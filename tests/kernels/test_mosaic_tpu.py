"""The TPU kernels, interpreted on small shapes, and lowered for a TPU on those of benchmarks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from benchmarks import compile_tpu
from jadder import SIGN, ops
from jadder.kernels import mosaic_tpu, reference, xla
from jadder.kernels.mosaic_tpu import MosaicTpuKernels, unsupported
from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip, GradientRule
from tests.strategies import conv_cases, normal, seeds

INTERPRETED = MosaicTpuKernels(interpret=True)
FLOAT32 = jnp.dtype("float32")
CLIPS = (Clip(1.0, 1.0), Clip(4.0, 0.5), SIGN.x)
PLAIN = ConvSpec((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
BAD = (np.nan, np.inf, -np.inf)


class Emulated(MosaicTpuKernels):
    """The same layouts around the kernel's sum in plain JAX, for many cases in little time."""

    def _sum(self, term, a, source, at, blocks):
        assert source.shape[3] <= blocks.source_lanes
        source = jnp.pad(source, [(0, 0)] * 3 + [(0, blocks.source_lanes - source.shape[3])])
        groups, rows, lanes = source.shape[0], a.shape[2], blocks.all_lanes
        total = jnp.zeros((groups, rows, lanes), jnp.float32)
        for tap, (image, offset) in enumerate(blocks.taps):
            for k in range(a.shape[3]):
                column = a[tap, :, :, k, None].astype(jnp.float32)
                row = source[:, image, k, None, offset : offset + lanes].astype(jnp.float32)
                total = term(total, column, row, at)
        return total


def run(kernels, function, operands, *arguments):
    """One function of the kernels, compiled."""
    product = functools.partial(getattr(kernels, function), out_dtype=FLOAT32)
    compiled = jax.jit(
        lambda *operands: product(*operands, *arguments),
        compiler_options={"xla_backend_optimization_level": 0},  # compiling takes the time here
    )
    return np.asarray(compiled(*operands))


def assert_all_like_reference(kernels, operands, clip, spec=None):
    """Forward product and gradients, to rounding in float32."""
    kind, extra = ("matmul", ()) if spec is None else ("conv", (spec,))
    cases = [(kind, operands[:2], extra), (f"{kind}_dx", operands, (*extra, clip))]
    if spec is None:
        cases.append(("matmul_dw", operands, (clip,)))
    for function, chosen, arguments in cases:
        expected = run(reference, function, chosen, *arguments)
        actual = run(kernels, function, chosen, *arguments)
        scale = max(np.abs(expected).max(), 1e-30)
        np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=2e-6)


def typed(dtype, *operands):
    """x and w in ``dtype``, and what comes after them in float32."""
    x, w, *rest = operands
    return (*(jnp.asarray(a, dtype) for a in (x, w)), *(jnp.asarray(a, FLOAT32) for a in rest))


@settings(max_examples=3)
@given(
    sizes=st.tuples(st.integers(1, 2), *[st.integers(1, 40)] * 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    clip=st.sampled_from(CLIPS),
    seed=seeds,
)
def test_matmul(sizes, dtype, clip, seed):
    b, m, k, n = sizes
    operands = normal(seed, (b, m, k), (b, k, n), (b, m, n))
    assert_all_like_reference(INTERPRETED, typed(dtype, *operands), clip)


@settings(max_examples=3)
@given(
    case=conv_cases(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    clip=st.sampled_from(CLIPS),
    seed=seeds,
)
def test_conv(case, dtype, clip, seed):
    assume(len(case.strides) < 3)
    operands = typed(dtype, *normal(seed, case.x, case.w, case.out))
    assert_all_like_reference(INTERPRETED, operands, clip, ConvSpec(*case.arguments))


@given(case=conv_cases(), clip=st.sampled_from(CLIPS), together=st.booleans(), seed=seeds)
def test_layouts_of_convolutions(case, clip, together, seed):
    """Strides, dilations, padding and groups become shifts; with images interleaved or not."""
    x = (128, *case.x[1:]) if together else case.x
    operands = typed(FLOAT32, *normal(seed, x, case.w, (x[0], *case.out[1:])))
    assert_all_like_reference(Emulated(), operands, clip, ConvSpec(*case.arguments))


@pytest.fixture
def _small_blocks(monkeypatch):
    """Blocks of 128 lanes and 16 rows, in so little memory that k takes several."""
    monkeypatch.setattr(mosaic_tpu, "BLOCK_LANES", 128)
    monkeypatch.setattr(mosaic_tpu, "BLOCK_ROWS", 16)
    monkeypatch.setattr(mosaic_tpu, "VMEM_BYTES", 170_000)
    for instead in ("conv", "conv_dx"):
        monkeypatch.setattr(xla, instead, None)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_of_many_blocks(dtype):
    operands = typed(dtype, *normal(0, (1, 20, 140), (1, 140, 150), (1, 20, 150)))
    blocks = mosaic_tpu._Blocks.fit(20, 140, 150, ((0, 0),), (*operands[:2], None))
    assert min(blocks.row_blocks, blocks.k_blocks, blocks.lane_blocks) > 1
    expected = run(reference, "matmul", operands[:2])
    actual = run(INTERPRETED, "matmul", operands[:2])
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("images", [1, 128])
def test_conv_of_many_blocks(images):
    """Taps reach from each block into those after it."""
    size = 12 if images == 1 else 2
    shapes = (images, size, size, 20), (3, 3, 20, 17), (images, size, size, 17)
    operands = typed("float32", *normal(0, *shapes))
    assert_all_like_reference(INTERPRETED, operands, CLIPS[0], PLAIN)


def test_sums_that_do_not_fit_are_those_of_xla():
    spec = ConvSpec((1,), ((0, 0),), (1,), (600_000,))
    x, w, g = typed("float32", *normal(0, (1, 600_003, 1), (2, 1, 1), (1, 3, 1)))
    for function, operands, extra in (("conv", (x, w), ()), ("conv_dx", (x, w, g), CLIPS[:1])):
        np.testing.assert_array_equal(
            run(MosaicTpuKernels(), function, operands, spec, *extra),
            run(xla, function, operands, spec, *extra),
        )


@pytest.mark.parametrize("clip", [Clip(1.0, 1.0), SIGN.x])
def test_not_finite_values_of_a_matmul_are_the_references(clip):
    x, w, g = (a.astype(np.float32) for a in normal(1, (1, 6, 20), (1, 20, 5), (1, 6, 5)))
    x[0, 0, 3], x[0, 1, 4], x[0, 2, 5], w[0, 7, 1], w[0, 5, 2] = *BAD, np.nan, -np.inf
    x[0, 3], w[0, :, 3] = 1, 1  # differences of exactly 0
    for function, operands, extra in (("matmul", (x, w), ()), ("matmul_dx", (x, w, g), (clip,))):
        expected = run(reference, function, operands, *extra)
        actual = run(INTERPRETED, function, operands, *extra)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_not_finite_values_of_a_convolution():
    """As the reference has them, over the edge too."""
    x, w, g = (a.astype(np.float32) for a in normal(2, (1, 4, 4, 2), (3, 3, 2, 3), (1, 4, 4, 3)))
    x[0, 0, 0, 0], x[0, 1, 2, 1], w[0, 0, 0, 0], w[2, 1, 1, 2] = *BAD, np.inf
    np.testing.assert_allclose(
        run(INTERPRETED, "conv", (x, w), PLAIN), run(reference, "conv", (x, w), PLAIN), rtol=2e-5
    )
    w[0, 0, 0, 0] = np.nan
    actual = run(INTERPRETED, "conv_dx", (x, w, g), PLAIN, CLIPS[0])
    for other in (xla, reference):
        expected = run(other, "conv_dx", (x, w, g), PLAIN, CLIPS[0])
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "dimensions", "out_dtype", "reason"),
    [
        ("float32", None, "float32", None),
        ("bfloat16", 2, "float32", None),
        ("float32", 1, "float32", None),
        ("float16", None, "float32", "float32 and bfloat16 in float32, not float16"),
        ("float64", None, "float64", "not float64 in float64"),
        ("uint8", 2, "int32", "not uint8 in int32"),
        ("float32", 3, "float32", "one or two spatial dimensions, not 3"),
    ],
)
def test_unsupported_gives_the_reason(dtype, dimensions, out_dtype, reason):
    spec = dimensions and ConvSpec(
        (1,) * dimensions, ((0, 0),) * dimensions, (1,) * dimensions, (1,) * dimensions
    )
    said = unsupported(jnp.dtype(dtype), spec, jnp.dtype(out_dtype))
    assert said is None if reason is None else reason in said


def lowered_for_tpu(function, *operands):
    """The text of the program that a TPU would be given."""
    traced = jax.jit(function).trace(*operands)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("shape", compile_tpu.SHAPES, ids=lambda shape: shape.name)
def test_kernels_lower(shape):
    dtype = "bfloat16" if math.prod(map(ord, shape.name)) % 3 else "float32"
    for name, function, operands in compile_tpu.passes(shape, jnp.dtype(dtype)):
        assert "tpu_custom_call" in lowered_for_tpu(function, *operands), name


def differentiable(kernels, spec=None):
    """The product with its custom derivative, as `jadder.ops` makes it."""
    rule = GradientRule((4.0, 1.0), (2.0, 0.5))
    return ops._Product("product", spec, rule, kernels, lax.Precision.HIGHEST, FLOAT32, FLOAT32)


def test_mapped_and_differentiated():
    x, w = typed("float32", *normal(3, (2, 1, 4, 5), (1, 5, 3)))

    def gradients(kernels):
        product = jax.vmap(differentiable(kernels), (0, None))
        return jax.jit(jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), (0, 1)))(x, w)

    for actual, expected in zip(gradients(INTERPRETED), gradients(xla), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-4)


def test_lowers_mapped():
    shapes = (3, 1, 8, 5), (3, 1, 5, 3)
    program = lowered_for_tpu(
        jax.vmap(differentiable(MosaicTpuKernels())),
        *(jax.ShapeDtypeStruct(s, FLOAT32) for s in shapes),
    )
    assert "tpu_custom_call" in program


@pytest.mark.parametrize("spec", [None, PLAIN], ids=["matmul", "conv"])
def test_lowers_inside_shard_map_with_gradients(spec):
    """Where each value's type says over which devices it differs."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = ((4, 8, 5), (4, 5, 3)) if spec is None else ((4, 6, 6, 2), (3, 3, 2, 4))
    specs = (P("data"), P("data") if spec is None else P())

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs)
    def gradients(x, w):
        product = differentiable(MosaicTpuKernels(), spec)
        y, pullback = jax.vjp(product, x, w)
        return pullback(y)

    program = lowered_for_tpu(gradients, *(jax.ShapeDtypeStruct(s, FLOAT32) for s in shapes))
    assert program.count("tpu_custom_call") >= 2


@pytest.mark.parametrize("spec", [None, PLAIN], ids=["matmul", "conv"])
def test_lowers_where_64_bit_types_are_enabled(spec):
    shapes = ((1, 8, 5), (1, 5, 3)) if spec is None else ((4, 6, 6, 2), (3, 3, 2, 4))
    with jax.enable_x64(True):
        program = lowered_for_tpu(
            lambda x, w: jax.vjp(differentiable(MosaicTpuKernels(), spec), x, w)[1](
                differentiable(MosaicTpuKernels(), spec)(x, w)
            ),
            *(jax.ShapeDtypeStruct(s, FLOAT32) for s in shapes),
        )
    assert program.count("tpu_custom_call") >= 2
