"""Kernels chosen when a program is lowered: one implementation for the CPU, one for the rest."""

import dataclasses
import functools
from typing import Any

from jax import Array, lax
from jax.typing import DTypeLike

from jadder.kernels.interface import Kernels
from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip


@dataclasses.dataclass(frozen=True)
class ByPlatform:
    """``cpu`` where a program is lowered for the CPU, ``default`` elsewhere."""

    cpu: Kernels
    default: Kernels

    def matmul(self, x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
        return self._choose("matmul", x, w, out_dtype=out_dtype)

    def matmul_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        return self._choose(
            "matmul_dx", x, w, g, clip=clip, out_dtype=out_dtype, precision=precision
        )

    def matmul_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        return self._choose(
            "matmul_dw", x, w, g, clip=clip, out_dtype=out_dtype, precision=precision
        )

    def conv(self, x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
        return self._choose("conv", x, w, spec=spec, out_dtype=out_dtype)

    def conv_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        spec: ConvSpec,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        return self._choose(
            "conv_dx", x, w, g, spec=spec, clip=clip, out_dtype=out_dtype, precision=precision
        )

    def conv_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        spec: ConvSpec,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        return self._choose(
            "conv_dw", x, w, g, spec=spec, clip=clip, out_dtype=out_dtype, precision=precision
        )

    def _choose(self, function: str, *operands: Array, **options: Any) -> Array:
        chosen, default = (
            functools.partial(getattr(kernels, function), **options)
            for kernels in (self.cpu, self.default)
        )
        return lax.platform_dependent(*operands, cpu=chosen, default=default)
