"""What makes adder ResNets train: one change at a time from a common recipe, twins alike."""

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
from experiments.common.drawing import save
from experiments.images.augment import normalize, random_crop, random_flip
from experiments.studies.ablations import check_teachers, find_teacher, picture
from experiments.studies.command import Experiment, Place
from experiments.studies.keep import Step, keeping
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.study import (
    Trained,
    TrainingOptions,
    accuracy_table,
    by_label,
    changed,
    train,
    with_seeds,
)
from experiments.training import steps
from experiments.training.config import TrainConfig
from experiments.training.recipes import CENTERED, INSIDE
from experiments.training.run import Run
from jadder.models import update_statistics

ABOUT = """\
What makes adder ResNets train: a common recipe, with one thing changed at a time.

The recipe is AdderNet's with small steps (eta 0.1), kernels that stay where their inputs are
(between -0.25 and 2.5), and the mean over the channels taken away before each normalisation.

A fixed proxy: ResNet-8 (--model takes another), the first 20,000 training images of CIFAR-10, 8
epochs, batch 128, crop and flip, SGD with rate 0.1, warm-up and cosine; judged on the last 5,000
training images, which no run trains on. Every run takes all seeds of --seeds. Changes that suit any
network are tried on the multiplying twin as well. Of every run the moving average of its weights is
judged too, with batch statistics of its own.
"""
_FREE: Mapping[str, Any] = {"kernel_min": None, "kernel_max": None}
_TWIN: Mapping[str, Any] = {"family": ("conv",), "model_options": (), **_FREE}
CHANGES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "recipe": {},
        "twin": _TWIN,
        "kernels free, eta 0.4": {**_FREE, "eta": 0.4},
        "kernels free": _FREE,
        "eta 0.2": {"eta": 0.2},
        "eta 0.05": {"eta": 0.05},
        "batch 64": {"batch_size": 64},
        "twin, batch 64": {**_TWIN, "batch_size": 64},
        "Muon": {"optimizer": "muon"},
        "twin, Muon": {**_TWIN, "optimizer": "muon", "eta": 0.04},
        "Euclid's distance first": {"anneal": "distance_half"},
        "gradients exact in the end": {"anneal": "exact"},
        "Euclid's distance first, gradients exact in the end": {"anneal": "distance_exact"},
        "learning from the twin": {"teacher": "twin", "distill_temperature": 4.0},
        "twin learning from the twin": {**_TWIN, "teacher": "twin", "distill_temperature": 4.0},
        "not centred": {"model_options": ()},
        "HT(4d)": {"rule": "adder_vit"},
        "HT(d/2)": {"rule": "wide"},
        "kernels in [-0.1, 1.5]": {"kernel_min": -0.1, "kernel_max": 1.5},
        "bias rate x16": {"bias_rate": 16.0},
        "twin, bias rate x16": {**_TWIN, "bias_rate": 16.0},
        "norms not decayed": {"decay_norms": False},
        "twin, norms not decayed": {**_TWIN, "decay_norms": False},
        "label smoothing 0.1": {"label_smoothing": 0.1},
        "twin, label smoothing 0.1": {**_TWIN, "label_smoothing": 0.1},
    }
)
TRAINING = TrainingOptions(
    full=TrainConfig(
        model="resnet8", family=("adder",), dataset="cifar10", epochs=8, limit_train=20_000,
        validation=5_000, model_options=CENTERED, **INSIDE,
    ),
    smoke=TrainConfig(
        model="lenet5", family=("adder",), epochs=1, limit_train=64, batch_size=32, validation=64,
        image_size=8, model_options=CENTERED, **INSIDE,
    ),
    seeds=(0, 1),
)  # fmt: skip
AVERAGE_OVER = 300
"""Steps that the moving average of the weights looks back, about."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--changes", nargs="+", choices=tuple(CHANGES), metavar="CHANGE",
        help="some of: " + "; ".join(CHANGES),
    )  # fmt: skip
    parser.add_argument("--model", help=f"as of experiments.train (default: {TRAINING.full.model})")
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    config = dataclasses.replace(config, model=options.model or config.model)
    names = options.changes or (tuple(CHANGES)[:1] if options.smoke else tuple(CHANGES))
    check_teachers(names, CHANGES)
    # In the order of CHANGES, which has teachers before those who learn from them.
    plans = {name: changed(config, CHANGES[name]) for name in CHANGES if name in names}
    seeded = with_seeds(plans, TRAINING.chosen_seeds(options))
    runs = train(
        {label: find_teacher(plan, place) for label, plan in seeded.items()}, place,
        wrap=averaging, at_end=accuracy_of_average,
    )  # fmt: skip
    save(picture(runs, "recipe"), place.folder / "ablations.png")
    return Outcome(
        f"{config.model} on {config.dataset}: one change at a time",
        tables=[
            accuracy_table("Accuracy on images held back, mean over the seeds", runs),
            average_table(runs),
        ],
        pictures=[Picture("ablations.png", "Each change beside the recipe; a dot for each seed")],
        data={"runs": [{**one.summary(), "average_accuracy": one.seen} for one in runs]},
    )


# -- averages of weights ---------------------------------------------------------------------------


def averaging(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """The same optimizer, which keeps a moving average of the parameters.

    Args:
        tx: the optimizer.
        steps: of the whole run, of which the average looks back over at most a quarter.

    Example:
        >>> tx = averaging(optax.sgd(1.0), steps=8)
        >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)), jnp.zeros(1))
        >>> state.record.tolist()  # half of the way to -1
        [-0.5]
    """
    share = 1 / min(AVERAGE_OVER, max(1, steps // 4))

    def begin(params: optax.Params) -> optax.Params:
        return jax.tree.map(jnp.copy, params)

    def after(average: optax.Params, step: Step) -> optax.Params:
        return optax.incremental_update(step.new_params, average, share)

    return keeping(tx, begin, after)


def accuracy_of_average(run: Run) -> float:
    """Of a finished run's averaged weights, with statistics of 64 augmented training batches."""
    average = run.state["optimizer"].record
    model = nnx.merge(run.graphdef, average, run.state["model"])
    update_statistics(model, _batches(run, 64))
    _, params, rest = steps.split(model)
    run.state = {**run.state, "params": params, "model": rest}
    return run.evaluate(run.dataset.test_images, run.dataset.test_labels)[1]


