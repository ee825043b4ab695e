"""Programs of the shape of published networks, with random weights."""

import functools
from typing import Any

import numpy as np

from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    Requantization,
    Residual,
    SumPool,
)
from tests.integer import oracle


@functools.cache
def resnet(blocks: int, product: Any = "adder", seed: int = 0) -> IntegerProgram:
    """A CIFAR ResNet of 3 stages: ``blocks`` 1 is MLPerf Tiny's ResNet-8, 3 is ResNet-20.

    The stem and the classifier multiply. Multipliers and biases are such that activations fill
    their grids, as they do in a trained network.
    """
    random = np.random.default_rng(seed)
    build = _Builder(random, Activation((32, 32, 3), (1.0,) * 3, (125, 123, 114)))
    x = build.convolution(0, "multiply", 16, 3, 1)
    for stage in range(3):
        for block in range(blocks):
            features, strides = 16 << stage, 2 if stage and not block else 1
            y = build.convolution(x, product, features, 3, strides)
            added = x if strides == 1 else build.convolution(x, product, features, 1, strides)
            x = build.convolution(y, product, features, 3, 1, residual=added)
    build.convolution(build.mean(x), "multiply", 10, 1, 1, last=True)
    return IntegerProgram(build.values[0], tuple(build.operations))


class _Builder:
    """Adds one operation after the other, and runs each on two random images."""

    def __init__(self, random: Any, image: Activation) -> None:
        self.random = random
        self.values = [image]
        self.operations: list[Any] = []
        self.sample = [random.integers(0, 256, (2, *image.shape))]

    def convolution(
        self, index: int, product: Any, features: int, window: int, strides: int,
        residual: int | None = None, last: bool = False,
    ) -> int:  # fmt: skip
        source = self.values[index]
        height, width, channels = source.shape
        shape = (window, window, channels, features)
        if product == "adder":
            kernel = self.random.integers(0, 256, shape, np.uint8)
        else:
            kernel = self.random.integers(-127, 128, shape).astype(np.int8)
        out = (-(-height // strides), -(-width // strides), features)
        output = Activation(out, (0.1,), (0,), "int32" if last else "uint8")
        side = (window - 1) // 2
        padding = ((side, side), (side, side))
        bare = Requantization(np.ones(features, np.int32), np.zeros(features, np.int64), 0)
        bare_operation = Convolution(
            index, product, kernel, bare, output, (strides, strides), padding
        )
        zero = np.broadcast_to(source.zero_point, channels)
        sums = oracle.convolve(bare_operation, self.sample[index], zero)
        mean = sums.mean((0, 1, 2))
        deviation = np.maximum(sums.std((0, 1, 2)), sums.std() / 4)
        shift = 24 if last else 32
        sign = -1 if product == "adder" else 1
        scale = 2.0**shift * (1000 if last else 60) / deviation
        multiplier = np.rint(sign * scale * self.random.uniform(0.5, 1.5, features))
        multiplier = np.clip(multiplier, -(2**31) + 1, 2**31 - 1)
        centre = self.random.uniform(-1, 1, features) * deviation
        offset = np.rint(centre - mean).astype(np.int64)
        bias = offset * multiplier.astype(np.int64) + (1 << shift >> 1)
        added = () if residual is None else (Residual(residual, int(0.7 * 2**32) >> 4, 4),)
        low, high = (-(2**31), 2**31 - 1) if last else (0, 255)
        each = Requantization(multiplier.astype(np.int32), bias, shift, low, high, added)
        return self._add(
            Convolution(index, product, kernel, each, output, (strides, strides), padding), sums
        )

    def mean(self, index: int) -> int:
        height, width, channels = self.values[index].shape
        multiplier = np.full(channels, (1 << 32) // (height * width), np.int32)
        each = Requantization(multiplier, np.full(channels, 1 << 31, np.int64), 32)
        output = Activation((1, 1, channels), (0.1,))
        pool = SumPool(index, (height, width), each, output)
        return self._add(pool, self.sample[index].sum((1, 2), keepdims=True))

    def _add(self, operation: Any, sums: Any) -> int:
        each = operation.requantization
        value = sums * each.multiplier.astype(np.int64) + each.bias
        for added in each.residuals:
            value = value + self.sample[added.value] * (added.multiplier << added.left_shift)
        self.sample.append(np.clip(value >> each.shift, each.low, each.high))
        self.operations.append(operation)
        self.values.append(operation.output)
        return len(self.operations)
