"""Networks of integers as plain data, and what each of their operations means to the last bit.

An `IntegerProgram` takes one image after another through a list of operations. Every activation is
a uint8 array of shape (height, width, channels) on a grid of its own: it stands for the real number
``scale · (q - zero_point)``. Value 0 is the image, value i + 1 the result of operation i, and the
last result, int32 on a grid with a zero point of 0, is the network's output.

All arithmetic is exact in 64-bit integers. An operation first forms an integer sum S for each
output position and channel c:

- `Convolution`, 'adder': S = Σ|q - k| over the window, with the kernel k in uint8 on its input's
  grid. Distances do not change where both operands move by the zero point, which is why it
  does not appear.
- `Convolution`, 'multiply': S = Σ q · k, with k in int8. What the zero point contributes is the
  same everywhere, and is part of the bias.
- `SumPool`: S = Σ q over the window. `Rescale`: S = q.

Positions in the padding hold the input's zero point, of the channel where there is one for each.
Where ``center`` is set, S becomes F · S - Σ_f S_f, the sum over the F channels of its position.

Then `Requantization` makes it the next activation, with one rounding:

    q = clip((S · multiplier[c] + R + bias[c]) >> shift, low, high)
    R = Σ_r q_r · multiplier_r · 2^left_shift_r

where r runs over the residuals, earlier activations of the result's shape, and >> rounds towards
minus infinity; half a unit for rounding to nearest is in the bias. `MaxPool` and `Reshape` keep
their input's grid and need none of this.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray

Shape = tuple[int, int, int]
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Product = Literal["adder", "multiply"]

INT32 = np.iinfo(np.int32)

LARGEST_VALUE = 1 << 62
"""Values before a shift are smaller."""
MOST_LEFT_SHIFT = 22
"""Of a residual."""
_LARGEST_SIZE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation of one image: q stands for scale · (q - zero_point).

    Attributes:
      shape: (height, width, channels).
      scale: the step of the grid, one number, or one for each channel (of the image only).
      zero_point: the q of zero, one number, or one for each channel (of the image only).
      dtype: 'uint8', or 'int32' for a program's output.
      maximum: the largest q, 2^bits - 1 on a grid of fewer bits.
    """

    shape: Shape
    scale: tuple[float, ...]
    zero_point: tuple[int, ...] = (0,)
    dtype: Literal["uint8", "int32"] = "uint8"
    maximum: int = 255

    @property
    def size(self) -> int:
        """Number of elements of one image's activation."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Residual:
    """An earlier activation that is added before rounding: q · multiplier · 2^left_shift.

    Attributes:
      value: which one; 0 is the image, i + 1 the result of operation i.
      multiplier: an int32.
      left_shift: from 0 to 22.
    """

    value: int
    multiplier: int
    left_shift: int = 0


@dataclasses.dataclass(frozen=True)
class Requantization:
    """From integer sums to the result's grid (see the module's docstring for the formula).

    Attributes:
      multiplier: int32 (channels,).
      bias: int64 (channels,).
      shift: from 0 to 62.
      low, high: bounds of the result. A ReLU is a low bound at the zero point.
      residuals: what is added.
    """

    multiplier: NDArray[np.int32]
    bias: NDArray[np.int64]
    shift: int
    low: int = 0
    high: int = 255
    residuals: tuple[Residual, ...] = ()


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Sums of distances or products over windows; a linear layer is one of shape (1, 1, K).

    Attributes:
      input: the value that it reads.
      product: 'adder' or 'multiply'.
      kernel: (height, width, channels / feature_group_count, features), uint8 of an adder, int8 of
        a multiplication.
      strides, padding, kernel_dilation, feature_group_count: as in ``nnx.Conv``, in numbers.
      center: whether each position's mean over the features is taken away.
      requantization: from sums to ``output``'s grid.
      output: the result.
    """

    input: int
    product: Product
    kernel: NDArray[Any]
    requantization: Requantization
    output: Activation
    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    kernel_dilation: Pair = (1, 1)
    feature_group_count: int = 1
    center: bool = False


