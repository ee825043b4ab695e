"""Grids of equally spaced numbers, and the one that suits some values best."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SHARES = np.linspace(1, 0.1, 91)
"""Of the largest value, what is tried as the end of a range."""

ROUND_TO_GRID = "round_to_grid"
"""The name under which a jaxpr calls that function."""

_BINS = 4096


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
        scale = float(high - low) / maximum or 1.0
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, maximum)), maximum)

    @classmethod
    def fitted(cls, sample: Any, maximum: int) -> "Grid":
        """The grid on which ``sample`` has the least squared error."""
        low, high = float(min(sample.min(), 0)), float(max(sample.max(), 0))
        if low == high:
            return cls.between(low, high, maximum)
        counts, edges = np.histogram(sample, _BINS, (low, high))
        middles = (edges[1:] + edges[:-1]) / 2
        middles[min(np.searchsorted(edges, 0.0, "right") - 1, _BINS - 1)] = 0.0
        grids = [cls.between(low * share, high * share, maximum) for share in SHARES]
        errors = [float(counts @ (grid.rounded(middles) - middles) ** 2) for grid in grids]
        return grids[int(np.argmin(errors))]

    def to_integers(self, x: Any) -> Any:
        """The nearest q of each x, halves upwards."""
        numpy: Any = jnp if isinstance(x, Array) else np
        return numpy.clip(numpy.floor(x / self.scale + 0.5) + self.zero_point, 0, self.maximum)

    def rounded(self, x: Any) -> Any:
        """The nearest of the grid's numbers."""
        return self.scale * (self.to_integers(x) - self.zero_point)

    def round_to_grid(self, x: Array) -> Array:
        """`rounded` of JAX's arrays, in a way that `jadder.integer.trace` knows again."""
        return round_to_grid(x, self.scale, self.zero_point, self.maximum)


@jax.jit
def round_to_grid(x: Array, scale: Any, zero_point: Any, maximum: Any) -> Array:
    """The nearest of the numbers scale · (q - zero_point), for q from 0 to ``maximum``."""
    q = jnp.clip(jnp.floor(x / scale + 0.5) + zero_point, 0, maximum)
    return ((q - zero_point) * scale).astype(x.dtype)
