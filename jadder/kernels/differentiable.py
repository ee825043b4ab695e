"""Kernels that have derivatives, whatever they are: those of `jadder.kernels.xla`'s loops.

A product's first derivatives are kernels too, chosen by a gradient rule. A second derivative is one
of those kernels differentiated as the function that it is, and a foreign call or a Pallas kernel
cannot be. ψ is linear in pieces and |d| as well: the derivatives exist but for points where pieces
meet, and agree with finite differences of the first derivative.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jadder.kernels import xla
from jadder.kernels.interface import ByName, Kernels


@dataclasses.dataclass(frozen=True)
class XlaLoops(ByName):
    """`jadder.kernels.xla` in the form whose derivatives need little memory."""

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        result: Array = getattr(xla, function)(*operands, **options, differentiable=True)
        return result


@dataclasses.dataclass(frozen=True)
class Differentiable(ByName):
    """``kernels``, with the derivatives that ``by`` has."""

    kernels: Kernels
    by: Kernels

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        compute = jax.custom_jvp(functools.partial(getattr(self.kernels, function), **options))
        same = functools.partial(getattr(self.by, function), **options)

        def differentiate(
            primals: Sequence[Array], tangents: Sequence[Array | SymbolicZero]
        ) -> tuple[Array, Array]:
            moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

            def of_moving(*values: Array) -> Array:
                given = list(primals)
                for i, value in zip(moving, values, strict=True):
                    given[i] = value
                return same(*given)

            _, tangent = jax.jvp(
                of_moving, [primals[i] for i in moving], [tangents[i] for i in moving]
            )
            return compute(*primals), tangent

        compute.defjvp(differentiate, symbolic_zeros=True)
        result: Array = compute(*operands)
        return result
