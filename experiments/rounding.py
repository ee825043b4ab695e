"""Whole trainings with products in sixteen bits, beside the same trainings by exact ones."""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.errors import UserError
from experiments.images.augment import normalize
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Table
from experiments.studies.study import (
    Trained,
    TrainingOptions,
    by_label,
    changed,
    comparison,
    train,
    with_seeds,
)
from experiments.training import annealing
from experiments.training.build import build_model
from experiments.training.config import IMPLEMENTATIONS, TrainConfig
from experiments.training.recipes import RECIPES
from experiments.training.run import Run
from jadder.nn import adder_mask

ABOUT = """\
Does rounding within the products harm a training?

cpu_int16 rounds x and w to eleven bits on a grid that both share; cpu_fast takes short cuts of
another kind. Each network is trained with each of --implementations, all else equal, over several
seeds: accuracy after the last epoch, and how far the gradients of the trained network lie from
those by the first implementation, |g - g₀| / |g₀| in the 2-norm, over all parameters and of the
adder kernel where it is largest, on one batch of training images. ResNet-20 by the recipe `exact`,
AdderViT as experiments.simple_vit's final_batch.
"""
NETWORKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "resnet20": RECIPES["exact"],
        "vit": {
            "model_options": ("family_parts=qkv,mlp", "norm=batch"),
            "batch_size": 64,
            "weight_decay": 2e-3,
        },
    }
)
TRAINING = TrainingOptions(
    full=TrainConfig(model="auto", family=("adder",), dataset="cifar10", epochs=5),
    smoke=TrainConfig(
        model="lenet5", family=("adder",), epochs=1, limit_train=64, batch_size=32, image_size=8
    ),
    seeds=(0, 1, 2),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=["cpu", "cpu_int16"],
        help="the first is what others are compared with (default: cpu cpu_int16)",
    )  # fmt: skip
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    if options.implementation is not None:
        raise UserError("--implementation: this study takes several, as --implementations")
    names = tuple(dict.fromkeys(options.implementations))
    config = TRAINING.config(options)
    networks = {config.model: config}
    if not options.smoke:
        given = {} if options.batch_size is None else {"batch_size": options.batch_size}
        networks = {
            name: changed(config, {"model": name, **NETWORKS[name], **given})
            for name in options.networks
        }
    plans = {
        f"{network}, {name}": dataclasses.replace(plan, implementation=name)
        for network, plan in networks.items()
        for name in names
    }
    runs = train(
        with_seeds(plans, TRAINING.chosen_seeds(options)),
        place,
        at_end=lambda run: gradient_errors(run, names),
    )
    outcome = comparison(
        f"Rounded products, {config.epochs} epochs on {config.dataset}", runs, place
    )
    return dataclasses.replace(
        outcome,
        tables=[*outcome.tables, error_table(runs)],
        data={"runs": [{**one.summary(), "gradient_errors": one.seen} for one in runs]},
    )


def gradient_errors(run: Run, implementations: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the run's network as it is in the end, by each implementation but the first.

    Returns:
        'all', the distance of all gradients together from those by the first implementation,
        relative to their norm, and 'worst', the largest of a parameter's own.
    """
    exact, *others = (_gradients(run, name) for name in implementations)
    kernels = adder_mask(build_model(run.config, run.family, run.dataset))(run.state["params"])
    return {
        name: distances(gradients, exact, kernels)
        for name, gradients in zip(implementations[1:], others, strict=True)
    }


def distances(gradients: Any, exact: Any, kernels: Any) -> dict[str, float]:
    """‖g - g₀‖ / ‖g₀‖ of trees of gradients: of all and, of those marked in `kernels`, the largest.

    Example:
        >>> one, other = [np.array([3.0]), np.array([4.0])], [np.array([3.0]), np.array([5.0])]
        >>> distances(one, other, [True, True])
        {'all': 0.171499, 'worst': 0.2}
    """
    pairs = [
        (float(np.linalg.norm(np.subtract(g, e))), float(np.linalg.norm(e)))
        for g, e in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True)
    ]
    off, size = (float(np.linalg.norm(column)) for column in zip(*pairs, strict=True))
    marked = [pair for pair, kernel in zip(pairs, jax.tree.leaves(kernels), strict=True) if kernel]
    worst = max((o / e for o, e in marked if e > 0), default=0.0)
    return {"all": float(f"{off / size:.6g}"), "worst": float(f"{worst:.6g}")}


def _gradients(run: Run, implementation: str) -> Any:
    """Of the loss on the first batch of training images, as they are, by the last stage's rules."""
    config, dataset = run.config, run.dataset
    model = build_model(
        dataclasses.replace(config, implementation=implementation), run.family, dataset
    )
    graphdef = annealing.stages(model, config.anneal)[-1]
    x = normalize(
        jnp.asarray(dataset.train_images[: config.batch_size]),
        *(jnp.asarray(m, run.dtype) for m in (dataset.mean, dataset.std)),
    )
    labels = jnp.asarray(dataset.train_labels[: config.batch_size])

    def loss(params: Any, rest: Any) -> jax.Array:
        network = nnx.merge(graphdef, params, rest)
        network.train()
        return optax.softmax_cross_entropy_with_integer_labels(network(x), labels).mean()

    return jax.jit(jax.grad(loss))(run.state["params"], run.state["model"])


def error_table(runs: Sequence[Trained]) -> Table:
    """A row for each network and implementation: medians over the seeds."""
    rows: list[list[Any]] = []
    for label, group in by_label(runs).items():
        seen = [one.seen for one in group if one.seen]
        name = group[0].config.implementation
        found = [one[name] for one in seen if name in one]
        if found:
            rows.append(
                [
                    label,
                    *(statistics.median(one[which] for one in found) for which in ("all", "worst")),
                ]
            )
    return Table(
        "Gradients of the trained networks, distance from the exact ones",
        ("network", "all parameters", "worst adder kernel"),
        rows,
        {"all parameters": ".2%", "worst adder kernel": ".2%"},
    )


EXPERIMENT = Experiment("rounding", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
