"""From a trained network to an `IntegerProgram`, by way of its graph and some images.

For a distance, |x - w| = |x - clip(w, 0, r)| + |w - clip(w, 0, r)| wherever x lies in [0, r]: the
kernel may be clipped to its input's range, and both share one grid. What the clipping and
the rounding take away moves each feature's sums by a constant and a factor, which are fitted, layer
after layer on inputs that are integers already, so that each feature has the mean and deviation
that it has in floats.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from jadder.integer import xla
from jadder.integer.calibrate import CHUNK, Moments, Statistics, symmetric
from jadder.integer.expressions import Expression, count_uses, expression, has_own_grid
from jadder.integer.graph import Flatten, Image, Node, Pool, Round, topological
from jadder.integer.grid import Grid
from jadder.integer.hybrid import quantize_products
from jadder.integer.pixels import PerChannel, Pixels
from jadder.integer.program import (
    INT32,
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Operation,
    Requantization,
    Rescale,
    Reshape,
    Residual,
    SumPool,
    sum_bounds,
)
from jadder.integer.trace import trace

_BYTE = 255
_OUTPUT_FACTOR = 0.25
"""Steps of the output's grid for each step of its sums."""
_DEVIATIONS = 4
_NARROW_ERROR = 1 / 32
"""Levels by which a result may be wrong because multipliers are short, so many deviations off."""
_FINE = 1 / 16
"""Levels of a result that one unit of its sums may be, for a bias to be a number of units."""


def quantize(
    model: nnx.Module | Callable[[Any], Any],
    images: ArrayLike,
    *,
    bits: int = 8,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    residual_bits: int = 8,
    hybrid: bool = False,
) -> Any:
    """An `IntegerProgram` that computes what a trained network computes, in bytes.

    Nothing is trained. What the network computes is found by tracing it in evaluation mode:
    products (adder and multiplying), batch norms, ReLU and other clipping, sums, pooling and
    flattening have an integer form, in networks of the library and of one's own.

    Args:
      model: the network, from images (batch, height, width, channels) to logits. A module is taken
        in evaluation mode; it is not changed.
      images: some hundred training images, to calibrate with: uint8 pixels, with ``mean`` and
        ``std``, or the floats that the network takes. The program takes the same kind.
      bits: of the operands of products, 2 to 8. Products that read the image or give the
        output take 8, if they multiply.
      mean, std: for pixels: the network was trained on (pixels / 255 - mean) / std, each a number
        or one for each channel.
      residual_bits: of activations that are added or pooled, 2 to 8.
      hybrid: whether parts without an integer form, and all else but the adder products, stay in
        floats.

    Returns:
      An `IntegerProgram`, or a `HybridProgram` with ``hybrid``.

    Raises:
      ValueError: a part of the network that has no integer form (it is named, with its place), bits
        or images out of range.
      TypeError: images of another dtype, or pixels without mean and std.

    Example:
      >>> import jadder, numpy as np
      >>> from flax import nnx
      >>> model = jadder.models.create("lenet5", image_size=12, channels=1, rngs=nnx.Rngs(0))
      >>> pixels = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 1), np.uint8)
      >>> program = jadder.quantize(model, pixels, mean=0.5, std=0.25)
      >>> program(pixels).shape
      (64, 10)
    """
    for name, value in (("bits", bits), ("residual_bits", residual_bits)):
        if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
            raise ValueError(f"quantize: {name} must be an integer from 2 to 8, got {value!r}")
    source = Pixels.of("quantize", images, mean, std)
    function = in_evaluation(model)
    if hybrid:
        return quantize_products(function, source, bits)
    output = trace(function, source.shape)
    return _Quantizer(output, source, bits, residual_bits).program()


