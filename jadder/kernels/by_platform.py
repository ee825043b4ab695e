"""Kernels chosen when a program is lowered: one implementation for the CPU, one for the rest."""

import dataclasses
import functools
from typing import Any

from jax import Array, lax

from jadder.kernels.interface import ByName, Kernels


@dataclasses.dataclass(frozen=True)
class ByPlatform(ByName):
    """``cpu`` where a program is lowered for the CPU, ``default`` elsewhere."""

    cpu: Kernels
    default: Kernels

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        chosen, default = (
            functools.partial(getattr(kernels, function), **options)
            for kernels in (self.cpu, self.default)
        )
        return lax.platform_dependent(*operands, cpu=chosen, default=default)
