"""Weights and numbers in the order in which the assembly for Cortex-M reads them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jadder.integer.c import pack
from jadder.integer.c.choose import Choice, offset_starts
from jadder.integer.program import Activation, Convolution

Words = NDArray[np.uint32]


def in_order(operation: Convolution, pitch: int) -> bool:
    """Whether widened activations keep their order, since pixels are not of whole words."""
    return operation.product == "multiply" and pitch % 4 != 0


def run_words(operation: Convolution, pitch: int) -> tuple[int, ...]:
    """Words of each tap's run, and of how many runs: (runs in a row, words of a run)."""
    width, channels = operation.kernel.shape[1:3]
    touching = operation.kernel_dilation[1] == 1
    if operation.product == "adder":
        return (1, width * pitch // 4) if touching else (width, pitch // 4)
    if in_order(operation, pitch):
        last = channels
        return (1, -(-((width - 1) * pitch + last) // 2)) if touching else (width, -(-last // 2))
    return (1, width * pitch // 2) if touching else (width, pitch // 2)


def make(operation: Convolution, source: Activation, pitch: int, choice: Choice) -> Words:
    """The words of all tiles, one after another."""
    weights = _weights(operation, source, pitch)
    tiles = weights.shape[0]
    features = 4 * tiles
    each = choice.epilogue
    if each is None:
        return weights.reshape(-1)
    requantization = operation.requantization
    missing = features - len(requantization.multiplier)
    if each.offset_starts:
        offsets = offset_starts(operation, source)
        assert offsets is not None
        before = _words(np.array(offsets + [0] * missing)).reshape(tiles, 4)
        after = _words(np.pad(requantization.multiplier, (0, missing))).reshape(tiles, 4)
        return np.concatenate([before, weights, after], axis=1).reshape(-1)
    zero = operation.output.zero_point[0] << requantization.shift
    bias = np.concatenate([requantization.bias, np.full(missing, zero, np.int64)])
    numbers = np.empty((features, 3), np.uint32)
    numbers[:, 0] = _words(np.pad(requantization.multiplier, (0, missing)))
    numbers[:, 1] = (bias & 0xFFFFFFFF).astype(np.uint32)
    numbers[:, 2] = _words(bias >> 32)
    parts = [weights, numbers.reshape(tiles, 12)]
    if requantization.residuals:
        one = requantization.residuals[0]
        factor = one.multiplier if each.left_shift else one.multiplier << one.left_shift
        parts.insert(1, np.full((tiles, 1), factor & 0xFFFFFFFF, np.uint32))
    return np.concatenate(parts, axis=1).reshape(-1)


def _weights(operation: Convolution, source: Activation, pitch: int) -> Words:
    """(tiles, words · 4)."""
    kernel = operation.kernel
    height, width = kernel.shape[:2]
    if operation.product == "adder":
        padded = pack.with_pitch(kernel, pitch, source.zero_point[0])
        tiled = pack.tiled(pack.runs(padded, pitch, operation.kernel_dilation[1], 0), 4)
        return np.ascontiguousarray(tiled).view("<u4").reshape(tiled.shape[0], -1)
    if in_order(operation, pitch):
        runs = pack.runs(kernel, pitch, operation.kernel_dilation[1], 0)
    else:
        padded = pack.with_pitch(kernel, pitch, 0)
        fours = padded.reshape(height, width, pitch // 4, 4, -1)[:, :, :, [0, 2, 1, 3]]
        padded = fours.reshape(padded.shape)
        runs = pack.runs(padded, pitch, operation.kernel_dilation[1], 0)
    tiled = pack.tiled(runs.astype(np.int16), 2)
    return np.ascontiguousarray(tiled).view("<u4").reshape(tiled.shape[0], -1)


def _words(values: Any) -> Words:
    """32-bit integers of either sign as words."""
    return np.asarray(values, np.int64).astype(np.uint32)