@dataclasses.dataclass(frozen=True)
class SumPool:
    """Sums over windows of one channel; with its requantization, mean pooling.

    Attributes:
      input: the value that it reads.
      window: (height, width).
      requantization: from sums to ``output``'s grid.
      output: the result.
      strides, padding: as those of a convolution.
    """

    input: int
    window: Pair
    requantization: Requantization
    output: Activation
    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The largest q of each window of one channel; padding takes no part.

    Attributes:
      input: the value that it reads.
      window: (height, width).
      output: the result, on the input's grid.
      strides, padding: as those of a convolution; each padding is smaller than the window.
    """

    input: int
    window: Pair
    output: Activation
    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class Rescale:
    """Another grid, and the sum of activations where the requantization has residuals.

    Attributes:
      input: the value that it reads.
      requantization: from q to ``output``'s grid.
      output: the result.
    """

    input: int
    requantization: Requantization
    output: Activation


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same bytes in row-major order under another shape.

    Attributes:
      input: the value that it reads.
      output: the result, of as many elements and on the same grid.
    """

    input: int
    output: Activation


Operation = Convolution | SumPool | MaxPool | Rescale | Reshape


@dataclasses.dataclass(frozen=True)
class IntegerProgram:
    """A network of integers: what it takes, and its operations in order.

    Attributes:
      input: the image's grid. A scale and zero point for each channel stand for pixels with their
        mean and deviation folded in.
      operations: in order; each reads earlier values only, and the last one gives int32.
      float_input: whether it was made for floats, which are rounded to the input's grid first, or
        for pixels as bytes.

    Raises:
      ValueError: operations that do not fit together or sums that could leave their integers.
      TypeError: arrays of another dtype.
    """

    input: Activation
    operations: tuple[Operation, ...]
    float_input: bool = False

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, images: ArrayLike) -> Array:
        """The network's outputs in floats, for a batch of images.

        Args:
          images: (batch, height, width, channels), uint8 pixels, or floats if ``float_input``.
            Dimensions of size 1 that the network does not have may be left out.

        Returns:
          float32 (batch, *output.shape), without height and width where both are 1.

        Raises:
          ValueError, TypeError: images of another shape or dtype.
        """
        from jadder.integer.dispatch import logits

        return logits(self, images)

    def to_integers(self, images: ArrayLike) -> Array:
        """The uint8 images (batch, *input.shape) of what the program is called with.

        Raises:
          ValueError, TypeError: images of another shape or dtype.
        """
        x = jnp.asarray(images)
        kind = jnp.floating if self.float_input else jnp.uint8
        if not jnp.issubdtype(x.dtype, kind):
            wanted = "floats" if self.float_input else "uint8 pixels"
            raise TypeError(f"the integer program takes {wanted}, got {x.dtype}")
        shape = self.input.shape
        own = tuple(size for size in shape if size > 1)
        if x.ndim < 1 or tuple(size for size in x.shape[1:] if size > 1) != own:
            wanted = f"(batch, {', '.join(map(str, shape))})"
            raise ValueError(f"the integer program takes images {wanted}, got {x.shape}")
        x = x.reshape(x.shape[0], *shape)
        if not self.float_input:
            return x
        q = jnp.floor(x / np.float32(self.input.scale[0]) + 0.5) + self.input.zero_point[0]
        return jnp.clip(q, 0, self.input.maximum).astype(jnp.uint8)

    @property
    def values(self) -> tuple[Activation, ...]:
        """All activations: the image, then every operation's result."""
        return (self.input, *(operation.output for operation in self.operations))

    @property
    def output(self) -> Activation:
        """The result of the last operation."""
        return self.operations[-1].output

    def save(self, path: str | os.PathLike[str], *, golden: ArrayLike | None = None) -> None:
        """Writes the program to one file, which FORMAT.md, next to this module, describes.

        Args:
          path: of the file; '.npz' by custom, for it is one.
          golden: images uint8 (count, *input.shape) on the input's grid, as ``to_integers`` gives
            them, to be kept with every value that the program gives for them (see
            `jadder.integer.files.load_golden`).

        Raises:
          ValueError, TypeError: golden images that are none of the program's.
        """
        from jadder.integer import files

        files.save(self, path, golden=golden)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "IntegerProgram":
        """The program that ``save`` wrote, equal to the last bit.

        Nothing in a file is trusted: no part of it is executed, and all of it is checked.

        Raises:
          FileNotFoundError: no file.
          ValueError: a file that holds no program: what was found in it and what was expected.
        """
        from jadder.integer import files

        return files.load(path)


def sum_bounds(operation: Operation, source: Activation) -> tuple[int, int]:
    """The least and the largest S that an operation can meet, after centring."""
    if isinstance(operation, Convolution):
        low, high = _product_bounds(operation, source)
        if operation.center:
            features = operation.kernel.shape[-1]
            spread = (features - 1) * (high - low)
            return -spread, spread
        return low, high
    if isinstance(operation, SumPool):
        return 0, math.prod(operation.window) * source.maximum
    return 0, source.maximum


