"""The recipes: which optimizer a model takes, and the course of its learning rate."""

import dataclasses
from typing import Any

import optax

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
    rate, decay = {"sgd": (0.1, 5e-4), "adamw": (1e-3, 0.05)}[name]
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
    adaptive = config.adaptive_scaling
    if recipe.optimizer == "sgd" and adaptive == "off":
        decay = optax.add_decayed_weights(recipe.weight_decay)
        return optax.chain(decay, optax.sgd(schedule, config.momentum))
    if recipe.optimizer == "sgd":
        return jadder.optim.adder_sgd(
            schedule,
            config.momentum,
            weight_decay=recipe.weight_decay,
            eta=config.eta,
            mask=mask,
        )
    tx = jadder.optim.adder_adamw(
        schedule,
        weight_decay=recipe.weight_decay,
        adder_learning_rate_multiplier=config.adder_rate,
        mask=mask,
    )
    if adaptive == "on":
        return optax.chain(jadder.optim.scale_by_adder(config.eta, mask=mask), tx)
    return tx
