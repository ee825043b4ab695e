"""An integer program in JAX's own operations, on any platform: operation by operation, as defined.

Sums are formed by the library's products of bytes and by XLA's convolutions where they are exact;
what follows them is in int64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jadder.integer.program import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Operation,
    Requantization,
    Reshape,
    SumPool,
    sum_bounds,
)
from jadder.ops import adder_conv

_EXACT_IN_FLOAT32 = 1 << 24
_CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


def run(program: IntegerProgram, images: Array) -> Array:
    """The int32 outputs (batch, *output.shape) of uint8 images (batch, *input.shape)."""
    return every_value(program, images)[-1]


def every_value(program: IntegerProgram, images: Array) -> list[Array]:
    """All values of ``images``: the images themselves, then each operation's result."""
    values = [jnp.asarray(images, jnp.uint8)]
    for operation in program.operations:
        values.append(result(operation, program.values[operation.input], values))
    return values


def result(operation: Operation, source: Activation, values: list[Array]) -> Array:
    """The result of one operation, which reads ``source`` and earlier ``values``."""
    x = values[operation.input]
    if isinstance(operation, Reshape):
        return x.reshape(x.shape[0], *operation.output.shape)
    if isinstance(operation, MaxPool):
        return _pool(x, operation, lax.max, np.uint8(0))
    total = sums(operation, source, x)
    return requantize(total, operation.requantization, values, operation.output)


def sums(operation: Operation, source: Activation, x: Array) -> Array:
    """S of an operation, int32 (batch, *output.shape), for its input (batch, *source.shape)."""
    if isinstance(operation, Convolution):
        total = _convolve(operation, source, x)
        if operation.center:
            total = operation.kernel.shape[-1] * total - total.sum(-1, keepdims=True)
        return total
    if isinstance(operation, SumPool):
        padded = _pad(x, source, operation.padding).astype(jnp.int32)
        return _pool(padded, operation, lax.add, np.int32(0), padding=((0, 0), (0, 0)))
    return x.astype(jnp.int32)


def requantize(
    total: Array, each: Requantization, values: list[Array], output: Activation
) -> Array:
    """The result of int32 sums, with residuals taken from ``values``."""
    with jax.enable_x64(True):
        value = total.astype(jnp.int64) * each.multiplier.astype(np.int64) + each.bias
        for residual in each.residuals:
            added = values[residual.value].astype(jnp.int64) * np.int64(residual.multiplier)
            value += added << np.int64(residual.left_shift)
        shifted = value >> np.int64(each.shift)
        return jnp.clip(shifted, np.int64(each.low), np.int64(each.high)).astype(output.dtype)


def _convolve(operation: Convolution, source: Activation, x: Array) -> Array:
    x = _pad(x, source, operation.padding)
    if operation.product == "adder":
        distances = adder_conv(
            x, jnp.asarray(operation.kernel), operation.strides, 0,
            kernel_dilation=operation.kernel_dilation,
            feature_group_count=operation.feature_group_count,
            preferred_element_type=jnp.int32,
        )  # fmt: skip
        return -distances
    low, high = sum_bounds(operation, source)
    exact = max(-low, high) < _EXACT_IN_FLOAT32
    dtype: Any = jnp.float32 if exact else jnp.int32
    products = lax.conv_general_dilated(
        x.astype(dtype), jnp.asarray(operation.kernel, dtype), operation.strides, "VALID",
        rhs_dilation=operation.kernel_dilation, dimension_numbers=_CHANNELS_LAST,
        feature_group_count=operation.feature_group_count, precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    return products.astype(jnp.int32)


def _pad(x: Array, source: Activation, padding: Any) -> Array:
    """``x`` with a border of its zero point."""
    if not any(side for pair in padding for side in pair):
        return x
    zero = np.broadcast_to(np.asarray(source.zero_point, np.uint8), source.shape[2:])
    moved = x - zero  # modulo 256, so that the border is 0
    return jnp.pad(moved, ((0, 0), *padding, (0, 0))) + zero


def _pool(x: Array, operation: Any, reduce: Any, start: Any, padding: Any = None) -> Array:
    window, strides = (1, *operation.window, 1), (1, *operation.strides, 1)
    sides = ((0, 0), *(operation.padding if padding is None else padding), (0, 0))
    pooled: Array = lax.reduce_window(x, start, reduce, window, strides, sides)
    return pooled