def largest_value(each: Requantization, sums: tuple[int, int], values: Sequence[Activation]) -> int:
    """What no magnitude before the shift exceeds, for S between ``sums``."""
    largest = max(-sums[0], sums[1]) * int(np.abs(each.multiplier.astype(np.int64)).max())
    largest += max(abs(int(each.bias.min())), abs(int(each.bias.max())))
    for residual in each.residuals:
        added = values[residual.value].maximum * abs(residual.multiplier)
        largest += added << residual.left_shift
    return largest


def _product_bounds(operation: Convolution, source: Activation) -> tuple[int, int]:
    kernel = operation.kernel.astype(np.int16)
    if operation.product == "adder":
        largest = np.maximum(kernel, source.maximum - kernel)
        return 0, int(largest.sum((0, 1, 2), np.int64).max(initial=0))
    largest_q = source.maximum
    negative = int(np.minimum(kernel, 0).sum((0, 1, 2), np.int64).min(initial=0))
    positive = int(np.maximum(kernel, 0).sum((0, 1, 2), np.int64).max(initial=0))
    return negative * largest_q, positive * largest_q


# -- Checks ----------------------------------------------------------------------------------------


def check(program: IntegerProgram) -> None:
    """Raises ValueError or TypeError unless the program is whole and cannot overflow."""
    if not program.operations:
        raise ValueError("an integer program needs at least one operation")
    _check_activation("the input", program.input, channelwise=True)
    if program.input.dtype != "uint8":
        raise ValueError(f"the input must be uint8, got {program.input.dtype}")
    values = [program.input]
    for index, operation in enumerate(program.operations):
        name = f"operation {index} ({type(operation).__name__})"
        last = index + 1 == len(program.operations)
        _check_operation(name, operation, values, last=last)
        values.append(operation.output)


def _check_operation(
    name: str, operation: Operation, values: Sequence[Activation], *, last: bool
) -> None:
    source = _value(name, operation.input, values)
    output = operation.output
    _check_activation(f"{name}: its output", output, channelwise=False)
    wide = "int32" if last else "uint8"
    if output.dtype != wide:
        raise ValueError(f"{name}: its output must be {wide}, got {output.dtype}")
    if isinstance(operation, MaxPool | Reshape):
        _check_same_grid(name, source, output, last=last)
    shape = _output_shape(name, operation, source)
    if shape != output.shape:
        raise ValueError(f"{name}: gives shape {shape}, its output says {output.shape}")
    if not isinstance(operation, MaxPool | Reshape):
        bounds = sum_bounds(operation, source)
        _check_requantization(name, operation.requantization, output, bounds, values)


def _value(name: str, index: Any, values: Sequence[Activation]) -> Activation:
    if not _is_int(index) or not 0 <= index < len(values):
        raise ValueError(f"{name}: reads value {index!r} of {len(values)}")
    return values[index]


def _check_activation(name: str, each: Activation, *, channelwise: bool) -> None:
    ok = len(each.shape) == 3 and all(_is_int(size) and size > 0 for size in each.shape)
    if not ok or each.size > _LARGEST_SIZE:
        raise ValueError(f"{name}: a shape of three positive sizes expected, got {each.shape}")
    counts = {1, each.shape[2]} if channelwise else {1}
    if len(each.scale) not in counts or not all(0 < s < math.inf for s in each.scale):
        raise ValueError(f"{name}: positive scales expected, one or of each channel: {each.scale}")
    if len(each.zero_point) not in counts:
        raise ValueError(f"{name}: {len(each.zero_point)} zero points")
    if each.dtype == "int32":
        if tuple(each.zero_point) != (0,):
            raise ValueError(f"{name}: an int32 output has zero point 0, got {each.zero_point}")
        return
    if each.dtype != "uint8" or not _is_int(each.maximum) or not 1 <= each.maximum <= 255:
        raise ValueError(f"{name}: uint8 up to 255 expected, got {each.dtype}, {each.maximum}")
    if not all(_is_int(z) and 0 <= z <= each.maximum for z in each.zero_point):
        raise ValueError(f"{name}: zero points within its grid expected, got {each.zero_point}")


def _check_same_grid(name: str, source: Activation, output: Activation, *, last: bool) -> None:
    if last:
        raise ValueError(f"{name}: the last operation must be one that gives int32")
    grid = (source.scale, source.zero_point, source.maximum)
    if grid != (output.scale, output.zero_point, output.maximum):
        raise ValueError(f"{name}: its output must be on its input's grid")