def in_evaluation(model: nnx.Module | Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function that a module computes in evaluation mode; any other function as it is."""
    if not isinstance(model, nnx.Module):
        return model
    model = nnx.clone(model)
    model.eval()
    structure, state = nnx.split(model)
    return lambda images: nnx.merge(structure, state)(images)


class _Quantizer:
    """Turns a graph into operations, one after the other, running each on the images."""

    def __init__(self, output: Node, source: Pixels, bits: int, residual_bits: int) -> None:
        self.output = output
        self.source = source
        self.levels = 2**bits - 1
        self.residual_levels = 2**residual_bits - 1
        self.order = topological(output)
        self.uses = count_uses(self.order)
        self.expression = functools.cache(lambda node: expression(node, self.uses))
        self.wanted: dict[Node, set[int]] = {}  # levels in which each activation is needed
        self._want(output, _BYTE)
        measured = [self.expression(n).leaf for n in self.wanted if self._is_computed(n)]
        measured += [n for n in self.wanted if self._is_computed(n)]
        self.statistics = Statistics.of(self.order, source.floats(), dict.fromkeys(measured))
        image, self.image_zero = source.activation()
        self.values = [image]
        self.operations: list[Operation] = []
        self.done: dict[tuple[Node, int], int] = {}
        self.integers = [self._integer_images(image)]

    def program(self) -> IntegerProgram:
        self._emit_output()
        return IntegerProgram(
            self.values[0], tuple(self.operations), float_input=self.source.mean is None
        )

    def _integer_images(self, image: Activation) -> Any:
        if self.source.mean is not None:
            return self.source.images
        grid = Grid(image.scale[0], image.zero_point[0], image.maximum)
        return grid.to_integers(self.source.images).astype(np.uint8)

    @staticmethod
    def _is_computed(node: Node) -> bool:
        return has_own_grid(node) and not isinstance(node, Image)

    # -- What is needed ----------------------------------------------------------------------------

    def _want(self, node: Node, levels: int) -> None:
        wanted = self.wanted.setdefault(node, set())
        if levels in wanted:
            return
        wanted.add(levels)
        if isinstance(node, Image):
            return
        if not has_own_grid(node):
            return self._want(node.inputs[0], levels)
        whole = self.expression(node)
        product = whole.product
        operand = whole.leaf if product is None else product.inputs[0]
        if isinstance(whole.leaf, Pool) and not whole.leaf.maximum:
            operand = whole.leaf.inputs[0]
        self._want(operand, self._operand_levels(node, whole))
        for residual, _ in whole.residuals:
            self._want(residual, self.residual_levels)

    def _operand_levels(self, node: Node, whole: Expression) -> int:
        product = whole.product
        if product is None:
            return self.residual_levels
        operand = product.inputs[0]
        if isinstance(operand, Round):
            return operand.grid.maximum
        ends = node is self.output or isinstance(operand, Image)
        return _BYTE if ends and product.product == "multiply" else self.levels

    # -- Activations -------------------------------------------------------------------------------

    def _activation(self, node: Node, levels: int) -> int:
        """The index of a node's value on a grid of ``levels + 1`` steps."""
        index = self.done.get((node, levels))
        if index is None:
            index = self.done[node, levels] = self._emit(node, levels)
        return index

    def _emit(self, node: Node, levels: int) -> int:
        if isinstance(node, Image):
            return 0 if levels == _BYTE else self._emit_rescaled(node, 0, levels)
        if isinstance(node, Flatten):
            index = self._scalar_grid(node.inputs[0], self._activation(node.inputs[0], levels))
            return self._append(Reshape(index, self._like(index, node)))
        if isinstance(node, Pool) and node.maximum:
            index = self._scalar_grid(node.inputs[0], self._activation(node.inputs[0], levels))
            geometry = node.strides, node.padding
            return self._append(MaxPool(index, node.window, self._like(index, node), *geometry))
        most = max(self.wanted[node])
        if levels < most and not isinstance(node, Round):
            return self._emit_rescaled(node, self._activation(node, most), levels)
        if isinstance(node, Round):
            grid = node.grid
        else:
            grid = Grid.fitted(self.statistics.samples[node], levels)
        return self._emit_expression(node, self._result(node, grid))

    def _scalar_grid(self, node: Node, index: int) -> int:
        """The image on one grid for all channels, where it has one for each."""
        if len(self.values[index].scale) == 1:
            return index
        key = (node, -1)
        if key not in self.done:
            self.done[key] = self._emit_rescaled(node, index, _BYTE)
        return self.done[key]

    def _emit_rescaled(self, node: Node, index: int, levels: int) -> int:
        sample = self.statistics.samples.get(node)
        if sample is None:
            sample = self.source.floats().reshape(-1)
        output = self._result(node, Grid.fitted(sample, levels))
        source, zero = self.values[index], self._zero(index)
        scale = np.broadcast_to(np.asarray(source.scale), output.shape[2:])
        return self._append(
            Rescale(index, _requantization(scale, -scale * zero, [], output), output)
        )

    def _zero(self, index: int) -> Any:
        return self.image_zero if index == 0 else self.values[index].zero_point[0]

    def _like(self, index: int, node: Node) -> Activation:
        return dataclasses.replace(self.values[index], shape=node.shape)

    @staticmethod
    def _result(node: Node, grid: Grid) -> Activation:
        zero = (grid.zero_point,)
        return Activation(node.shape, (grid.scale,), zero, maximum=grid.maximum)

    # -- Operations --------------------------------------------------------------------------------

    def _emit_expression(self, node: Node, output: Activation | None) -> int:
        """The operation of a node; without ``output`` the program's last one."""
        whole = self.expression(node)
        levels = self._operand_levels(node, whole)
        added = []
        for residual, factor in whole.residuals:
            index = self._scalar_grid(residual, self._activation(residual, self.residual_levels))
            added.append((index, factor * self.values[index].scale[0], self._zero(index)))
        operation, scale, offset, sums = self._sum_operation(whole, levels)
        reach = sum_bounds(operation, self.values[operation.input])
        if output is None:
            step = float(np.abs(scale).max()) / _OUTPUT_FACTOR
            output = Activation(node.shape, (step or 1.0,), (0,), "int32")
        requantization = _requantization(
            scale, offset, added, output, low=whole.low, high=whole.high, sums=sums, reach=reach,
            residual_levels=[self.values[index].maximum for index, _, _ in added],
        )  # fmt: skip
        operation = dataclasses.replace(operation, requantization=requantization, output=output)
        return self._append(operation)

    def _sum_operation(self, whole: Expression, levels: int) -> tuple[Any, Any, Any, Any]:
        """An operation without its requantization; real scale and offset of S; moments of S."""
        leaf, product = whole.leaf, whole.product
        nothing: Any = None
        if product is not None:
            return self._product_operation(whole, levels)
        if isinstance(leaf, Pool) and not leaf.maximum:
            index = self._scalar_grid(
                leaf.inputs[0], self._activation(leaf.inputs[0], self.residual_levels)
            )
            step, zero = self.values[index].scale, self._zero(index)
            operation: Any = SumPool(
                index, leaf.window, nothing, nothing, leaf.strides, leaf.padding
            )
            zero *= math.prod(leaf.window)
        else:
            index = self._activation(leaf, levels)
            operation = Rescale(index, nothing, nothing)
            step, zero = self.values[index].scale, self._zero(index)
        scale = np.broadcast_to(whole.scale * np.asarray(step), whole.scale.shape)
        return operation, scale, whole.offset - scale * zero, None

    def _product_operation(self, whole: Expression, levels: int) -> tuple[Any, Any, Any, Any]:
        product = whole.product
        assert product is not None
        index = self._activation(product.inputs[0], levels)
        adder = product.product == "adder"
        if adder:
            index = self._scalar_grid(product.inputs[0], index)
        source = self.values[index]
        if adder:
            grid = Grid(source.scale[0], source.zero_point[0], source.maximum)
            kernel = grid.to_integers(product.kernel).astype(np.uint8)
        else:
            widened = np.asarray(source.scale)[..., None] * product.kernel.astype(np.float64)
            kernel, _ = symmetric(widened, min(127, (source.maximum + 1) // 2 - 1))
        nothing: Any = None
        operation = Convolution(
            index, product.product, kernel, nothing, nothing, product.strides, product.padding,
            product.kernel_dilation, product.feature_group_count, whole.centered,
        )  # fmt: skip
        sums = Moments.pooled([Moments.of(each) for each in self._sums(operation)])
        floats = self.statistics.moments[whole.leaf]
        ratio = floats.deviation / np.where(sums.variance > 0, sums.deviation, np.inf)
        scale = whole.scale * ratio * (-1 if adder else 1)
        offset = whole.scale * floats.mean + whole.offset - scale * sums.mean
        return operation, scale, offset, sums

    def _emit_output(self) -> None:
        if has_own_grid(self.output) and not isinstance(self.output, Image | Round):
            self._emit_expression(self.output, None)
            return
        index = self._scalar_grid(self.output, self._activation(self.output, _BYTE))
        source = self.values[index]
        output = Activation(self.output.shape, (source.scale[0] / _OUTPUT_FACTOR,), (0,), "int32")
        scale = np.full(output.shape[2], source.scale[0])
        requantization = _requantization(scale, -scale * self._zero(index), [], output)
        self._append(Rescale(index, requantization, output))

    # -- Running -----------------------------------------------------------------------------------

    def _append(self, operation: Operation) -> int:
        self.operations.append(operation)
        self.values.append(operation.output)
        self.integers.append(self._run(operation))
        return len(self.values) - 1

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.source.images), CHUNK):
            yield slice(start, start + CHUNK)

    def _sums(self, operation: Any) -> Iterator[Any]:
        source = self.values[operation.input]
        for chunk in self._chunks():
            yield xla.sums(operation, source, jnp.asarray(self.integers[operation.input][chunk]))

    def _run(self, operation: Operation) -> Any:
        results = []
        source = self.values[operation.input]
        for chunk in self._chunks():
            values = [jnp.asarray(each[chunk]) for each in self.integers]
            results.append(np.asarray(xla.result(operation, source, values)))
        return np.concatenate(results)


def _requantization(
    scale: Any,
    offset: Any,
    residuals: list[tuple[int, float, Any]],
    output: Activation,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    sums: Moments | None = None,
    reach: tuple[int, int] = (0, 0),
    residual_levels: Sequence[int] = (),
) -> Requantization:
    """In integers: clip(scale · S + offset + Σ factor · (q - zero), low, high).

    The multiplier's rounding is made good at the mean of ``sums``, about which S varies between
    the ends of ``reach``. Where a unit of S is a small part of a result, the bias is half a result
    and a whole number of units: some processors add those before they multiply.
    """
    step, zero = output.scale[0], output.zero_point[0]
    factors = [factor / step for _, factor, _ in residuals]
    real = scale / step
    constant = offset / step + zero + 0.5
    for factor, (_, _, added_zero) in zip(factors, residuals, strict=True):
        constant = constant - factor * added_zero
    shift = _shift(real)
    if sums is not None and output.dtype == "uint8":
        added = [factor * most for factor, most in zip(factors, residual_levels, strict=True)]
        shift = _narrow_shift(real, constant, added, sums, reach) or shift
    multiplier = np.rint(np.ldexp(real, shift))
    mean = 0.0 if sums is None else sums.mean
    bias = np.ldexp(constant, shift) + (np.ldexp(real, shift) - multiplier) * mean
    if sums is not None and not residuals and np.abs(real).max(initial=0) <= _FINE:
        half = 2.0 ** (shift - 1)
        whole = np.rint((bias - half) / np.where(multiplier, multiplier, 1))
        bias = np.where(multiplier, multiplier * whole + half, bias)
    least, most = (0, output.maximum) if output.dtype == "uint8" else (INT32.min, INT32.max)
    low, high = (bound / step + zero for bound in (low, high))
    return Requantization(
        multiplier.astype(np.int32),
        np.rint(bias).astype(np.int64),
        shift,
        int(np.clip(np.rint(low) if math.isfinite(low) else low, least, most)),
        int(np.clip(np.rint(high) if math.isfinite(high) else high, least, most)),
        tuple(
            _residual(index, math.ldexp(factor, shift))
            for factor, (index, _, _) in zip(factors, residuals, strict=True)
        ),
    )


def _shift(real: Any) -> int:
    """32, or less where a multiplier would not fit an int32."""
    largest = float(np.abs(real).max(initial=0))
    shift = min(32, 31 - math.frexp(largest)[1])
    return shift if round(math.ldexp(largest, shift)) <= INT32.max else shift - 1


def _narrow_shift(
    real: Any, constant: Any, added: Sequence[float], sums: Moments, reach: tuple[int, int]
) -> int | None:
    """A shift with which every value fits an int32, if multipliers of so few bits are exact enough.

    Then processors compute a result in half the width, and at more than the speed.
    """
    ends = np.stack([real * end + constant for end in reach])
    least = float(ends.min()) + sum(min(0.0, most) for most in added)
    most = float(ends.max()) + sum(max(0.0, most) for most in added)
    largest = max(-least, most) + 1
    # What is rounded, in units of the shifted value: bias, residuals, and S by half a multiplier.
    slack = 2 + max(map(abs, reach)) + 256 * len(added)
    shift = min(31, math.floor(math.log2((INT32.max - slack) / largest)))
    error = np.ldexp(0.5, -shift) * _DEVIATIONS * float(np.max(sums.deviation, initial=0))
    return shift if shift > 0 and error <= _NARROW_ERROR else None


def _residual(index: int, factor: float) -> Residual:
    left_shift = max(0, math.frexp(factor)[1] - 31)
    multiplier = round(math.ldexp(factor, -left_shift))
    if abs(multiplier) > INT32.max:
        multiplier, left_shift = round(multiplier / 2), left_shift + 1
    return Residual(index, multiplier, left_shift)
