"""What a network's floats are like on some images, and the grids that suit them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jadder.integer.graph import Node, evaluate

CHUNK = 64
_MOST_SAMPLES = 1 << 19
_BINS = 4096
_FRACTIONS = np.linspace(1, 0.1, 91)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Number of values, mean and variance of each channel."""

    count: int
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    @classmethod
    def of(cls, array: Any) -> "Moments":
        """Of an array (..., channels)."""
        rows = np.asarray(array, np.float64).reshape(-1, np.shape(array)[-1])
        return cls(len(rows), rows.mean(0), rows.var(0))

    @classmethod
    def pooled(cls, parts: Sequence["Moments"]) -> "Moments":
        """Of several arrays together."""
        shares = np.array([part.count for part in parts], np.float64)[:, None] / sum(
            part.count for part in parts
        )
        means = np.stack([part.mean for part in parts])
        mean = (shares * means).sum(0)
        within = np.stack([part.variance for part in parts])
        variance = (shares * (within + (means - mean) ** 2)).sum(0)
        return cls(sum(part.count for part in parts), mean, variance)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Of each channel."""
        return np.sqrt(self.variance)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The numbers scale · (q - zero_point) for q from 0 to ``maximum``."""

    scale: float
    zero_point: int
    maximum: int

    @classmethod
    def between(cls, low: float, high: float, maximum: int) -> "Grid":
        """The grid from about ``low`` to about ``high``, which has 0 among its numbers."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / maximum or 1.0
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, maximum)), maximum)

    @classmethod
    def fitted(cls, sample: Any, maximum: int) -> "Grid":
        """The grid on which ``sample`` has the least squared error."""
        low, high = float(min(sample.min(), 0)), float(max(sample.max(), 0))
        if low == high:
            return cls.between(low, high, maximum)
        counts, edges = np.histogram(sample, _BINS, (low, high))
        middles = (edges[1:] + edges[:-1]) / 2
        middles[np.searchsorted(edges, 0, "right") - 1 if low < 0 else 0] = 0.0
        grids = [cls.between(low * share, high * share, maximum) for share in _FRACTIONS]
        errors = [float(counts @ (grid.rounded(middles) - middles) ** 2) for grid in grids]
        return grids[int(np.argmin(errors))]

    def to_integers(self, x: Any) -> Any:
        """The nearest q of each x, halves upwards."""
        return np.clip(np.floor(x / self.scale + 0.5) + self.zero_point, 0, self.maximum)

    def rounded(self, x: Any) -> Any:
        """The nearest of the grid's numbers."""
        return self.scale * (self.to_integers(x) - self.zero_point)


def symmetric(kernel: Any, largest: int) -> tuple[Any, Any]:
    """int8 kernels (..., features) and the scale of each feature, by the least squared error."""
    peak = np.abs(kernel).reshape(-1, kernel.shape[-1]).max(0)
    peak = np.where(peak > 0, peak, 1.0)
    best_scale, best_error = peak / largest, np.full(peak.shape, np.inf)
    for share in _FRACTIONS:
        scale = share * peak / largest
        q = np.clip(np.rint(kernel / scale), -largest, largest)
        error = ((q * scale - kernel) ** 2).reshape(-1, kernel.shape[-1]).sum(0)
        best_scale = np.where(error < best_error, scale, best_scale)
        best_error = np.minimum(error, best_error)
    q = np.clip(np.rint(kernel / best_scale), -largest, largest).astype(np.int8)
    return q, best_scale


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of nodes of a graph: moments of their channels, and a sample of their elements."""

    moments: Mapping[Node, Moments]
    samples: Mapping[Node, NDArray[np.float32]]

    @classmethod
    def of(cls, order: Sequence[Node], images: Any, wanted: Iterable[Node]) -> "Statistics":
        """Of the ``wanted`` nodes, for float images (batch, height, width, channels)."""
        wanted = list(wanted)

        @jax.jit
        def values(chunk: Any) -> list[Any]:
            computed = evaluate(list(order), chunk)
            return [computed[node] for node in wanted]

        moments: list[list[Moments]] = [[] for _ in wanted]
        samples: list[list[Any]] = [[] for _ in wanted]
        random = np.random.default_rng(0)
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            share = max(1, _MOST_SAMPLES * len(chunk) // len(images))
            for i, value in enumerate(values(chunk)):
                array = np.asarray(value)
                moments[i].append(Moments.of(array))
                samples[i].append(_sample(array.reshape(-1), share, random))
        return cls(
            {node: Moments.pooled(each) for node, each in zip(wanted, moments, strict=True)},
            {node: np.concatenate(each) for node, each in zip(wanted, samples, strict=True)},
        )


def _sample(flat: Any, count: int, random: np.random.Generator) -> Any:
    """At most about ``count`` elements, the least and the largest among them."""
    if flat.size <= count:
        return flat
    start = int(random.integers(flat.size // count))
    return np.append(flat[start :: flat.size // count], [flat.min(), flat.max()])
