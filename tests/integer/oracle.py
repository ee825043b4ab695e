"""Integer programs by NumPy's int64 and loops over taps, sharing no code with the library."""

from typing import Any

import numpy as np

from jadder.integer import Convolution, IntegerProgram, MaxPool, Reshape, SumPool


def every_value(program: IntegerProgram, images: Any) -> list[Any]:
    """All values for images (batch, *input.shape), in int64."""
    values = [np.asarray(images, np.int64)]
    for operation in program.operations:
        x, source = values[operation.input], program.values[operation.input]
        zero = np.broadcast_to(source.zero_point, source.shape[2:])
        if isinstance(operation, Reshape):
            values.append(x.reshape(len(x), *operation.output.shape))
            continue
        if isinstance(operation, MaxPool):
            values.append(np.max(taps_of(x, operation.window, operation, (1, 1), -1), axis=0))
            continue
        if isinstance(operation, Convolution):
            total = convolve(operation, x, zero)
        elif isinstance(operation, SumPool):
            total = np.sum(taps_of(x, operation.window, operation, (1, 1), zero), axis=0)
        else:
            total = x
        each = operation.requantization
        value = total * each.multiplier.astype(np.int64) + each.bias
        for residual in each.residuals:
            value = value + values[residual.value] * (residual.multiplier << residual.left_shift)
        values.append(np.clip(value >> each.shift, each.low, each.high))
    return values


def convolve(operation: Convolution, x: Any, zero: Any) -> Any:
    """S of a convolution in int64, for inputs (batch, height, width, channels)."""
    kernel = operation.kernel.astype(np.int64)
    taps = taps_of(x, kernel.shape[:2], operation, operation.kernel_dilation, zero)
    per_group, features = kernel.shape[2:]
    groups = operation.feature_group_count
    per_features = features // groups
    total = np.zeros((*taps[0].shape[:-1], features), np.int64)
    for f in range(features):
        first = f // per_features * per_group
        for tap, weights in zip(taps, kernel.reshape(-1, per_group, features), strict=True):
            q = tap[..., first : first + per_group]
            term = abs(q - weights[:, f]) if operation.product == "adder" else q * weights[:, f]
            total[..., f] += term.sum(-1)
    if operation.center:
        total = features * total - total.sum(-1, keepdims=True)
    return total


def taps_of(x: Any, window: Any, operation: Any, dilation: Any, fill: Any) -> list[Any]:
    (top, bottom), (left, right) = operation.padding
    batch, height, width, channels = x.shape
    padded = np.empty((batch, height + top + bottom, width + left + right, channels), np.int64)
    padded[:] = fill
    padded[:, top : top + height, left : left + width] = x
    out = operation.output.shape
    (down, across), (gap, side_gap) = operation.strides, dilation
    return [
        padded[
            :,
            i * gap : i * gap + (out[0] - 1) * down + 1 : down,
            j * side_gap : j * side_gap + (out[1] - 1) * across + 1 : across,
        ]
        for i in range(window[0])
        for j in range(window[1])
    ]
