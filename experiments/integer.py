"""Accuracy in bytes: adder and multiplying networks at 8 to 2 bits, trained for it or not."""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jadder
from experiments.common.allocation import restart_with_huge_pages
from experiments.common.errors import UserError
from experiments.images.dataset import Dataset
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.study import (
    Trained,
    TrainingOptions,
    by_label,
    changed,
    families,
    train,
    with_seeds,
)
from experiments.training.config import TrainConfig
from experiments.training.recipes import RECIPES, add_recipe
from experiments.training.run import Run
from experiments.training.start import calibration_images

ABOUT = """\
Networks of bytes: accuracy of jadder.quantize at 8 to 2 bits, adding and multiplying.

Each family is trained in floats and quantised, without training, on its first 512 training images.
Then the adder network is trained on for --tune-epochs with its operands on the grid
(jadder.fake_quantize), for each of --tune-bits, and beside it as long in floats, so that what is
gained by training longer can be told from what the grid gains. Test images go through the integer
program.

The first and the last product multiply, in 8 bits, as do activations that are added or pooled.
"""
BATCH = 500
TRAINING = TrainingOptions(
    full=TrainConfig(model="auto", dataset="cifar10", epochs=10),
    smoke=TrainConfig(model="lenet5", epochs=1, limit_train=64, batch_size=32, image_size=8),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="as of experiments.train (default: auto)")
    parser.add_argument("--families", nargs="+", choices=("adder", "conv"), metavar="FAMILY",
                        help="(default: adder conv)")  # fmt: skip
    parser.add_argument("--bits", type=int, nargs="+", metavar="N", help="(default: 8 6 5 4 3 2)")
    parser.add_argument("--tune-bits", type=int, nargs="*", metavar="N", help="(default: 3 2)")
    parser.add_argument("--tune-epochs", type=int, default=2, metavar="N",
                        help="epochs with the grid in place (default: 2)")  # fmt: skip
    parser.add_argument("--tune-rate", type=float, default=0.01, metavar="RATE",
                        help="their learning rate (default: 0.01)")  # fmt: skip
    add_recipe(parser)
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    if options.model is not None:
        config = dataclasses.replace(config, model=options.model)
    seeds = TRAINING.chosen_seeds(options)
    bits = options.bits or ([8, 3] if options.smoke else [8, 6, 5, 4, 3, 2])
    tuned = options.tune_bits
    if tuned is None:
        tuned = [3] if options.smoke else [3, 2]
    for each in (*bits, *tuned):
        if not 2 <= each <= 8:
            raise UserError(f"--bits and --tune-bits must be from 2 to 8, got {each}")
    plans = families(config, options.families or ("adder", "conv"))
    recipe = options.recipe or ("short" if config.dataset == "cifar10" else None)
    if "adder" in plans and recipe is not None:
        plans["adder"] = changed(plans["adder"], RECIPES[recipe])
    plans = _each_seed(plans, seeds)
    runs = train(plans, place, at_end=lambda run: accuracies(run, bits))
    for first in list(runs):
        if "adder" in first.config.family and tuned and not first.diverged:
            runs += _tuned(first, tuned, options, place)
    _draw(place.folder / "accuracy.png", runs, bits)
    title = f"{runs[0].config.model} on {config.dataset} in bytes"
    return Outcome(
        title,
        tables=[_table(runs, bits)],
        pictures=[Picture("accuracy.png", "Test accuracy over the bits of the operands")],
        data={"runs": [{**one.summary(), "integer": one.seen} for one in runs]},
    )


def _each_seed(plans: Mapping[str, TrainConfig], seeds: Sequence[int]) -> dict[str, TrainConfig]:
    """The plans for every seed; for a single one under their own names."""
    if len(seeds) > 1:
        return with_seeds(plans, seeds)
    return {label: dataclasses.replace(one, seed=seeds[0]) for label, one in plans.items()}


def _tuned(first: Trained, bits: Sequence[int], options: Any, place: Place) -> list[Trained]:
    """The network trained on, in floats and on each grid."""
    longer = dataclasses.replace(
        first.config, name=None, start=str(first.folder), epochs=options.tune_epochs,
        learning_rate=options.tune_rate, warmup_epochs=0.0,
    )  # fmt: skip
    plans = {f"adder, {options.tune_epochs} epochs more": longer}
    plans |= {f"adder, {n} bits in training": dataclasses.replace(longer, bits=n) for n in bits}
    if first.label != "adder":
        plans = with_seeds(plans, [first.config.seed])
    return train(
        plans,
        place,
        at_end=lambda run: accuracies(run, bits if run.config.bits is None else [run.config.bits]),
    )


def accuracies(run: Run, bits: Sequence[int]) -> dict[str, float]:
    """Test accuracy of a run's network in floats, and as an integer program of each bits."""
    model: Any = nnx.merge(run.graphdef, run.state["params"], run.state["model"])
    dataset = run.dataset
    found = {"float": run.evaluate(dataset.test_images, dataset.test_labels)[1]}
    for n in bits:
        program = jadder.quantize(
            model, calibration_images(dataset), bits=n, mean=dataset.mean, std=dataset.std
        )
        found[str(n)] = accuracy(program, dataset)
    return found


def accuracy(program: Any, dataset: Dataset) -> float:
    """The share of the test images that a program gets right."""
    images, labels = dataset.test_images, np.asarray(dataset.test_labels)
    right = 0
    for start in range(0, len(images), BATCH):
        index = np.arange(start, min(start + BATCH, len(images)))
        logits = jax.device_get(program(np.asarray(images[index])))
        right += int((logits.argmax(-1) == labels[index]).sum())
    return right / len(images)


def _table(runs: Sequence[Trained], bits: Sequence[int]) -> Table:
    columns = ["network", "float", *(f"{n} bits" for n in bits)]
    names = ["float", *map(str, bits)]
    rows: list[list[Any]] = []
    for one in runs:
        seen = one.seen or {}
        rows.append([one.label, *(seen.get(name) for name in names)])
    for label, group in by_label(runs).items():
        all_seen = [one.seen for one in group if one.seen is not None]
        if len(all_seen) > 1:
            means = [
                statistics.fmean(seen[name] for seen in all_seen) if name in all_seen[0] else None
                for name in names
            ]
            rows.append([f"{label}, mean", *means])
    formats = dict.fromkeys(columns[1:], ".2%")
    return Table("Test accuracy in floats and as integer programs", columns, rows, formats)


def _draw(path: Path, runs: Sequence[Trained], bits: Sequence[int]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(runs):
        if one.seen is None:
            continue
        points = [(n, one.seen[str(n)]) for n in sorted(bits) if str(n) in one.seen]
        color = f"C{number}"
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=one.label)
        if len(points) > 1:
            axes.axhline(one.seen["float"], color=color, linestyle=":", linewidth=1)
    axes.set_xlabel("bits of the products' operands")
    axes.set_xticks(sorted(bits))
    axes.set_ylabel("test accuracy (dotted: in floats)")
    axes.legend()
    figure.savefig(path, dpi=120)


EXPERIMENT = Experiment("integer", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
