"""The recipes: which optimizer a model takes, and the course of its learning rate."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib

import jadder.optim
from experiments.training.config import TrainConfig

TRANSFORMERS = ("vit", "swin")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer with nothing left open."""

    optimizer: str
    learning_rate: float
    weight_decay: float


def choose(config: TrainConfig) -> Recipe:
    """Fills in what the configuration leaves to the model: adamw for transformers, else sgd."""
    name = config.optimizer
    if name == "auto":
        name = "adamw" if config.model in TRANSFORMERS else "sgd"
    rate, decay = {"adamw": (1e-3, 0.05)}.get(name, (0.1, 5e-4))
    return Recipe(
        name,
        rate if config.learning_rate is None else config.learning_rate,
        decay if config.weight_decay is None else config.weight_decay,
    )


def warmup_cosine(
    peak: float, *, total_steps: int, steps_per_epoch: int, warmup_epochs: float
) -> optax.Schedule:
    """A linear rise to `peak`, then a cosine that reaches 0 at `total_steps`.

    The rise takes `warmup_epochs`, at most a tenth of the run. Its first step has the rate
    peak / warmup, so that no step is lost.
    """
    warmup = max(1, round(min(warmup_epochs * steps_per_epoch, total_steps // 10)))
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    fall = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup))
    return optax.join_schedules([rise, fall], [warmup])


def make(
    config: TrainConfig, recipe: Recipe, schedule: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """The transformation of the recipe; `mask` tells adder kernels from other parameters."""
    parts = _BY_NAME[recipe.optimizer](config, recipe, schedule, mask)
    low, high = config.kernel_min, config.kernel_max
    if low is not None or high is not None:
        parts.append(jadder.optim.clip_adder_kernels(low, high, mask=mask))
    # A chain of one would have checkpoints of another structure than those of earlier versions.
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


Parts = list[optax.GradientTransformation]
"""Of a chain."""


def _sgd(config: TrainConfig, recipe: Recipe, schedule: optax.Schedule, mask: Any) -> Parts:
    """AdderNet's recipe, `jadder.adder_sgd`, with what options change of it."""
    scaling = jadder.optim.scale_by_adder(config.eta, mask=mask)
    return [
        *([] if config.adaptive_scaling == "off" else [scaling]),
        *_plain_sgd(config, recipe, schedule),
    ]


def _plain_sgd(config: TrainConfig, recipe: Recipe, schedule: optax.Schedule) -> Parts:
    decayed = None if config.decay_norms else _kernels
    parts = [
        optax.add_decayed_weights(recipe.weight_decay, decayed),
        optax.sgd(schedule, config.momentum),
    ]
    if config.bias_rate != 1:
        parts.append(optax.masked(optax.scale(config.bias_rate), _biases))
    return parts


def _adamw(config: TrainConfig, recipe: Recipe, schedule: optax.Schedule, mask: Any) -> Parts:
    scaling = jadder.optim.scale_by_adder(config.eta, mask=mask)
    adamw = jadder.optim.adder_adamw(
        schedule,
        weight_decay=recipe.weight_decay,
        adder_learning_rate_multiplier=config.adder_rate,
        mask=mask,
    )
    return [scaling, adamw] if config.adaptive_scaling == "on" else [adamw]


def _muon(config: TrainConfig, recipe: Recipe, schedule: optax.Schedule, mask: Any) -> Parts:
    """Orthogonalised steps for adder kernels, or where there are none for kernels of convolutions.

    A kernel (..., in, out) is taken as a matrix (all else, out).
    """

    def labels(params: optax.Params) -> Any:
        adders = mask(params) if callable(mask) else mask
        adders = jax.tree.map(lambda marked, _: bool(np.any(marked)), adders, params)
        if any(jax.tree.leaves(adders)):
            chosen = adders
        else:
            chosen = jax.tree.map(lambda param: param.ndim == 4, params)
        return jax.tree.map(lambda one: "orthogonal" if one else "plain", chosen)

    def axes(params: optax.Params) -> Any:
        return jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1),
            params,
        )

    orthogonal = optax.contrib.muon(
        schedule,
        beta=config.momentum,
        weight_decay=recipe.weight_decay,
        consistent_rms=config.eta,
        muon_weight_dimension_numbers=axes,
    )
    plain = optax.chain(*_plain_sgd(config, recipe, schedule))
    return [optax.partition({"orthogonal": orthogonal, "plain": plain}, labels)]


def _kernels(params: optax.Params) -> Any:
    """What is neither a scale nor a bias, those of normalisations included."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _leaf_name(path) not in ("scale", "bias"), params
    )


def _biases(params: optax.Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) == "bias", params)


def _leaf_name(path: Any) -> str:
    return str(path[-1].key)


_BY_NAME: Mapping[str, Callable[[TrainConfig, Recipe, optax.Schedule, Any], Parts]] = {
    "sgd": _sgd,
    "muon": _muon,
    "adamw": _adamw,
}
