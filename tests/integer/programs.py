"""Random integer programs: a hypothesis strategy of every operation in every shape."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Requantization,
    Rescale,
    Reshape,
    Residual,
    SumPool,
)


@st.composite
def programs(draw: st.DrawFn, most_operations: int = 5) -> IntegerProgram:
    """A program of some operations and a last one that gives int32."""
    shape = tuple(draw(st.integers(1, n)) for n in (9, 9, 10))
    maximum = draw(st.sampled_from([255, 255, 15, 3]))
    per_channel = draw(st.booleans())
    zero = st.integers(0, maximum)
    zero_point = tuple(draw(zero) for _ in range(shape[2] if per_channel else 1))
    values = [Activation(shape, (1.0,) * len(zero_point), zero_point, maximum=maximum)]
    operations: list[Any] = []
    for _ in range(draw(st.integers(0, most_operations - 1))):
        operation = draw(_operations(values, last=False))
        operations.append(operation)
        values.append(operation.output)
    operations.append(draw(_operations(values, last=True)))
    return IntegerProgram(values[0], tuple(operations))


def images(program: IntegerProgram, count: int, seed: int) -> Any:
    """Random images of a program, with the ends of its range among them."""
    random = np.random.default_rng(seed)
    q = random.integers(0, program.input.maximum + 1, (count, *program.input.shape), np.uint8)
    ends = random.random(q.shape)
    q[ends < 0.1] = 0
    q[ends > 0.9] = program.input.maximum
    return q


@st.composite
def _operations(draw: st.DrawFn, values: list[Activation], *, last: bool) -> Any:
    index = draw(st.integers(max(0, len(values) - 3), len(values) - 1))
    source = values[index]
    same_grid = ["max", "reshape"] if not last and len(source.zero_point) == 1 else []
    kind = draw(st.sampled_from(["adder", "adder", "multiply", "sum", "rescale", *same_grid]))
    if kind == "reshape":
        shape = draw(st.sampled_from([(1, 1, source.size), source.shape[::-1]]))
        return Reshape(index, Activation(shape, *_grid(source)))
    if kind == "rescale":
        return Rescale(index, *draw(_requantized(source.shape, 255, values, last=last)))
    window = tuple(draw(st.integers(1, min(4, size))) for size in source.shape[:2])
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    sides = [st.integers(0, n - 1) for n in window] if kind == "max" else [st.integers(0, 3)] * 2
    padding = tuple(draw(st.tuples(side, side)) for side in sides)
    if kind == "max":
        shape = _shape(source, window, strides, padding, (1, 1), source.shape[2])
        return MaxPool(index, window, Activation(shape, *_grid(source)), strides, padding)
    if kind == "sum":
        shape = _shape(source, window, strides, padding, (1, 1), source.shape[2])
        most = window[0] * window[1] * 255
        result = draw(_requantized(shape, most, values, last=last))
        return SumPool(index, window, *result, strides, padding)
    return draw(_convolutions(index, kind, values, window, strides, padding, last=last))


@st.composite
def _convolutions(
    draw: st.DrawFn,
    index: int,
    product: Any,
    values: list[Activation],
    window: Any,
    strides: Any,
    padding: Any,
    *,
    last: bool,
) -> Convolution:
    source = values[index]
    channels = source.shape[2]
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, channels) if channels % g == 0]))
    features = groups * draw(st.integers(1, 40 if groups == 1 else 5))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 3)]))
    spans = [(n - 1) * d + 1 for n, d in zip(window, dilation, strict=True)]
    fits = all(size >= span for size, span in zip(source.shape[:2], spans, strict=True))
    dilation = dilation if fits else (1, 1)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kernel_shape = (*window, channels // groups, features)
    if product == "adder":
        kernel = random.integers(0, source.maximum + 1, kernel_shape, np.uint8)
    else:
        kernel = random.integers(-128, 128, kernel_shape, np.int8)
    center = draw(st.booleans()) and features > 1
    shape = _shape(source, window, strides, padding, dilation, features)
    most = int(np.prod(kernel_shape[:3])) * 255 * (1 if product == "adder" else 60)
    most *= features if center else 1
    result = draw(_requantized(shape, most, values, last=last))
    return Convolution(
        index, product, kernel, *result, strides, padding, dilation, groups, center
    )  # fmt: skip


@st.composite
def _requantized(
    draw: st.DrawFn, shape: Any, most: int, values: list[Activation], *, last: bool
) -> tuple[Requantization, Activation]:
    """Multipliers that spread the sums over the output, or are extreme."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels = shape[2]
    maximum = draw(st.sampled_from([255, 255, 15, 3]))
    shift = draw(st.sampled_from([0, 8, 24, 32, 32, 40]))
    if draw(st.integers(0, 4)) == 0:  # whatever an int32 holds
        multiplier = random.integers(-(2**31) + 1, 2**31, channels)
        bias = random.integers(-(2**60), 2**60, channels)
    else:
        wanted = (maximum * 2.0**shift / max(most, 1)) * random.uniform(0.1, 8, channels)
        multiplier = np.clip(
            np.rint(wanted) * random.choice([-1, 1], channels), -(2**31) + 1, 2**31 - 1
        )
        centre = random.uniform(-0.5, 1.5, channels) * maximum * 2.0**shift
        bias = np.clip(centre - multiplier * most * 0.5, -(2.0**60), 2.0**60)
    residuals = []
    for index, value in enumerate(values):
        if value.shape == shape and len(residuals) < 2 and draw(st.booleans()):
            size = draw(st.sampled_from([1, 2**10, 2**20, 2**30]))
            multiplied = draw(st.integers(-size, size))
            residuals.append(Residual(index, multiplied, draw(st.sampled_from([0, 0, 5, 22]))))
    low, high = (-(2**31), 2**31 - 1) if last else sorted(draw(st.sampled_from(
        [(0, maximum), (0, maximum), (maximum // 3, maximum), (0, maximum // 2)])))  # fmt: skip
    requantization = Requantization(
        multiplier.astype(np.int32), bias.astype(np.int64), shift, low, high, tuple(residuals)
    )
    if last:
        return requantization, Activation(shape, (0.5,), (0,), "int32")
    zero_point = draw(st.sampled_from([0, 0, maximum, maximum // 2]))
    return requantization, Activation(shape, (0.5,), (zero_point,), maximum=maximum)


def _grid(source: Activation) -> Any:
    return source.scale, source.zero_point, "uint8", source.maximum


def _shape(
    source: Activation, window: Any, strides: Any, padding: Any, dilation: Any, features: int
) -> Any:
    sizes = [
        (source.shape[d] + sum(padding[d]) - (window[d] - 1) * dilation[d] - 1) // strides[d] + 1
        for d in (0, 1)
    ]
    return (*sizes, features)
