"""Which nodes of a graph one integer operation computes together.

An operation makes one sum (of a product, a pool, or just an activation), scales it, adds earlier
activations, and clips. `expression` reads that much of a graph into an `Expression`; what it does
not take in becomes an activation of its own.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jadder.integer.graph import Add, Affine, Center, Clip, Flatten, Node, Pool, ProductNode, Round


@dataclasses.dataclass(frozen=True)
class Expression:
    """clip(scale · leaf + offset + Σ factor · residual, low, high).

    Attributes:
      leaf: a product, a centred product or a sum over windows; any other node is an activation
        that is rescaled.
      scale, offset: of each channel.
      residuals: activations that are added, each with its factor.
      low, high: bounds.
    """

    leaf: Node
    scale: Any
    offset: Any
    residuals: tuple[tuple[Node, float], ...] = ()
    low: float = -math.inf
    high: float = math.inf

    @property
    def product(self) -> ProductNode | None:
        """The product of the leaf, if it has one."""
        leaf = self.leaf.inputs[0] if isinstance(self.leaf, Center) else self.leaf
        return leaf if isinstance(leaf, ProductNode) else None

    @property
    def centered(self) -> bool:
        """Whether the product's mean over channels is taken away."""
        return isinstance(self.leaf, Center)


def has_own_grid(node: Node) -> bool:
    """Whether a node becomes an activation by an expression; others keep their input's grid."""
    return not (isinstance(node, Flatten) or (isinstance(node, Pool) and node.maximum))


def count_uses(order: Sequence[Node]) -> Mapping[Node, int]:
    """How many nodes read each node."""
    return Counter(each for node in order for each in node.inputs)


def expression(node: Node, uses: Mapping[Node, int]) -> Expression:
    """The expression that gives ``node``.

    Raises:
      ValueError: a mean over channels of something other than a product.
    """
    if isinstance(node, Round):
        (node,) = node.inputs
        if uses[node] > 1:
            return _Parts.activation(node).closed()
    if isinstance(node, Clip):
        parts = _part(node.inputs[0], uses)
        return dataclasses.replace(parts.closed(), low=node.low, high=node.high)
    return _read(node, uses).closed()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """An expression in the making, which may have no leaf yet."""

    leaf: Node | None
    scale: Any
    offset: Any
    residuals: tuple[tuple[Node, float], ...]

    @classmethod
    def activation(cls, node: Node) -> "_Parts":
        channels = node.shape[2]
        return cls(None, np.ones(channels), np.zeros(channels), ((node, 1.0),))

    def closed(self) -> Expression:
        if self.leaf is not None:
            return Expression(self.leaf, self.scale, self.offset, self.residuals)
        (leaf, factor), *rest = self.residuals
        return Expression(leaf, np.full(leaf.shape[2], factor), self.offset, tuple(rest))


def _part(node: Node, uses: Mapping[Node, int]) -> _Parts:
    """A node within an expression: read into it, unless others need it too."""
    inner = isinstance(node, Affine | Add) or _is_leaf(node)
    return _read(node, uses) if inner and uses[node] == 1 else _Parts.activation(node)


def _is_leaf(node: Node) -> bool:
    return isinstance(node, ProductNode | Center) or (isinstance(node, Pool) and not node.maximum)


def _read(node: Node, uses: Mapping[Node, int]) -> _Parts:
    if isinstance(node, Affine):
        return _scaled(node, uses)
    if isinstance(node, Add):
        return _sum(node, uses)
    if _is_leaf(node):
        if isinstance(node, Center) and not isinstance(node.inputs[0], ProductNode):
            raise ValueError(
                "quantize: a mean over channels has an integer form only where it is taken away "
                f"from a product; the network computes it in {node.layer}"
            )
        channels = node.shape[2]
        return _Parts(node, np.ones(channels), np.zeros(channels), ())
    return _Parts.activation(node)


def _scaled(node: Affine, uses: Mapping[Node, int]) -> _Parts:
    inner = _part(node.inputs[0], uses)
    uniform = bool((node.scale == node.scale[0]).all())
    if inner.residuals and not uniform:
        # Residuals have one factor for all channels: what is scaled becomes an activation.
        return _Parts(node.inputs[0], node.scale, node.offset, ())
    residuals = tuple((each, factor * float(node.scale[0])) for each, factor in inner.residuals)
    offset = node.scale * inner.offset + node.offset
    return _Parts(inner.leaf, node.scale * inner.scale, offset, residuals)


def _sum(node: Add, uses: Mapping[Node, int]) -> _Parts:
    first, second = (_part(each, uses) for each in node.inputs)
    if node.inputs[0] is node.inputs[1]:
        first = second = _Parts.activation(node.inputs[0])
    if first.leaf is not None and second.leaf is not None:
        second = _Parts.activation(node.inputs[1])
    with_leaf = first if first.leaf is not None else second
    return _Parts(
        with_leaf.leaf,
        with_leaf.scale,
        first.offset + second.offset,
        first.residuals + second.residuals,
    )
