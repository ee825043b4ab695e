"""Adder products that change while a network trains, in stages.

What is evaluated in the end is what would be without annealing: the last stage has the network's
own products, or products that differ in how they are differentiated.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from experiments.common.errors import UserError
from jadder import set_l1_share
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral, AdderKernel
from jadder.rules import Clip, GradientRule

Product = AdderDotGeneral | AdderConvGeneralDilated


@dataclasses.dataclass(frozen=True)
class Stage:
    """What products are in a part of a run.

    Attributes:
        begin: when, in twelfths of the run.
        l1_share: as of `jadder.set_l1_share`: at 0 the distance is Euclid's, at 1 the adder's.
        slope: a factor of ψ_x's slope: at 1/8 HT(4d) is HT(d/2), linear where it clips later.
        steepness: a factor of the slopes of ψ_x and ψ_w, which come nearer to the sign, the true
            derivative.
    """

    begin: int
    l1_share: float = 1.0
    slope: float = 1.0
    steepness: float = 1.0


STAGES: Mapping[str, tuple[Stage, ...]] = {
    "none": (Stage(0),),
    "rule": (Stage(0, slope=1 / 8), Stage(3, slope=1 / 4), Stage(6, slope=1 / 2), Stage(9)),
    "distance": (Stage(0, 0), Stage(3, 1 / 3), Stage(6, 2 / 3), Stage(9)),
    "distance_half": (Stage(0, 0), Stage(2, 1 / 3), Stage(4, 2 / 3), Stage(6)),
    "exact": (Stage(0), Stage(6, steepness=2), Stage(9, steepness=4)),
    "distance_exact": (
        Stage(0, 0), Stage(2, 1 / 3), Stage(4, 2 / 3), Stage(6, steepness=2), Stage(9, steepness=4)
    ),
}  # fmt: skip
"""The kinds of annealing."""


def stages(model: nnx.Module, anneal: str) -> list[nnx.GraphDef[Any]]:
    """The structures of the model in each stage.

    Args:
        model: what is trained. It is as before when this returns.
        anneal: 'none' (one stage) or another of `config.ANNEALINGS`. The last stage is the
            model's own, or differs by its gradient rules.

    Raises:
        UserError: the model has nothing to anneal.
    """
    if anneal == "none":
        return [nnx.graphdef(model)]
    if not jax.tree.leaves(nnx.state(model, AdderKernel)):
        raise UserError(f"--anneal {anneal}: the network has no adder products")
    found, structures = products(model), []
    for stage in STAGES[anneal]:
        for module, name, product in found:
            setattr(module, name, _steeper(_sloped(product, stage.slope), stage.steepness))
        set_l1_share(model, stage.l1_share)
        structures.append(nnx.graphdef(model))
    for module, name, product in found:
        setattr(module, name, product)
    return structures


def stage_of(step: int, total_steps: int, anneal: str) -> int:
    """Which of the stages of a run a step (from 0) belongs to.

    Example:
        >>> [stage_of(step, 8, "distance") for step in range(8)]
        [0, 0, 1, 1, 2, 2, 3, 3]
        >>> [stage_of(step, 6, "distance_half") for step in range(6)]
        [0, 1, 2, 3, 3, 3]
    """
    return sum(12 * step >= stage.begin * total_steps for stage in STAGES[anneal]) - 1


def products(model: nnx.Module) -> list[tuple[Any, str, Product]]:
    """Every adder product of a model: the module that has it, the attribute's name, itself."""
    return [
        (module, name, value)
        for _, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, Product)
    ]


def _steeper(product: Product, factor: float) -> Product:
    """The product with a factor on both slopes; the full-precision rule is bounded by 1 then."""
    if factor == 1:
        return product
    rules = (
        Clip(one.scale * factor, 1.0 if one.is_linear else one.bound)
        for one in (product.rule.x, product.rule.kernel)
    )
    return dataclasses.replace(product, rule=GradientRule(*rules))


def _sloped(product: Product, factor: float) -> Product:
    """The product with ψ_x's slope times `factor`.

    Raises:
        UserError: ψ_x is the sign, which has none.
    """
    if factor == 1:
        return product
    scale, bound = product.rule.x
    if math.isinf(scale):
        raise UserError("--anneal rule needs a rule with a slope, such as HT(4d), not the sign")
    wide = Clip(scale * factor, bound)
    # Of attention's scores no operand is a kernel: both have the rule of inputs.
    kernel = wide if product.rule.kernel == product.rule.x else product.rule.kernel
    return dataclasses.replace(product, rule=GradientRule(wide, kernel))
