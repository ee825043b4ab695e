"""Adder kernels as variables, and what Flax's layers tell of the kernels of adder products.

A kernel's variable knows by its type that it is an adder kernel, and by its metadata what one layer
of it is; a layer of Flax's that was given an adder product as an argument knows the same of a
kernel that is an ordinary parameter. `jadder.masks` brings both together.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from flax import linen, nnx

from jadder import ops

Axes = tuple[int, ...]
Shape = tuple[int, ...]


class AdderKernel(nnx.Param[Any]):
    """The kernel of an adder product: what `jadder.optim.scale_by_adder` scales.

    Two entries of its metadata tell what one layer is when kernels are stacked. ``layer_shape`` is
    the shape of a single layer's kernel, by default the value's at creation: the layers of a stack
    are created one by one under ``nnx.vmap``. ``stack_axes`` are the axes that ``nnx.vmap`` and
    ``nnx.scan`` report when they have ``transform_metadata={nnx.PARTITION_NAME: ...}``.

    Example:
      >>> from flax import nnx
      >>> from jadder import AdderLinear
      >>> @nnx.split_rngs(splits=5)
      ... @nnx.vmap
      ... def five_layers(rngs):
      ...     return AdderLinear(3, 4, rngs=rngs)
      >>> kernel = five_layers(nnx.Rngs(0)).kernel
      >>> kernel.shape, kernel.get_metadata("layer_shape")
      ((5, 3, 4), (3, 4))
    """

    def __init__(
        self, value: Any, *, layer_shape: Sequence[int] | None = None, **metadata: Any
    ) -> None:
        super().__init__(value, **metadata)
        if layer_shape is None and not self.has_metadata("layer_shape"):
            layer_shape = getattr(self.get_value(), "shape", None)
        if layer_shape is not None:
            self.set_metadata("layer_shape", tuple(layer_shape))

    def add_axis(self, axis_index: int, axis_name: str | None) -> None:
        """Called by Flax's transformations where they stack variables."""
        super().add_axis(axis_index, axis_name)
        if axis_index < 0:  # of a rank that is not known here
            return
        axes = self.get_metadata("stack_axes", ())
        moved = [axis + (axis >= axis_index) for axis in axes]
        self.set_metadata("stack_axes", tuple(sorted([*moved, axis_index])))

    def remove_axis(self, axis_index: int, axis_name: str | None) -> None:
        """Called by Flax's transformations where they take a stack apart."""
        super().remove_axis(axis_index, axis_name)
        axes = self.get_metadata("stack_axes", ())
        kept = tuple(axis - (axis > axis_index) for axis in axes if axis != axis_index)
        self.set_metadata("stack_axes", kept)


class AdderOperator:
    """The base of objects that Flax's layers take for their product and that are adder products."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is known of the layer that has an adder kernel.

    Attributes:
      kernel_shape: the shape of its kernel, without the axes of stacks; None if unknown.
      stack_axes: the axes of stacks, as far as Flax's transformations told them.
    """

    kernel_shape: Shape | None = None
    stack_axes: Axes = ()

    def stack_axes_of(self, shape: Shape) -> Axes:
        """Which axes of a kernel of this shape number the layers.

        Raises:
          ValueError: the kernel has more axes than the layer's, and these are not among them.
        """
        if self.kernel_shape is None:
            return self.stack_axes
        extra = len(shape) - len(self.kernel_shape)
        if extra <= 0:
            return ()
        if len(self.stack_axes) == extra:
            return self.stack_axes
        # In this order leading axes are found first, where Flax puts them if not told otherwise.
        for axes in itertools.combinations(range(len(shape)), extra):
            if tuple(n for axis, n in enumerate(shape) if axis not in axes) == self.kernel_shape:
                return axes
        raise ValueError(
            f"a kernel of shape {shape} is no stack of layers' kernels of shape "
            f"{self.kernel_shape}; give stack_axes"
        )


def is_adder_product(value: Any) -> bool:
    """Whether a layer that has ``value`` as its product is an adder layer."""
    while True:
        if isinstance(value, functools.partial):
            value = value.func
        elif not isinstance(value, linen.Module) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__  # jax.jit's, among others
        else:
            break
    kinds = (ops.adder_dot_general, ops.adder_conv_general_dilated, ops.adder_einsum)
    if isinstance(value, type):  # dot_general_cls
        return issubclass(value, AdderOperator)
    return isinstance(value, AdderOperator) or any(value is kind for kind in kinds)


def layer_shape(layer: Any) -> Shape | None:
    """The shape of the kernel of one of Flax's layers, without the axes of stacks.

    Example:
      >>> from flax import nnx
      >>> layer_shape(nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)))
      (3, 3, 2, 6)
    """
    if isinstance(layer, nnx.Linear):
        return (layer.in_features, layer.out_features)
    if isinstance(layer, nnx.LinearGeneral):
        return (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    if isinstance(layer, nnx.Einsum | nnx.Conv | nnx.ConvTranspose):
        return tuple(layer.kernel_shape)
    return None


def mark_kernel(layer: Any) -> None:
    """Makes the kernel of one of Flax's layers an `AdderKernel`."""
    if not isinstance(layer.kernel, AdderKernel):
        metadata = {"layer_shape": layer_shape(layer)} | layer.kernel.get_metadata()
        layer.kernel = AdderKernel(layer.kernel.get_value(), **metadata)


def has_adder_product(layer: Any) -> bool:
    """Whether one of a layer's attributes, in NNX or Linen, is an adder product."""
    return any(is_adder_product(value) for value in vars(layer).values())


def layer_of(node: Any) -> Layer | None:
    """The layer that a variable tells of by its type and metadata."""
    if not isinstance(node, AdderKernel):
        return None
    return Layer(node.get_metadata("layer_shape", None), node.get_metadata("stack_axes", ()))
