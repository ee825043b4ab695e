"""What every implementation of the products offers: six functions over one layout.

Shapes: for the matmul x (B, M, K), w (B, K, N) and g (B, M, N); for the convolution
x (B, *spatial, C), w (*window, C / groups, F) and g (B, *out, F). No dimension is empty. Operands
may be narrower than ``out_dtype``, which is the type to compute, accumulate and return in.
``precision`` is that of the matrix products inside a gradient, where there are any.
"""

import abc
from typing import Any, Protocol

from jax import Array, lax
from jax.typing import DTypeLike

from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip


class Kernels(Protocol):
    """The adder products and the gradients of their potentials."""

    def matmul(self, x: Array, w: Array, *, out_dtype: DTypeLike) -> Array: ...

    def matmul_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array: ...

    def matmul_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array: ...

    def conv(self, x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array: ...

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
    ) -> Array: ...

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
    ) -> Array: ...


class ByName(abc.ABC):
    """Kernels that do the same around each of the six functions of others."""

    @abc.abstractmethod
    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        """The function of that name; whatever is no array is an option."""

    def matmul(self, x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
        return self._call("matmul", x, w, out_dtype=out_dtype)

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
        return self._call("matmul_dx", x, w, g, clip=clip, out_dtype=out_dtype, precision=precision)

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
        return self._call("matmul_dw", x, w, g, clip=clip, out_dtype=out_dtype, precision=precision)

    def conv(self, x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
        return self._call("conv", x, w, spec=spec, out_dtype=out_dtype)

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
        return self._call(
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
        return self._call(
            "conv_dw", x, w, g, spec=spec, clip=clip, out_dtype=out_dtype, precision=precision
        )
