"""Integer programs as native code: equal to the definition, wherever they run."""

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jadder
from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Requantization,
    Rescale,
    SumPool,
    native,
)
from jadder.integer.dispatch import run
from tests.integer import networks, oracle
from tests.integer.programs import images, programs

pytestmark = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no native code: {native.unavailable()}"
)

ROOT = Path(__file__).resolve().parents[2]
INT32 = (-(2**31), 2**31 - 1)


def outputs(program: IntegerProgram, x: Any) -> Any:
    return oracle.every_value(program, x)[-1]


@settings(max_examples=60)
@given(
    program=programs(most_operations=6),
    batch=st.sampled_from([0, 1, 2, 5]),
    seed=st.integers(0, 2**32),
)
def test_programs_are_as_defined(program: IntegerProgram, batch: int, seed: int) -> None:
    assert native.unsupported(program) is None
    x = images(program, batch, seed)
    np.testing.assert_array_equal(run(program, x, "cpu"), outputs(program, x))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    if os.environ.get("JADDER_CPU_ISA"):
        pytest.skip("one has been asked for")
    names = ("test_programs_are_as_defined", "test_large_layers", "test_a_residual_network")
    tests = [f"{Path(__file__)}::{name}" for name in names]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            "--hypothesis-profile=short",
            *tests,
        ],
        env={**os.environ, "JADDER_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


def spread(channels: int, most: int, *, last: bool = False, shift: int = 24) -> Requantization:
    """To bytes, whose sums are up to ``most``."""
    random = np.random.default_rng(channels)
    multiplier = np.rint(255 * 2.0**shift / most * random.uniform(-1, 1, channels))
    low, high = INT32 if last else (0, 255)
    bias = np.full(channels, 128 << shift, np.int64)
    return Requantization(multiplier.astype(np.int32), bias, shift, low, high)


@pytest.mark.parametrize("product", ["adder", "multiply"])
@pytest.mark.parametrize(
    ("channels", "features", "groups", "window"),
    [(64, 80, 1, (3, 3)), (3, 33, 1, (5, 2)), (48, 96, 4, (1, 3)), (60, 40, 20, (3, 3)),
     (130, 130, 130, (3, 3)), (512, 20, 1, (1, 1))],
)  # fmt: skip
def test_large_layers(
    product: Any, channels: int, features: int, groups: int, window: tuple[int, int]
) -> None:
    """More columns than a panel, more positions than a block, and groups of every kind."""
    random = np.random.default_rng(channels)
    shape = (*window, channels // groups, features)
    dtype, least = (np.uint8, 0) if product == "adder" else (np.int8, -128)
    kernel = random.integers(least, least + 256, shape, dtype)
    most = int(np.prod(shape[:3])) * 100
    size = (17, 19)
    padding = tuple((n // 2, n - 1 - n // 2) for n in window)
    grid = Activation((*size, features), (1.0,), (7,))
    operations = (
        Convolution(0, product, kernel, spread(features, most), grid, padding=padding,
                    feature_group_count=groups),
        Rescale(1, spread(features, 255, last=True),
                Activation((*size, features), (1.0,), dtype="int32")),
    )  # fmt: skip
    zero_point = tuple(random.integers(0, 256, channels).tolist())
    program = IntegerProgram(
        Activation((*size, channels), (1.0,) * channels, zero_point), operations
    )
    x = images(program, 3, 0)
    np.testing.assert_array_equal(run(program, x, "cpu"), outputs(program, x))


@pytest.mark.parametrize("shift", [7, 24, 40, 62])
def test_pools_of_many_channels(shift: int) -> None:
    values = Activation((9, 8, 70), (1.0,), (3,))
    pooled = Activation((5, 4, 70), (1.0,), (3,))
    last = Activation((3, 2, 70), (1.0,), dtype="int32")
    program = IntegerProgram(
        values,
        (
            MaxPool(0, (3, 3), pooled, (2, 2), ((1, 1), (1, 1))),
            SumPool(1, (2, 2), spread(70, 1020, last=True, shift=min(shift, 28)), last, (2, 2),
                    ((1, 0), (0, 1))),
        ),
    )  # fmt: skip
    x = images(program, 4, 0)
    np.testing.assert_array_equal(run(program, x, "cpu"), outputs(program, x))


@pytest.mark.parametrize("product", ["adder", "multiply"])
def test_a_residual_network(product: Any) -> None:
    program = networks.resnet20(product)
    x = images(program, 5, 0)
    expected = run(program, x, "xla")
    np.testing.assert_array_equal(run(program, x, "cpu"), expected)
    np.testing.assert_array_equal(run(program, x[:1], "cpu"), expected[:1])
    assert np.ptp(expected) > 100


# -- How it is called ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> IntegerProgram:
    random = np.random.default_rng(0)
    kernel = random.integers(0, 256, (3, 3, 4, 6), np.uint8)
    weights = random.integers(-128, 128, (6, 5, 6, 3), np.int8)
    return IntegerProgram(
        Activation((6, 5, 4), (1.0,) * 4, (1, 2, 3, 4)),
        (
            Convolution(0, "adder", kernel, spread(6, 9000), Activation((6, 5, 6), (1.0,)),
                        padding=((1, 1), (1, 1))),
            Convolution(1, "multiply", weights, spread(3, 10**6, last=True),
                        Activation((1, 1, 3), (1.0,), dtype="int32")),
        ),
    )  # fmt: skip


def test_one_call_for_the_network(small: IntegerProgram) -> None:
    x = jnp.asarray(images(small, 4, 0))
    text = jax.jit(lambda x: run(small, x)).lower(x).compile().as_text()
    assert len(re.findall(r" custom-call\(", text)) == 1
    assert native.TARGET in text
    assert "convolution" not in text


def test_jit_and_vmap(small: IntegerProgram) -> None:
    x = images(small, 6, 0)
    expected = outputs(small, x)
    for implementation in (None, "cpu", "xla"):
        call: Any = lambda x, name=implementation: run(small, x, name)  # noqa: E731
        np.testing.assert_array_equal(jax.jit(call)(x), expected)
        np.testing.assert_array_equal(jax.vmap(call)(x), expected)
        mapped = jax.jit(jax.vmap(call, in_axes=1))(x.reshape(2, 3, 6, 5, 4))
        np.testing.assert_array_equal(mapped, expected.reshape(2, 3, 1, 1, 3).swapaxes(0, 1))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_images_stay_where_they_are(small: IntegerProgram, axis_type: AxisType) -> None:
    x = images(small, 16, 0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        call = jax.jit(lambda x: run(small, x))
        y = call(sharded)
        text = call.lower(sharded).compile().as_text()
    np.testing.assert_array_equal(y, outputs(small, x))
    assert y.sharding.spec[0] == "data"
    assert "s32[4,1,1,3]" in text
    assert "all-gather" not in text


def test_shard_map(small: IntegerProgram) -> None:
    x = images(small, 8, 0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    mapped = jax.shard_map(lambda x: run(small, x), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(mapped)(x), outputs(small, x))


_SERVER = """
import sys
import jax
import numpy as np
import jadder.integer
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
np.save(sys.argv[3], exported.call(np.load(sys.argv[2])))
"""


def test_export_loads_in_another_process(small: IntegerProgram, tmp_path: Path) -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(
        jax.jit(lambda x: run(small, x)),
        platforms=("cpu", "cuda"),
        disabled_checks=jadder.DISABLED_CHECKS,
    )(jax.ShapeDtypeStruct((batch, *small.input.shape), jnp.uint8))
    x = images(small, 3, 0)
    (tmp_path / "exported").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    paths = [tmp_path / name for name in ("exported", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", _SERVER, *paths], check=True, cwd=ROOT)
    np.testing.assert_array_equal(np.load(paths[2]), outputs(small, x))


def test_what_is_compiled_goes_with_the_program(small: IntegerProgram) -> None:
    program = IntegerProgram(copy.deepcopy(small.input), copy.deepcopy(small.operations))
    run(program, images(program, 2, 0))
    assert pickle.loads(pickle.dumps(program)).operations[0].output == program.operations[0].output
    kernel = weakref.ref(program.operations[0].kernel)
    del program
    gc.collect()
    assert kernel() is None


def test_errors_say_what_is_expected(small: IntegerProgram) -> None:
    with pytest.raises(TypeError, match="must be uint8, got float32"):
        run(small, np.zeros((1, 6, 5, 4), np.float32))
    with pytest.raises(ValueError, match=r"\(batch, \*\(6, 5, 4\)\) expected, got \(1, 6, 5, 3\)"):
        run(small, np.zeros((1, 6, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        run(small, np.zeros((1, 6, 5, 4), np.uint8), "gpu")


# -- Damaged programs ------------------------------------------------------------------------------


def call_bytes(data: bytes, x: Any) -> Any:
    """The foreign call of any bytes."""
    native.library()
    result = jax.ShapeDtypeStruct((len(x), 1, 1, 3), jnp.int32)
    return jax.ffi.ffi_call(native.TARGET, result)(x, program=native.attribute(data))


def test_damaged_bytes_are_refused(small: IntegerProgram) -> None:
    data, x = native.serialize(small), images(small, 2, 0)
    np.testing.assert_array_equal(call_bytes(data, x), outputs(small, x))
    random = np.random.default_rng(0)
    for _ in range(10):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] ^= 1 << random.integers(8)
        with pytest.raises(jax.errors.JaxRuntimeError, match="integer program"):
            call_bytes(bytes(damaged), x)
    for length in (0, 8, 19, len(data) // 2, len(data) - 1):
        with pytest.raises(jax.errors.JaxRuntimeError, match="integer program"):
            call_bytes(data[:length], x)


def test_damage_with_a_checksum_of_its_own_does_no_harm(small: IntegerProgram) -> None:
    """It is refused, or is another program."""
    data, x = native.serialize(small), images(small, 2, 0)
    header = 16
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        body = bytearray(data[header + 4 :])
        at = random.integers(len(body) // 8) * 8 + 1  # of numbers at first, or of weights
        body[at if random.random() < 0.5 else at % 240] = random.integers(256)
        checksum = zlib.crc32(body).to_bytes(4, "little")
        try:
            call_bytes(data[:header] + checksum + bytes(body), x)
        except jax.errors.JaxRuntimeError as error:
            refused += "jadder" in str(error)
    assert refused > 5


def test_images_of_another_shape_are_refused(small: IntegerProgram) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="are not those of the integer program"):
        call_bytes(native.serialize(small), np.zeros((2, 6, 5, 5), np.uint8))
