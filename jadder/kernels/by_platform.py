"""Kernels chosen when a program is lowered: one implementation for a platform, one for the rest."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jadder.kernels.interface import ByName, Kernels
from jadder.kernels.layout import Layout


@dataclasses.dataclass(frozen=True)
class ByPlatform(ByName):
    """``kernels`` where a program is lowered for ``platform``, ``default`` elsewhere."""

    platform: str
    kernels: Kernels
    default: Kernels

    def on(self, platform: str) -> Kernels:
        """Those of one platform, for who knows it already: the others are not traced then."""
        return self.kernels if platform == self.platform else self.default

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        chosen, default = (
            functools.partial(getattr(kernels, function), **options)
            for kernels in (self.kernels, self.default)
        )
        return lax.platform_dependent(*operands, default=default, **{self.platform: chosen})


@dataclasses.dataclass(frozen=True)
class Refused(ByName):
    """Kernels that no program can be lowered with.

    Attributes:
      reason: for the ValueError.
      unavailable: a better one, if there is.
    """

    reason: str
    unavailable: Callable[[], str | None]

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        layout = Layout.of(function, options.get("spec"), (), [each.shape for each in operands])
        shape, dtype = layout.shape(layout.result), jax.numpy.dtype(options["out_dtype"])
        return _refused_p.bind(*operands, shape=shape, dtype=dtype, by=self)


_refused_p = Primitive("refused_adder_product")


def _result_type(
    *operands: ShapedArray, shape: tuple[int, ...], dtype: Any, by: Refused
) -> ShapedArray:
    return operands[0].update(shape=shape, dtype=dtype, weak_type=False)


def _refuse(*_: Any, shape: tuple[int, ...], dtype: Any, by: Refused) -> Any:
    raise ValueError(f"{by.reason}: {by.unavailable() or 'this program is for another platform'}")


def _map(
    operands: Sequence[Array],
    dimensions: Sequence[int | None],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    by: Refused,
) -> tuple[Array, int]:
    pairs = zip(operands, dimensions, strict=True)
    size = next(each.shape[d] for each, d in pairs if d is not None)
    return _refused_p.bind(*operands, shape=(size, *shape), dtype=dtype, by=by), 0


_refused_p.def_impl(_refuse)
_refused_p.def_abstract_eval(_result_type)
batching.primitive_batchers[_refused_p] = _map
mlir.register_lowering(_refused_p, _refuse)
