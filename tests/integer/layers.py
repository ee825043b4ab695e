"""Random chains of convolutions as fast kernels like them: a hypothesis strategy."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    Requantization,
    Rescale,
    Residual,
)


@st.composite
def chains(draw: st.DrawFn) -> IntegerProgram:
    """Convolutions whose results spread over their grids, with residuals, and bytes as output."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = st.integers(1, 9)
    channels = draw(st.sampled_from([1, 3, 4, 5, 8, 16]))
    per_channel = draw(st.booleans())
    zeros = tuple(int(z) for z in random.integers(0, 256, channels if per_channel else 1))
    image = Activation((draw(sizes), draw(sizes), channels), (1.0,) * len(zeros), zeros)
    values: list[Activation] = [image]
    operations: list[Any] = []
    for _ in range(draw(st.integers(1, 4))):
        operations.append(_convolution(draw, random, values))
        values.append(operations[-1].output)
    last = values[-1].shape
    identity = Requantization(
        np.ones(last[2], np.int32), np.zeros(last[2], np.int64), 0, -(2**31), 2**31 - 1
    )
    output = Activation(last, (1.0,), dtype="int32")
    return IntegerProgram(image, (*operations, Rescale(len(values) - 1, identity, output)))


def _convolution(draw: st.DrawFn, random: Any, values: list[Activation]) -> Convolution:
    index = draw(st.integers(max(0, len(values) - 2), len(values) - 1))
    source = values[index]
    product: Any = draw(st.sampled_from(["adder", "multiply"]))
    height, width, channels = source.shape
    features = draw(st.sampled_from([4, 4, 8, 8, 12, 16, 24, 80, 5, channels]))
    # 5 x 5 x 80 and more is 500 words: loops within loops.
    window = tuple(draw(st.sampled_from([1, 1, 3, 3, 5])) for _ in range(2))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 3)]))
    side = [(w - 1) * d // 2 for w, d in zip(window, dilation, strict=True)]
    padding = ((side[0], side[0]), (side[1], side[1]))
    strides = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    shape = (-(-height // strides[0]), -(-width // strides[1]), features)
    kernel_shape = (*window, channels, features)
    terms = window[0] * window[1] * channels
    if product == "adder":
        kernel = random.integers(0, 256, kernel_shape, np.uint8)
        mean, deviation = 85 * terms, 60 * terms**0.5
    else:
        kernel = random.integers(-128, 128, kernel_shape).astype(np.int8)
        mean, deviation = 0, 75 * 128 * terms**0.5
    requantization = _requantization(draw, random, values, shape, mean, deviation)
    low, high = requantization.low, requantization.high
    zero = draw(st.sampled_from([low, low, high, 0, 255]))
    output = Activation(shape, (1.0,), (zero,))
    return Convolution(
        index, product, kernel, requantization, output, strides, padding, dilation
    )  # fmt: skip


def _requantization(
    draw: st.DrawFn,
    random: Any,
    values: list[Activation],
    shape: Any,
    mean: float,
    deviation: float,
) -> Requantization:
    features = shape[2]
    shift = draw(st.sampled_from([32, 32, 32, 35, 24, 16]))
    sign = random.choice([-1, 1], features)
    wanted = np.rint(sign * 2.0**shift * 50 / deviation * random.uniform(0.5, 2, features))
    most = draw(st.sampled_from([2**31 - 1, 2**31 - 1, 2**24]))
    multiplier = np.where(wanted == 0, 1, np.clip(wanted, -most, most)).astype(np.int64)
    if draw(st.booleans()):  # in whole units of the sums
        offset = np.rint(-mean + random.uniform(-1, 1, features) * deviation).astype(np.int64)
        bias = offset * multiplier + (1 << shift >> 1)
    else:
        centre = random.uniform(0, 255, features) * 2.0**shift
        bias = np.rint(centre - multiplier * mean).astype(np.int64)
    fitting = [i for i, value in enumerate(values) if value.shape == shape]
    residuals = []
    for index in fitting[-2:]:
        if draw(st.integers(0, 3)):
            ratio = draw(st.sampled_from([0.3, 0.9, -0.4, 1.7, 3.2]))
            left_shift = draw(st.sampled_from([0, 1, 4, 8]))
            wanted_multiplier = round(ratio * 2.0 ** (shift - left_shift))
            bounded = max(-(2**31) + 1, min(2**31 - 1, wanted_multiplier))
            residuals.append(Residual(index, bounded, left_shift))
    low, high = draw(st.sampled_from([(0, 255), (0, 255), (0, 15), (30, 255), (7, 100), (0, 0)]))
    return Requantization(
        multiplier.astype(np.int32), bias, shift, low, high,
        tuple(residuals[: draw(st.sampled_from([1, 1, 1, 2]))]),
    )  # fmt: skip
