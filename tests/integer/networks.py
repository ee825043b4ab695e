"""Programs in the shape of well-known networks, with random numbers in them."""

import dataclasses
from typing import Any

import numpy as np

from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Requantization,
    Residual,
    SumPool,
)
from jadder.integer.program import Operation, Product, sum_bounds


def resnet20(product: Product = "adder", seed: int = 0) -> IntegerProgram:
    """ResNet-20 for images of 32 × 32."""
    network = _Network((32, 32, 3), seed)
    network.convolve("multiply", 16, 3)
    for features in (16, 32, 64):
        for block in range(3):
            network.block(product, features, 2 if block == 0 and features > 16 else 1)
    return network.classify(10)


def resnet18(product: Product = "adder", seed: int = 0) -> IntegerProgram:
    """ResNet-18 for images of 224 × 224."""
    network = _Network((224, 224, 3), seed)
    network.convolve("multiply", 64, 7, stride=2)
    network.max_pool()
    for features in (64, 128, 256, 512):
        for block in range(2):
            network.block(product, features, 2 if block == 0 and features > 64 else 1)
    return network.classify(1000)


class _Network:
    """A program so far. Multipliers spread the sums over the results' grids."""

    def __init__(self, shape: tuple[int, int, int], seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.input = Activation(shape, (1 / 64,) * shape[2], (120, 118, 110))
        self.operations: list[Operation] = []

    @property
    def values(self) -> list[Activation]:
        return [self.input, *(operation.output for operation in self.operations)]

    def convolve(
        self,
        product: Product,
        features: int,
        window: int,
        stride: int = 1,
        source: int | None = None,
        residual: int | None = None,
    ) -> int:
        index = len(self.operations) if source is None else source
        height, width, channels = self.values[index].shape
        shape = (-(-height // stride), -(-width // stride), features)
        kernel_shape = (window, window, channels, features)
        if product == "adder":
            kernel: Any = self.random.integers(0, 120, kernel_shape, np.uint8)
        else:
            kernel = self.random.integers(-128, 128, kernel_shape, np.int8)
        low = (window - 1) // 2
        padding = ((low, window - 1 - low),) * 2
        operation = Convolution(
            index, product, kernel, _unset(features), Activation(shape, (1 / 32,)),
            (stride, stride), padding,
        )  # fmt: skip
        residuals = () if residual is None else (Residual(residual, 1 << 19),)
        return self.add(operation, residuals)

    def add(self, operation: Any, residuals: tuple[Residual, ...] = ()) -> int:
        low, high = sum_bounds(operation, self.values[operation.input])
        channels = operation.output.shape[2]
        shift = 20
        multiplier = 200 * 2.0**shift / (high - low) * self.random.uniform(0.5, 2, channels)
        if isinstance(operation, Convolution) and operation.product == "adder":
            multiplier *= -4
        multiplier = np.rint(multiplier).astype(np.int32)
        bias = -(multiplier.astype(np.int64) * (low + high)) // 2 + (60 << shift)
        requantization = Requantization(multiplier, bias, shift, residuals=residuals)
        self.operations.append(dataclasses.replace(operation, requantization=requantization))
        return len(self.operations)

    def block(self, product: Product, features: int, stride: int) -> None:
        begin = len(self.operations)
        shortcut = begin
        if stride > 1:
            shortcut = self.convolve(product, features, 1, stride)
        inner = self.convolve(product, features, 3, stride, source=begin)
        self.convolve(product, features, 3, source=inner, residual=shortcut)

    def max_pool(self) -> None:
        source = self.values[-1]
        height, width, channels = source.shape
        output = dataclasses.replace(source, shape=(height // 2, width // 2, channels))
        self.operations.append(
            MaxPool(len(self.operations), (3, 3), output, (2, 2), ((1, 1), (1, 1)))
        )

    def classify(self, classes: int) -> IntegerProgram:
        height, width, channels = self.values[-1].shape
        output = Activation((1, 1, channels), (1 / 64,))
        self.add(SumPool(len(self.operations), (height, width), _unset(channels), output))
        self.convolve("multiply", classes, 1)
        last = self.operations[-1]
        assert isinstance(last, Convolution)
        wide = dataclasses.replace(
            last.requantization, bias=0 * last.requantization.bias, shift=8,
            low=-(2**31), high=2**31 - 1,
        )  # fmt: skip
        output = Activation((1, 1, classes), (1 / 256,), (0,), "int32")
        self.operations[-1] = dataclasses.replace(last, requantization=wide, output=output)
        return IntegerProgram(self.input, tuple(self.operations))


def _unset(channels: int) -> Requantization:
    return Requantization(np.zeros(channels, np.int32), np.zeros(channels, np.int64), 0)
