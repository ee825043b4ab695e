"""The kernels for Hopper GPUs: interpreted on the CPU, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from benchmarks.shapes import MATMULS, RESNET18_CONVS, RESNET20_CONVS, Matmul
from jadder.kernels import mosaic_gpu, reference
from jadder.kernels.mosaic_gpu import MosaicGpuKernels
from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip
from tests.strategies import clips, conv_cases, normal, seeds

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU",
)
INTERPRETED, COMPILED = MosaicGpuKernels(interpret=True), MosaicGpuKernels()
HARD_TANH, SIGN = Clip(1.0, 1.0), Clip(float("inf"), 1.0)
TOLERANCES = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Of the largest value: 16-bit operands are subtracted and added up in 16 bit."""
SAME = ConvSpec((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))


def assert_close(actual, expected, relative):
    """Compares with the largest value as the scale."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    scale = max(np.abs(expected).max(initial=0), 1e-300)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=relative)


def exact(function, *operands):
    """A function of `jadder.kernels.reference` in float64."""
    with jax.enable_x64(True):
        return np.asarray(function(*(jnp.asarray(a, "float64") for a in operands)))


def lower(function, *shapes):
    """The program for CUDA, as text."""
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    device = AbstractDevice("NVIDIA H100", 1, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@interpreted
@settings(max_examples=3)
@given(
    sizes=st.tuples(st.integers(1, 2), *[st.integers(1, 80)] * 3),
    dtype=st.sampled_from(list(TOLERANCES)),
    clip=clips.filter(lambda clip: clip[1] < float("inf")),
    seed=seeds,
)
def test_matmul_and_its_input_gradient(sizes, dtype, clip, seed):
    b, m, k, n = sizes
    clip = Clip(*clip)
    operands = normal(seed, (b, m, k), (b, k, n), (b, m, n))
    x, w, g = (jnp.asarray(a, dtype) for a in operands)

    y = jax.jit(functools.partial(INTERPRETED.matmul, out_dtype="float32"))(x, w)
    expected = exact(functools.partial(reference.matmul, out_dtype="float64"), x, w)
    assert_close(y, expected, TOLERANCES[dtype])

    dx = functools.partial(INTERPRETED.matmul_dx, clip=clip, out_dtype="float32")
    expected = functools.partial(reference.matmul_dx, clip=clip, out_dtype="float64")
    scale = clip.bound * np.abs(np.asarray(g, np.float64)).sum(2, keepdims=True)
    error = np.asarray(jax.jit(dx)(x, w, g), np.float64) - exact(expected, x, w, g)
    assert (np.abs(error) <= 2e-6 * scale).all()


@interpreted
@settings(max_examples=3)
@given(
    case=conv_cases(max_size=7, max_channels=9).filter(lambda case: len(case.strides) < 3),
    seed=seeds,
)
def test_conv_and_its_input_gradient(case, seed):
    spec = ConvSpec(*case.arguments)
    x, w, g = (a.astype("float32") for a in normal(seed, case.x, case.w, case.out))
    options = {"spec": spec, "out_dtype": "float32"}
    y = jax.jit(functools.partial(INTERPRETED.conv, **options))(x, w)
    assert_close(y, exact(functools.partial(reference.conv, **options), x, w), 2e-6)
    options["clip"] = HARD_TANH
    dx = jax.jit(functools.partial(INTERPRETED.conv_dx, **options))(x, w, g)
    assert_close(dx, exact(functools.partial(reference.conv_dx, **options), x, w, g), 2e-6)


@interpreted
@pytest.mark.parametrize("size", [3, 40], ids=["tiles across lines", "tiles within lines"])
def test_strided_groups(size):
    """Both ways to cut rows, with remainders: 40 · 7 rows of a line fill one tile and a part."""
    spec = ConvSpec((2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1), 2)
    shapes = (7, 4, 2 * size, 6), (3, 3, 3, 10)
    x, w = (a.astype("float32") for a in normal(size, *shapes))
    y = INTERPRETED.conv(x, w, spec, out_dtype="float32")
    assert_close(y, exact(lambda x, w: reference.conv(x, w, spec, out_dtype="float64"), x, w), 2e-6)


@interpreted
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_bytes_are_summed_exactly(dtype):
    rng = np.random.default_rng(0)
    limits = np.iinfo(dtype)
    x, w = (
        rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        for shape in ((2, 5, 5, 6), (3, 3, 6, 5))
    )
    y = INTERPRETED.conv(jnp.asarray(x), jnp.asarray(w), SAME, out_dtype="int32")
    assert y.dtype == "int32"
    np.testing.assert_array_equal(y, reference.conv(x, w, SAME, out_dtype="int32"))


@interpreted
def test_not_finite_values_go_through():
    x, w, g = (a.astype(np.float32) for a in normal(1, (1, 6, 20), (1, 20, 5), (1, 6, 5)))
    x[0, 0, 3], x[0, 1, 4], x[0, 2, 5] = np.nan, np.inf, -np.inf
    w[0, 7, 1], w[0, 5, 2] = np.nan, -np.inf
    x, w, g = jnp.asarray(x), jnp.asarray(w), jnp.asarray(g)
    y = INTERPRETED.matmul(x, w, out_dtype="float32")
    np.testing.assert_allclose(y, reference.matmul(x, w, out_dtype="float32"), rtol=1e-5)
    for clip in (HARD_TANH, SIGN):
        dx = INTERPRETED.matmul_dx(x, w, g, clip, out_dtype="float32")
        expected = reference.matmul_dx(x, w, g, clip, out_dtype="float32")
        np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_nan_in_a_kernel_spoils_the_pixels_that_meet_it():
    x, w, g = (a.astype(np.float32) for a in normal(1, (1, 5, 4, 8), (3, 3, 8, 8), (1, 5, 4, 8)))
    w[0, 0, 2, 1], x[0, 2, 2, 0] = np.nan, np.inf
    x, w, g = jnp.asarray(x), jnp.asarray(w), jnp.asarray(g)
    dx = INTERPRETED.conv_dx(x, w, g, SAME, HARD_TANH, out_dtype="float32")
    expected = reference.conv_dx(x, w, g, SAME, HARD_TANH, out_dtype="float32")
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)
    assert 0 < np.isnan(dx[..., 2]).sum() < 5 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", MATMULS, ids=lambda shape: shape.name)
def test_matmuls_are_lowered_for_cuda(shape: Matmul, dtype):
    def both(x, w, g):
        y = COMPILED.matmul(x, w, out_dtype="float32")
        return y, COMPILED.matmul_dx(x, w, g, HARD_TANH, out_dtype="float32")

    shapes = (1, shape.m, shape.k), (1, shape.k, shape.n), (1, shape.m, shape.n)
    program = lower(both, *((s, dtype) for s in shapes))
    assert program.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("shape", [*RESNET20_CONVS, *RESNET18_CONVS], ids=lambda s: s.name)
def test_convolutions_are_lowered_for_cuda(shape):
    pad = max((shape.out_size - 1) * shape.stride + shape.window - shape.size, 0)
    spec = ConvSpec((shape.stride,) * 2, ((pad // 2, pad - pad // 2),) * 2, (1, 1), (1, 1))

    def both(x, w, g):
        y = COMPILED.conv(x, w, spec, out_dtype="float32")
        return y, COMPILED.conv_dx(x, w, g, spec, SIGN, out_dtype="float32")

    program = lower(
        both,
        ((shape.batch, shape.size, shape.size, shape.channels), "float32"),
        ((shape.window, shape.window, shape.channels, shape.features), "float32"),
        ((shape.batch, shape.out_size, shape.out_size, shape.features), "float32"),
    )
    # The gradient of a strided convolution has a kernel for each residue class of its input.
    assert program.count("@mosaic_gpu_v2") == 1 + shape.stride**2


def test_bytes_are_lowered_for_cuda():
    shapes = ((2, 9, 9, 16), "uint8"), ((3, 3, 16, 32), "uint8")
    program = lower(lambda x, w: COMPILED.conv(x, w, SAME, out_dtype="int32"), *shapes)
    assert "@mosaic_gpu_v2" in program


def test_results_vary_over_devices_as_operands_do():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = PartitionSpec(None, "data"), PartitionSpec()

    def both(x, w, g):
        y = COMPILED.matmul(x, w, out_dtype="float32")
        dx = COMPILED.matmul_dx(x, w, g, HARD_TANH, out_dtype="float32")
        assert jax.typeof(y).manual_axis_type.varying == {"data"}
        assert jax.typeof(dx).manual_axis_type.varying == {"data"}
        return y, dx

    parts = jax.shard_map(both, mesh=mesh, in_specs=(rows, everywhere, rows), out_specs=rows)
    shapes = (1, 512, 32), (1, 32, 48), (1, 512, 48)
    operands = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    program = jax.jit(parts).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu_v2" in program
    assert "all_gather" not in program


def test_says_what_it_does_not_take():
    float32, int32 = jnp.dtype("float32"), jnp.dtype("int32")
    assert mosaic_gpu.unsupported(float32, SAME, float32) is None
    assert mosaic_gpu.unsupported(jnp.dtype("int8"), None, int32) is None
    assert "uint8 and int8, not int16" in mosaic_gpu.unsupported(jnp.dtype("int16"), None, int32)
    float64 = jnp.dtype("float64")
    assert "float16 in float32, not float64 in float64" in mosaic_gpu.unsupported(
        float64, None, float64
    )
    cube = ConvSpec((1,) * 3, ((0, 0),) * 3, (1,) * 3, (1,) * 3)
    assert "spatial dimensions, not 3" in mosaic_gpu.unsupported(float32, cube, float32)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only where there is no GPU")
def test_says_that_there_is_no_gpu():
    assert mosaic_gpu.unavailable() == "there is no NVIDIA GPU that JAX can use"
