"""Adder products that change while a network trains: in stages, from an easier one to their own.

A run has as many stages of equal length as there are products; the last one is the network's own,
so that what is evaluated in the end is what would be without annealing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from experiments.common.errors import UserError
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral, AdderKernel
from jadder.ops import euclid_conv_general_dilated, euclid_dot_general
from jadder.rules import Clip, GradientRule

Product = AdderDotGeneral | AdderConvGeneralDilated

RULE_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the slope of ψ_x: HT(4d) begins as HT(d/2), which is linear where the rule clips later."""

L1_SHARES = (0.0, 1 / 3, 2 / 3, 1.0)
"""Of Σ|x - w| in the distance; the rest is Σ(x - w)²/2, whose gradient is the full-precision one.

The published way lowers the exponent p of |x - w|^p from 2 to 1 (Chen et al., Universal Adder
Neural Networks, 2021, arXiv:2105.14202). A mean of both ends of it needs no powers.
"""


@dataclasses.dataclass(frozen=True)
class MixedProduct:
    """-Σ(share · |x - w| + (1 - share) · (x - w)²/2), in place of an adder product."""

    adder: Product
    share: float

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        convolves = isinstance(self.adder, AdderConvGeneralDilated)
        euclid: Callable[..., Array] = (
            euclid_conv_general_dilated if convolves else euclid_dot_general
        )
        halved = 0.5 * (1 - self.share) * euclid(lhs, rhs, *args, **kwargs)
        if self.share == 0:
            return halved
        return halved + self.share * self.adder(lhs, rhs, *args, **kwargs)


def stages(model: nnx.Module, anneal: str) -> list[nnx.GraphDef[Any]]:
    """The structures of the model in each stage, the last of which is its own.

    Args:
        model: what is trained. It is as before when this returns.
        anneal: 'none' (one stage), 'rule' or 'distance', as in `config.ANNEALINGS`.

    Raises:
        UserError: the model has nothing to anneal.
    """
    if anneal == "none":
        return [nnx.graphdef(model)]
    if not jax.tree.leaves(nnx.state(model, AdderKernel)):
        raise UserError(f"--anneal {anneal}: the network has no adder products")
    found = _products(model)
    structures = []
    for value in RULE_FACTORS if anneal == "rule" else L1_SHARES:
        for module, name, product in found:
            setattr(module, name, _changed(product, anneal, value))
        structures.append(nnx.graphdef(model))
    return structures


def stage_of(step: int, total_steps: int, count: int) -> int:
    """Which of `count` stages of a run a step (from 0) belongs to.

    Example:
        >>> [stage_of(step, 8, 4) for step in range(8)]
        [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return min(step * count // total_steps, count - 1)


def _products(model: nnx.Module) -> list[tuple[Any, str, Product]]:
    """Every adder product of a model: the module that has it, the attribute's name, itself."""
    return [
        (module, name, value)
        for _, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Product)
    ]


def _changed(product: Product, anneal: str, value: float) -> Product | MixedProduct:
    if value == 1:
        return product
    if anneal == "distance":
        return MixedProduct(product, value)
    return _with_slope(product, value)


def _with_slope(product: Product, factor: float) -> Product:
    """The product with ψ_x's slope times `factor`.

    Raises:
        UserError: ψ_x is the sign, which has none.
    """
    scale, bound = product.rule.x
    if np.isinf(scale):
        raise UserError("--anneal rule needs a rule with a slope, such as HT(4d), not the sign")
    wide = Clip(scale * factor, bound)
    # Of attention's scores no operand is a kernel: both have the rule of inputs.
    kernel = wide if product.rule.kernel == product.rule.x else product.rule.kernel
    return dataclasses.replace(product, rule=GradientRule(wide, kernel))
