"""The Euclid product -Σ(x - w)² by XLA, with the functions that all implementations have.

Its gradients are those of the rule ψ(d) = 2 d, for callers to ask for.
"""

import dataclasses
from typing import Any

from jax import Array, lax

from jadder.kernels import linear
from jadder.kernels.interface import ByName


@dataclasses.dataclass(frozen=True)
class EuclidXlaKernels(ByName):
    """Matrix products and convolutions, on any platform.

    Attributes:
      precision: of the forward product; a gradient is told its own.
    """

    precision: lax.PrecisionLike = lax.Precision.HIGHEST

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        if function in ("matmul", "conv"):
            function, options = f"euclid_{function}", {**options, "precision": self.precision}
        result: Array = getattr(linear, function)(*operands, **options)
        return result
