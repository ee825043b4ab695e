"""Gradient rules: what stands in for sign(d) when the derivative of |d| is taken.

The published rules are one family. Each operand of ``y = -Σ|x - w|`` has an odd function
``ψ(d) = clip(scale · d, -bound, bound)``, and

    ∂y/∂x = ψ_x(w - x)        ∂y/∂w = ψ_kernel(x - w).

ψ is the derivative of a potential ρ, so each half of a rule is the exact gradient of ``-Σρ``:
that is how the tests check it, and how its behaviour can be thought about.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Clip(NamedTuple):
    """The odd function ψ(d) = clip(scale · d, -bound, bound).

    ``bound=inf`` is the full-precision rule ψ(d) = scale · d, and ``scale=inf`` is the limit of a
    steep ramp, ψ(d) = bound · sign(d).

    Example:
      >>> hard_tanh = Clip(scale=4.0, bound=1.0)
      >>> [float(hard_tanh(d)) for d in (-1.0, 0.125, 3.0)]
      [-1.0, 0.5, 1.0]
    """

    scale: float = 1.0
    bound: float = math.inf

    @property
    def is_linear(self) -> bool:
        """Whether ψ is the full-precision rule, so that gradients are matrix products."""
        return math.isinf(self.bound)

    @property
    def is_sign(self) -> bool:
        """Whether ψ is a multiple of the sign function."""
        return math.isinf(self.scale)

    def __call__(self, difference: ArrayLike) -> Array:
        """ψ of ``difference``, element by element, in its dtype. NaN stays NaN."""
        difference = jnp.asarray(difference)
        if self.is_sign:
            return jnp.sign(difference) * self.bound
        scaled = difference if self.scale == 1 else difference * self.scale
        return scaled if self.is_linear else jnp.clip(scaled, -self.bound, self.bound)

    def potential(self, difference: ArrayLike) -> Array:
        """ρ with ρ' = ψ and ρ(0) = 0: a parabola, continued by tangents from |ψ| = bound on.

        Example:
          >>> float(Clip(1.0, 1.0).potential(3.0))  # Huber's function: |d| - 1/2
          2.5
        """
        magnitude = jnp.abs(jnp.asarray(difference))
        if self.is_sign:
            return self.bound * magnitude
        if self.is_linear:
            return 0.5 * self.scale * magnitude**2
        knee = self.bound / self.scale
        inner = jnp.minimum(magnitude, knee)
        return 0.5 * self.scale * inner**2 + self.bound * (magnitude - inner)


_HARD_TANH = Clip(1.0, 1.0)
_FULL_PRECISION = Clip(1.0, math.inf)


@dataclasses.dataclass(frozen=True)
class GradientRule:
    """The pair of functions ψ that an adder product differentiates with.

    Attributes:
      x: ``(scale, bound)`` of ψ_x, the rule of the input's gradient.
      kernel: ``(scale, bound)`` of ψ_kernel, the rule of the kernel's gradient. The default, full
        precision, makes that gradient a matrix product; any finite bound costs as much as the
        forward pass several times over.

    Raises:
      ValueError: a scale or bound that is not positive, or both infinite.

    Example:
      >>> GradientRule(x=(2.0, 1.0))
      GradientRule(x=Clip(scale=2.0, bound=1.0), kernel=Clip(scale=1.0, bound=inf))
    """

    x: Clip = _HARD_TANH
    kernel: Clip = _FULL_PRECISION

    def __post_init__(self) -> None:
        for name in ("x", "kernel"):
            pair = getattr(self, name)
            try:
                scale, bound = (float(value) for value in pair)
            except (TypeError, ValueError):
                raise ValueError(
                    f"GradientRule {name} must be a pair (scale, bound), got {pair!r}"
                ) from None
            if not (scale > 0 and bound > 0) or (math.isinf(scale) and math.isinf(bound)):
                raise ValueError(
                    f"GradientRule {name} needs scale > 0 and bound > 0, not both infinite, "
                    f"got (scale, bound) = ({scale}, {bound})"
                )
            object.__setattr__(self, name, Clip(scale, bound))


ADDERNET = GradientRule(x=Clip(1.0, 1.0), kernel=Clip(1.0, math.inf))
"""HardTanh for the input, full precision for the kernel: AdderNet (CVPR 2020), eqs. 2-4."""

ADDER_VIT = GradientRule(x=Clip(4.0, 1.0), kernel=Clip(1.0, math.inf))
"""HardTanh(4d) for the input, full precision for the kernel: the Adder-ViT repository's README."""

SIGN = GradientRule(x=Clip(math.inf, 1.0), kernel=Clip(math.inf, 1.0))
"""The subgradient of the L1 distance itself."""


def check_rule(name: str, rule: object) -> None:
    """Refuses what is no gradient rule.

    Args:
      name: of the caller, for the error.

    Raises:
      TypeError: with the rules that there are.
    """
    if not isinstance(rule, GradientRule):
        raise TypeError(
            f"{name}: rule must be a GradientRule: jadder.ADDERNET, jadder.ADDER_VIT, jadder.SIGN "
            f"or one of your own, got {rule!r}"
        )