def _batches(run: Run, count: int) -> list[jax.Array]:
    """Training images as the network has been given them, at most `count` batches."""
    data, size = run.dataset, run.config.batch_size
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
    batches = []
    for number in range(min(count, len(data.train_images) // size)):
        key = jax.random.fold_in(jax.random.key(run.config.seed), number)
        x = jnp.asarray(data.train_images[np.arange(number * size, (number + 1) * size)])
        x = random_crop(jax.random.fold_in(key, 0), x, data.crop_padding)
        x = random_flip(jax.random.fold_in(key, 1), x) if data.flip else x
        batches.append(normalize(x, mean, std))
    return batches


def average_table(runs: Sequence[Trained]) -> Table:
    """What the average of the weights adds to each change's accuracy."""
    rows: list[list[Any]] = []
    for label, group in by_label(runs).items():
        done = [one for one in group if one.seen is not None]
        last = statistics.fmean(one.test_accuracy or 0.0 for one in done) if done else None
        mean = statistics.fmean(one.seen for one in done) if done else None
        gain = None if last is None or mean is None else 100 * (mean - last)
        rows.append([label, last, mean, gain])
    columns = ["network", "last weights", "average", "gain (points)"]
    formats = {"last weights": ".2%", "average": ".2%", "gain (points)": "+.2f"}
    return Table("The last weights beside their moving average", columns, rows, formats)


EXPERIMENT = Experiment("resnet_recipe", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
