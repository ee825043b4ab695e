"""Integer programs as native code for the CPU: one foreign call for the whole network.

The call is given the program as bytes, in the format of `serialize`, which it reads, checks and
packs when XLA compiles or loads the call. An image goes through the whole network in a thread's
cache; the images of a batch are shared among XLA's threads, and so is a single one.
"""

import base64
import ctypes
import functools
import struct
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from jadder.integer.program import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Operation,
    Requantization,
    Rescale,
    SumPool,
)
from jadder.kernels import cpu

TARGET = "jadder_integer_program"

_MAGIC = b"JADDERIP"
_VERSION = 1


unavailable = cpu.unavailable


def instruction_set() -> str:
    """What programs run on here: 'avx512vnni', or one of `jadder.kernels.cpu.instruction_set`."""
    name: bytes = library().jadder_integer_program_isa()
    return name.decode()


def unsupported(program: IntegerProgram) -> str | None:
    """Why the native code cannot run this program, or None if it can."""
    data = serialize(program)
    why = ctypes.create_string_buffer(512)
    refusal = library().jadder_integer_program_refusal
    return why.value.decode() if refusal(data, len(data), why, len(why) - 1) else None


def attribute(serialized: bytes) -> str:
    """A program as the foreign call's attribute: text, which XLA copies without escapes."""
    return base64.b64encode(serialized).decode()


def register() -> None:
    """Makes the foreign call known to JAX, where there is native code."""
    if _unusable() is None:
        library()


def _unusable() -> str | None:
    try:
        return unavailable()
    except ValueError as error:  # of the environment, which the first use of the native code tells
        return str(error)


@functools.cache
def library() -> ctypes.CDLL:
    """The native library, with the foreign call of integer programs registered with JAX."""
    loaded = cpu.library()
    loaded.jadder_integer_program_isa.restype = ctypes.c_char_p
    loaded.jadder_integer_program_refusal.argtypes = [
        ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64
    ]  # fmt: skip
    stages = {
        "instantiate": jax.ffi.pycapsule(loaded.jadder_integer_program_instantiate),
        "execute": jax.ffi.pycapsule(loaded.jadder_integer_program),
    }
    jax.ffi.register_ffi_target(TARGET, stages, platform="cpu")
    # All dimensions but the last three are a batch, which devices may share.
    jax.ffi.register_ffi_target_as_batch_partitionable(TARGET)
    return loaded


# -- The format ------------------------------------------------------------------------------------
#
# A magic number, the version, a checksum of the rest, then the input, the number of operations and
# the operations. Numbers are little-endian int64 except the checksum, which has four bytes. It is
# private to this version of the library: what is kept in files is written by `IntegerProgram.save`.


def serialize(program: IntegerProgram) -> bytes:
    """The program as the native code reads it (csrc/program_format.cc)."""
    body = b"".join(_parts(program))
    return _MAGIC + _numbers(_VERSION) + struct.pack("<I", zlib.crc32(body)) + body


def _parts(program: IntegerProgram) -> Iterator[bytes]:
    yield from _activation(program.input)
    yield _numbers(len(program.operations))
    for operation in program.operations:
        yield from _operation(operation)


def _operation(operation: Operation) -> Iterator[bytes]:
    kinds = {SumPool: 2, MaxPool: 3, Rescale: 4}
    if isinstance(operation, Convolution):
        kind = 0 if operation.product == "adder" else 1
    else:
        kind = kinds.get(type(operation), 5)
    yield _numbers(kind, operation.input)
    yield from _activation(operation.output)
    if isinstance(operation, Convolution):
        window = operation.kernel.shape[:2]
        yield _window(operation, window, operation.kernel_dilation)
        yield _numbers(operation.feature_group_count, int(operation.center))
        yield operation.kernel.tobytes()
    elif isinstance(operation, SumPool | MaxPool):
        yield _window(operation, operation.window, (1, 1))
    if isinstance(operation, Convolution | SumPool | Rescale):
        yield from _requantization(operation.requantization)


def _activation(each: Activation) -> Iterator[bytes]:
    wide = each.dtype == "int32"
    yield _numbers(*each.shape, int(wide), 255 if wide else each.maximum, len(each.zero_point))
    yield bytes(each.zero_point)


def _window(
    operation: Convolution | SumPool | MaxPool, window: tuple[int, ...], dilation: tuple[int, int]
) -> bytes:
    sides = [side for pair in operation.padding for side in pair]
    return _numbers(*window, *operation.strides, *dilation, *sides)


def _requantization(each: Requantization) -> Iterator[bytes]:
    yield np.asarray(each.multiplier, "<i4").tobytes()
    yield np.asarray(each.bias, "<i8").tobytes()
    yield _numbers(each.shift, each.low, each.high, len(each.residuals))
    for residual in each.residuals:
        yield _numbers(residual.value, residual.multiplier, residual.left_shift)


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)
