"""The shape of a ResNet-20 as an integer program, with random kernels."""

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


def resnet20(seed: int = 0) -> IntegerProgram:
    """Stem and classifier multiply, the rest adds; its bytes are as hard to compress as can be."""
    random = np.random.default_rng(seed)
    operations: list[Any] = []
    values = [Activation((32, 32, 3), (0.02, 0.02, 0.02), (125, 123, 114))]

    def requantization(channels: int, last: bool, residual: int | None) -> Requantization:
        low, high = (-(2**31), 2**31 - 1) if last else (0, 255)
        added = () if residual is None else (Residual(residual, 1 << 14, 4),)
        multiplier = random.integers(-(1 << 13), 1 << 13, channels).astype(np.int32)
        bias = random.integers(-(1 << 30), 1 << 30, channels)
        return Requantization(multiplier, bias, 20, low, high, added)

    def convolve(source: int, window: int, features: int, strides: int = 1, **options: Any) -> int:
        product = options.get("product", "adder")
        height, width, channels = values[source].shape
        shape = (height // strides, width // strides, features)
        last = options.get("last", False)
        output = Activation(shape, (0.1,), (0,), "int32" if last else "uint8")
        kernel_shape = (window, window, channels, features)
        kernel: Any = random.integers(0, 256, kernel_shape, np.uint8)
        kernel = kernel if product == "adder" else kernel.view(np.int8)
        side = window // 2
        high = side if strides == 1 else max(side - 1, 0)  # no more than the stride reaches
        padding = ((side, high), (side, high))
        each = requantization(features, last, options.get("residual"))
        operations.append(
            Convolution(source, product, kernel, each, output, (strides, strides), padding)
        )
        values.append(output)
        return len(operations)

    x = convolve(0, 3, 16, product="multiply")
    for stage in range(3):
        features = 16 << stage
        for block in range(3):
            strides = 2 if stage and not block else 1
            shortcut = convolve(x, 1, features, strides) if strides == 2 else x
            x = convolve(convolve(x, 3, features, strides), 3, features, residual=shortcut)
    output = Activation((1, 1, 64), (0.1,))
    operations.append(SumPool(x, (8, 8), requantization(64, False, None), output))
    values.append(output)
    convolve(len(operations), 1, 10, product="multiply", last=True)
    return IntegerProgram(values[0], tuple(operations))
