"""How the arrays of an adder product share their dimensions out over the axes of a device mesh.

A product is written like an einsum: each dimension of each array has the name of the index that it
runs over. In y[b, m, n] = -Σ_k |x[b, m, k] - w[b, k, n]| the devices may share out any of b, m, n
and k, as long as all arrays share an index out alike. Sharing out an index that the result does not
have leaves each device with a part of the sum, to be added up over the devices.

A convolution has the indices b, c (channels), f (features), g (groups of both), and for each
spatial dimension d of the input, the window and the result: s<d>, t<d> and o<d>. These are not
shared out, for a block of an image would need its neighbours' edges.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jadder.kernels.spec import ConvSpec

Dimension = tuple[str, ...]
"""The indices that a dimension of an array runs over, the slowest first."""
Dimensions = tuple[Dimension, ...]
Axes = tuple[str, ...]
"""The mesh axes that a dimension or an index is sharded over, the slowest first."""
Sharding = tuple[Axes, ...]
"""Those of each dimension of an array."""

_MATMUL: tuple[Dimensions, ...] = (
    (("b",), ("m",), ("k",)),
    (("b",), ("k",), ("n",)),
    (("b",), ("m",), ("n",)),
)


def gradient_of(function: str) -> int | None:
    """Which operand a function of `Kernels` gives the gradient of, if it does."""
    return {"dx": 0, "dw": 1}.get(function.partition("_")[2])


class Layout(NamedTuple):
    """The indices of one product's arrays.

    Attributes:
      sizes: how many values each index takes.
      whole: the indices of which every device needs all.
    """

    operands: tuple[Dimensions, ...]
    result: Dimensions
    sizes: Mapping[str, int]
    whole: frozenset[str]

    @property
    def summed(self) -> frozenset[str]:
        """The indices that only operands have, without those that are whole everywhere."""
        operands = (index for dimensions in self.operands for each in dimensions for index in each)
        return frozenset(operands) - {i for each in self.result for i in each} - self.whole

    def shape(self, dimensions: Dimensions) -> tuple[int, ...]:
        """The shape of an array that has these dimensions."""
        return tuple(math.prod(self.sizes[index] for index in each) for each in dimensions)

    @classmethod
    def of(
        cls,
        function: str,
        spec: ConvSpec | None,
        mapped: Sequence[Sequence[bool]],
        shapes: Sequence[Sequence[int]],
    ) -> "Layout":
        """The layout of a function of `Kernels`.

        Args:
          function: its name.
          spec: of a convolution; None for a matmul.
          mapped: for each `jax.vmap` around it, the outermost first, which operands it maps over
            their leading dimension. The result always has that dimension.
          shapes: of the operands, with their mapped dimensions.
        """
        own = [tuple(s[sum(m[i] for m in mapped) :]) for i, s in enumerate(shapes)]
        sizes = {} if spec is None else _conv_sizes(own[0], own[1], spec)
        x, w, y = _MATMUL if spec is None else _conv_dimensions(len(own[0]) - 2, "g" in sizes)
        maps = [(f"v{level}",) for level in range(len(mapped))]
        operands = tuple(
            (*(each for each, m in zip(maps, mapped, strict=True) if m[i]), *dimensions)
            for i, dimensions in enumerate((x, w, y)[: len(shapes)])
        )
        of = gradient_of(function)
        result = (*maps, *(y if of is None else (x, w)[of]))
        for dimensions, shape in zip(operands, shapes, strict=True):
            for (*slower, index), size in zip(dimensions, shape, strict=True):
                sizes[index] = size // math.prod(sizes[each] for each in slower)
        whole = {i for i in sizes if i[0] in "sto" or ("g" in sizes and i in ("c", "f"))}
        return cls(operands, result, sizes, frozenset(whole))


def _conv_sizes(x: Sequence[int], w: Sequence[int], spec: ConvSpec) -> dict[str, int]:
    """The sizes that the operands' shapes do not have: groups, and the result's space."""
    out = spec.out_spatial(x[1:-1], w[:-2])
    groups = spec.feature_group_count
    return {f"o{d}": size for d, size in enumerate(out)} | ({"g": groups} if groups > 1 else {})


def _conv_dimensions(rank: int, grouped: bool) -> tuple[Dimensions, ...]:
    """Of x, w and y."""
    spatial, taps, out = (tuple((f"{index}{d}",) for d in range(rank)) for index in "sto")
    channels, features = (("g", "c"), ("g", "f")) if grouped else (("c",), ("f",))
    return (
        (("b",), *spatial, channels),
        (*taps, ("c",), features),
        (("b",), *out, features),
    )


class Plan(NamedTuple):
    """Which mesh axes each index is sharded over."""

    layout: Layout
    axes: Mapping[str, Axes]

    def sharding(self, dimensions: Dimensions) -> Sharding:
        """That of an array. Of the indices of one dimension only the first can be sharded."""
        return tuple(self.axes.get(first, ()) for first, *_ in dimensions)

    @property
    def summed(self) -> Axes:
        """The axes over which devices hold parts of sums."""
        return tuple(axis for i in sorted(self.layout.summed) for axis in self.axes.get(i, ()))


def plan(
    layout: Layout,
    mesh: Mapping[str, int],
    operands: Sequence[Sharding],
    result: Sharding | None = None,
) -> Plan:
    """Shards each index as the largest operand does that shards it, or else as the result.

    An axis is given to one index only, and only if it divides it evenly: a block must not be
    padded, since what it is padded with would count in a sum. What the plan does not leave as it
    is, the largest arrays last, has to be moved between devices.

    Args:
      mesh: the sizes of its axes.
      operands: how the operands are sharded now.
      result: how the result is wanted.
    """
    asked = sorted(
        zip(layout.operands, operands, strict=True),
        key=lambda pair: -math.prod(layout.shape(pair[0])),
    )
    if result is not None:
        asked.append((layout.result, result))
    chosen: dict[str, Axes] = {}
    free = set(mesh)
    for dimensions, sharding in asked:
        for (index, *_), axes in zip(dimensions, sharding, strict=True):
            if index in layout.whole or index in chosen:
                continue
            fitting: Axes = ()
            for axis in axes:
                parts = math.prod(mesh[each] for each in (*fitting, axis))
                if axis not in free or layout.sizes[index] % parts:
                    break
                fitting = (*fitting, axis)
            if fitting:
                chosen[index] = fitting
                free.difference_update(fitting)
    return Plan(layout, chosen)


def name_axes(
    starts: Sequence[Sequence[NDArray[Any]]],
) -> tuple[dict[str, int], list[Sharding]]:
    """The axes of a mesh that could have led to blocks, and the sharding of each array over them.

    The compiler knows no axes, only which device holds which block; and a program may have several
    meshes. The axes here are as short as can be, of a prime number of devices each, so that those
    of any mesh, and their parts, are products of these. What they cannot name counts as unsharded.

    Args:
      starts: of each array, and each of its dimensions, where each device's block starts, if the
        dimension is as long as there are devices.

    Returns:
      The mesh's axes with their sizes, and the shardings.
    """
    devices = len(starts[0][0])

    def shardings(sizes: tuple[int, ...]) -> list[Sharding]:
        return [tuple(_axes(each.reshape(sizes)) for each in array) for array in starts]

    def named(sizes: tuple[int, ...]) -> int:
        return sum(bool(axes) for sharding in shardings(sizes) for axes in sharding)

    sizes = max(_factorings(devices), key=named)
    return {f"p{i}": size for i, size in enumerate(sizes)}, shardings(sizes)


def _factorings(n: int) -> Iterator[tuple[int, ...]]:
    """``n`` as a product of primes, in each order."""
    if n == 1:
        yield ()
    for prime in range(2, n + 1):
        if n % prime == 0 and all(prime % smaller for smaller in range(2, prime)):
            yield from ((prime, *rest) for rest in _factorings(n // prime))


def _axes(starts: NDArray[Any]) -> Axes:
    """The axes that one dimension is cut over.

    Args:
      starts: where each device's block starts, the devices in the shape of their mesh.
    """
    steps = [starts[tuple(each)] - starts.flat[0] for each in np.eye(starts.ndim, dtype=int)]
    axes = sorted((i for i, step in enumerate(steps) if step), key=lambda i: -steps[i])
    block = starts.size
    for i in axes:
        block //= starts.shape[i]
        if steps[i] != block:
            return ()
    regular = np.tensordot(steps, np.indices(starts.shape), 1)
    return tuple(f"p{i}" for i in axes) if np.array_equal(starts, regular) else ()