def _output_shape(name: str, operation: Operation, source: Activation) -> Shape:
    height, width, channels = source.shape
    if isinstance(operation, Rescale):
        return source.shape
    if isinstance(operation, Reshape):
        if len(source.scale) > 1 or len(source.zero_point) > 1:
            raise ValueError(f"{name}: its input has a grid for each channel")
        same = operation.output.size == source.size
        return operation.output.shape if same else source.shape
    if isinstance(operation, Convolution):
        window, dilation = _check_kernel(name, operation, channels), operation.kernel_dilation
        channels = operation.kernel.shape[3]
    else:
        window, dilation = operation.window, (1, 1)
    for what, pair in (("window", window), ("strides", operation.strides), ("dilation", dilation)):
        if len(pair) != 2 or not all(_is_int(n) and 1 <= n <= _LARGEST_SIZE for n in pair):
            raise ValueError(f"{name}: {what} must be two positive numbers, got {pair}")
    sides = [side for pair in operation.padding for side in pair]
    if len(sides) != 4 or not all(_is_int(side) and 0 <= side <= 1 << 15 for side in sides):
        raise ValueError(f"{name}: padding must be two pairs up to 32768, got {operation.padding}")
    if isinstance(operation, MaxPool):
        for size, pair in zip(window, operation.padding, strict=True):
            if max(pair) >= size:
                raise ValueError(f"{name}: padding {pair} is not smaller than the window {size}")
    sizes = []
    for axis, size in enumerate((height, width)):
        span = (window[axis] - 1) * dilation[axis] + 1
        room = size + sum(operation.padding[axis]) - span
        if room < 0:
            raise ValueError(f"{name}: a window of {span} does not fit its input {source.shape}")
        sizes.append(room // operation.strides[axis] + 1)
    return sizes[0], sizes[1], channels


def _check_kernel(name: str, operation: Convolution, channels: int) -> Pair:
    wanted = {"adder": np.uint8, "multiply": np.int8}.get(operation.product)
    if wanted is None:
        raise ValueError(f"{name}: product must be 'adder' or 'multiply': {operation.product!r}")
    kernel = operation.kernel
    if kernel.dtype != wanted:
        raise TypeError(
            f"{name}: a {operation.product} kernel is {wanted.__name__}: {kernel.dtype}"
        )
    groups = operation.feature_group_count
    if not _is_int(groups) or groups < 1 or kernel.ndim != 4 or 0 in kernel.shape:
        raise ValueError(f"{name}: kernel {kernel.shape} in {groups} groups")
    if kernel.shape[2] * groups != channels or kernel.shape[3] % groups:
        raise ValueError(
            f"{name}: a kernel {kernel.shape} in {groups} groups does not fit {channels} channels"
        )
    return kernel.shape[0], kernel.shape[1]


def _check_requantization(
    name: str,
    each: Requantization,
    output: Activation,
    sums: tuple[int, int],
    values: Sequence[Activation],
) -> None:
    channels = output.shape[2]
    for what, array, dtype in (("multiplier", each.multiplier, np.int32),
                               ("bias", each.bias, np.int64)):  # fmt: skip
        if array.dtype != dtype:
            raise TypeError(f"{name}: its {what} must be {np.dtype(dtype)}, got {array.dtype}")
        if array.shape != (channels,):
            raise ValueError(f"{name}: its {what} must have {channels} values, got {array.shape}")
    if not _is_int(each.shift) or not 0 <= each.shift <= 62:
        raise ValueError(f"{name}: shift must be from 0 to 62, got {each.shift}")
    least, most = (0, output.maximum) if output.dtype == "uint8" else (INT32.min, INT32.max)
    if not (_is_int(each.low) and _is_int(each.high) and least <= each.low <= each.high <= most):
        raise ValueError(f"{name}: bounds {each.low} and {each.high} are not within its grid")
    if sums[0] < INT32.min or sums[1] > INT32.max:
        raise ValueError(f"{name}: sums from {sums[0]} to {sums[1]} do not fit int32")
    for residual in each.residuals:
        added = _value(name, residual.value, values)
        if added.shape != output.shape:
            raise ValueError(f"{name}: residual {added.shape} is added to {output.shape}")
        if not _is_int(residual.multiplier) or abs(residual.multiplier) > INT32.max:
            raise ValueError(f"{name}: a residual's multiplier must be int32")
        if not _is_int(residual.left_shift) or not 0 <= residual.left_shift <= MOST_LEFT_SHIFT:
            raise ValueError(
                f"{name}: left_shift must be from 0 to {MOST_LEFT_SHIFT}, got {residual.left_shift}"
            )
    if largest_value(each, sums, values) >= LARGEST_VALUE:
        raise ValueError(f"{name}: its sums could pass 2^62")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
