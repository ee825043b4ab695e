"""Programs of the shape of published networks, with random weights."""

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


def resnet(
    blocks: int, product: Any = "adder", seed: int = 0, offsets: bool = True
) -> IntegerProgram:
    """A CIFAR ResNet of 3 stages: ``blocks`` 1 is MLPerf Tiny's ResNet-8, 3 is ResNet-20.

    The stem and the classifier multiply. Multipliers are such that activations fill their grids;
    ``offsets``: whether biases are whole numbers of the sums' units beside half a unit.
    """
    random = np.random.default_rng(seed)
    build = _Builder(random, Activation((32, 32, 3), (1.0,) * 3, (125, 123, 114)), offsets)
    x = build.convolution(0, "multiply", 16, 3, 1)
    for stage in range(3):
        for block in range(blocks):
            features, strides = 16 << stage, 2 if stage and not block else 1
            y = build.convolution(x, product, features, 3, strides)
            added = (
                x if strides == 1 else build.convolution(x, product, features, 1, strides, low=0)
            )
            x = build.convolution(y, product, features, 3, 1, residual=added)
    pooled = build.mean(x)
    build.convolution(pooled, "multiply", 10, 1, 1, last=True)
    return IntegerProgram(build.values[0], tuple(build.operations))


class _Builder:
    def __init__(self, random: Any, image: Activation, offsets: bool) -> None:
        self.random, self.offsets = random, offsets
        self.values = [image]
        self.operations: list[Any] = []

    def _add(self, operation: Any) -> int:
        self.operations.append(operation)
        self.values.append(operation.output)
        return len(self.operations)

    def convolution(
        self, index: int, product: Any, features: int, window: int, strides: int,
        residual: int | None = None, low: int = 0, last: bool = False,
    ) -> int:  # fmt: skip
        source = self.values[index]
        height, width, channels = source.shape
        shape = (window, window, channels, features)
        terms = window * window * channels
        if product == "adder":
            kernel = self.random.integers(0, 256, shape, np.uint8)
            mean, deviation = 85 * terms, 60 * terms**0.5
        else:
            kernel = self.random.integers(-127, 128, shape).astype(np.int8)
            mean, deviation = 0, 75 * 128 * terms**0.5
        scale = 2.0**32 * 50 / deviation * self.random.uniform(0.5, 2, features)
        sign = -1 if product == "adder" else 1
        multiplier = np.rint(sign * scale).astype(np.int64)
        centre = np.rint(self.random.uniform(-0.5, 1, features) * deviation).astype(np.int64)
        offset = -mean + sign * centre
        bias = offset * multiplier + (1 << 31)
        if not self.offsets:
            bias += self.random.integers(-(1 << 20), 1 << 20, features)
        residuals = () if residual is None else (Residual(residual, int(0.8 * 2**32) >> 4, 4),)
        out = (-(-height // strides), -(-width // strides), features)
        if last:
            each = Requantization(
                multiplier.astype(np.int32), bias, 24, -(2**31), 2**31 - 1, residuals
            )
            output = Activation(out, (0.1,), dtype="int32")
        else:
            each = Requantization(multiplier.astype(np.int32), bias, 32, low, 255, residuals)
            output = Activation(out, (0.1,))
        side = (window - 1) // 2
        padding = ((side, side), (side, side))
        return self._add(
            Convolution(index, product, kernel, each, output, (strides, strides), padding)
        )

    def mean(self, index: int) -> int:
        height, width, channels = self.values[index].shape
        multiplier = np.full(channels, (1 << 32) // (height * width), np.int32)
        bias = np.full(channels, 1 << 31, np.int64)
        each = Requantization(multiplier, bias, 32)
        return self._add(
            SumPool(index, (height, width), each, Activation((1, 1, channels), (0.1,)))
        )
