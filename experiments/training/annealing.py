"""Adder products that change while a network trains, in stages.

What is evaluated in the end is what would be without annealing: the last stage has the network's
own products, or products that differ in how they are differentiated.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from experiments.common.errors import UserError
from jadder import set_l1_share
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral, AdderKernel
from jadder.rules import Clip, GradientRule

Product = AdderDotGeneral | AdderConvGeneralDilated

RULE_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the slope of ψ_x: HT(4d) begins as HT(d/2), which is linear where the rule clips later."""

L1_SHARES = (0.0, 1 / 3, 2 / 3, 1.0)
"""As of `jadder.set_l1_share`: the distance begins as Euclid's."""

STEEPNESSES = (1.0, 2.0, 4.0)
"""Factors of the slopes of ψ_x and ψ_w, which come nearer to the sign, the true derivative."""

BEGINNINGS: Mapping[str, tuple[int, ...]] = {
    "none": (0,),
    "rule": (0, 3, 6, 9),
    "distance": (0, 3, 6, 9),
    "distance_half": (0, 2, 4, 6),
    "exact": (0, 6, 9),
}
"""When the stages of each kind of annealing begin, in twelfths of a run."""


def stages(model: nnx.Module, anneal: str) -> list[nnx.GraphDef[Any]]:
    """The structures of the model in each stage.

    Args:
        model: what is trained. It is as before when this returns.
        anneal: 'none' (one stage) or another of `config.ANNEALINGS`. The last stage is the
            model's own; of 'exact' it differs by its gradient rules.

    Raises:
        UserError: the model has nothing to anneal.
    """
    if anneal == "none":
        return [nnx.graphdef(model)]
    if not jax.tree.leaves(nnx.state(model, AdderKernel)):
        raise UserError(f"--anneal {anneal}: the network has no adder products")
    if anneal == "exact":
        return _changed(model, _steeper, STEEPNESSES)
    if anneal == "rule":
        return _changed(model, _with_slope, RULE_FACTORS)
    return _distances(model)


def stage_of(step: int, total_steps: int, anneal: str) -> int:
    """Which of the stages of a run a step (from 0) belongs to.

    Example:
        >>> [stage_of(step, 8, "distance") for step in range(8)]
        [0, 0, 1, 1, 2, 2, 3, 3]
        >>> [stage_of(step, 6, "distance_half") for step in range(6)]
        [0, 1, 2, 3, 3, 3]
    """
    return sum(12 * step >= begin * total_steps for begin in BEGINNINGS[anneal]) - 1


def products(model: nnx.Module) -> list[tuple[Any, str, Product]]:
    """Every adder product of a model: the module that has it, the attribute's name, itself."""
    return [
        (module, name, value)
        for _, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Product)
    ]


def _distances(model: nnx.Module) -> list[nnx.GraphDef[Any]]:
    structures = []
    for share in L1_SHARES:
        set_l1_share(model, share)
        structures.append(nnx.graphdef(model))
    return structures


def _changed(
    model: nnx.Module, change: Callable[[Product, float], Product], factors: Sequence[float]
) -> list[nnx.GraphDef[Any]]:
    """The structures of the model with all its products changed, by each factor."""
    found, structures = products(model), []
    for factor in factors:
        for module, name, product in found:
            setattr(module, name, change(product, factor))
        structures.append(nnx.graphdef(model))
    for module, name, product in found:
        setattr(module, name, product)
    return structures


def _steeper(product: Product, factor: float) -> Product:
    """The product with a factor on both slopes; the full-precision rule is bounded by 1 then."""
    if factor == 1:
        return product
    rules = (
        Clip(one.scale * factor, 1.0 if one.is_linear else one.bound)
        for one in (product.rule.x, product.rule.kernel)
    )
    return dataclasses.replace(product, rule=GradientRule(*rules))


def _with_slope(product: Product, factor: float) -> Product:
    """The product with ψ_x's slope times `factor`.

    Raises:
        UserError: ψ_x is the sign, which has none.
    """
    scale, bound = product.rule.x
    if math.isinf(scale):
        raise UserError("--anneal rule needs a rule with a slope, such as HT(4d), not the sign")
    wide = Clip(scale * factor, bound)
    # Of attention's scores no operand is a kernel: both have the rule of inputs.
    kernel = wide if product.rule.kernel == product.rule.x else product.rule.kernel
    return dataclasses.replace(product, rule=GradientRule(wide, kernel))
