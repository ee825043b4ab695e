"""What a network computes, as a graph of a few kinds of operations on floats.

It stands between a traced network and an `IntegerProgram`: `jadder.integer.trace` makes it,
`jadder.integer.quantize` turns it into integers. A node is what one image makes of it, of shape
(height, width, channels).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from jadder.integer.grid import Grid
from jadder.integer.program import Padding, Pair, Product, Shape
from jadder.ops import adder_conv

Floats = NDArray[np.float64]

_CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
_NO_PADDING: Padding = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One value of the network.

    Attributes:
      shape: of one image, (height, width, channels).
      inputs: what it is computed from.
      layer: where the network computes it, for messages.
    """

    shape: Shape
    inputs: tuple["Node", ...]
    layer: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image(Node):
    """The network's input."""


@dataclasses.dataclass(frozen=True, eq=False)
class ProductNode(Node):
    """-Σ|x - w| or Σ x · w over windows; ``kernel`` is (height, width, channels / groups, F)."""

    product: Product
    kernel: NDArray[np.float32]
    strides: Pair = (1, 1)
    padding: Padding = _NO_PADDING
    kernel_dilation: Pair = (1, 1)
    feature_group_count: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Affine(Node):
    """scale[c] · x + offset[c]."""

    scale: Floats
    offset: Floats


@dataclasses.dataclass(frozen=True, eq=False)
class Center(Node):
    """x less its mean over the channels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Add(Node):
    """The sum of two values of one shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class Clip(Node):
    """min(max(x, low), high); a ReLU with (0, inf)."""

    low: float = 0.0
    high: float = math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Pool(Node):
    """The sum or the maximum of windows of each channel; padding adds 0, or takes no part."""

    maximum: bool
    window: Pair
    strides: Pair
    padding: Padding


@dataclasses.dataclass(frozen=True, eq=False)
class Flatten(Node):
    """The same elements in row-major order, under another shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class Round(Node):
    """Rounded to a grid that the network was trained with."""

    grid: Grid


def evaluate(order: list[Node], images: Array) -> Mapping[Node, Array]:
    """Every node's value, float32 (batch, *shape), for ``images`` (batch, *order[0].shape)."""
    values: dict[Node, Array] = {}
    for node in order:
        operands = [values[each] for each in node.inputs]
        values[node] = images if isinstance(node, Image) else _apply(node, operands)
    return values


def topological(output: Node) -> list[Node]:
    """The nodes that ``output`` needs, each after its inputs."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(output, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(each, False) for each in reversed(node.inputs)]
    return order


def _apply(node: Node, operands: list[Array]) -> Array:
    x = operands[0]
    match node:
        case ProductNode():
            return _product(node, x)
        case Affine():
            return _affine(node, x)
        case Center():
            return x - x.mean(-1, keepdims=True)
        case Add():
            return x + operands[1]
        case Clip():
            return jnp.clip(x, node.low, node.high)
        case Pool():
            return _pool(node, x)
        case Flatten():
            return x.reshape(x.shape[0], *node.shape)
        case Round():
            return node.grid.round_to_grid(x)
    raise AssertionError(f"no way to compute {node}")


def _affine(node: Affine, x: Array) -> Array:
    """scale · (x + offset / scale), since an adder product lies far from zero."""
    flat = node.scale == 0
    shift = np.where(flat, 0, node.offset / np.where(flat, 1, node.scale))
    y = (x + shift.astype(np.float32)) * node.scale.astype(np.float32)
    return jnp.where(flat, node.offset.astype(np.float32), y)


def _product(node: ProductNode, x: Array) -> Array:
    kernel = jnp.asarray(node.kernel)
    if node.product == "adder":
        return adder_conv(
            x, kernel, node.strides, node.padding, kernel_dilation=node.kernel_dilation,
            feature_group_count=node.feature_group_count,
        )  # fmt: skip
    return lax.conv_general_dilated(
        x, kernel, node.strides, node.padding, rhs_dilation=node.kernel_dilation,
        dimension_numbers=_CHANNELS_LAST, feature_group_count=node.feature_group_count,
    )  # fmt: skip


def _pool(node: Pool, x: Array) -> Array:
    window, strides = (1, *node.window, 1), (1, *node.strides, 1)
    padding = ((0, 0), *node.padding, (0, 0))
    if node.maximum:
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    return lax.reduce_window(x, 0.0, lax.add, window, strides, padding)
