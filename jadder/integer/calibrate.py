"""What a network's floats are like on some images, and kernels of int8."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jadder.integer.graph import Node, evaluate
from jadder.integer.grid import SHARES

CHUNK = 64
_MOST_SAMPLES = 1 << 19


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


def symmetric(kernel: Any, largest: int) -> tuple[Any, Any]:
    """int8 kernels (..., features) and the scale of each feature, by the least squared error."""
    peak = np.abs(kernel).reshape(-1, kernel.shape[-1]).max(0)
    peak = np.where(peak > 0, peak, 1.0)
    best_scale, best_error = peak / largest, np.full(peak.shape, np.inf)
    for share in SHARES:
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
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            share = max(1, _MOST_SAMPLES * len(chunk) // len(images))
            for i, value in enumerate(values(chunk)):
                array = np.asarray(value)
                moments[i].append(Moments.of(array))
                samples[i].append(sample_of(array, share))
        return cls(
            {node: Moments.pooled(each) for node, each in zip(wanted, moments, strict=True)},
            {node: np.concatenate(each) for node, each in zip(wanted, samples, strict=True)},
        )


def sample_of(array: Any, count: int = 1 << 16) -> Any:
    """At most about ``count`` elements of all channels, the least and the largest among them."""
    flat = array.reshape(-1)
    stride = -(-flat.size // count)
    while math.gcd(stride, array.shape[-1]) > 1:
        stride += 1
    return flat if stride == 1 else np.append(flat[::stride], [flat.min(), flat.max()])
