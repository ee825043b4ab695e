"""An adder network beside its multiplying twin: accuracy and time of each epoch."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from experiments.common.allocation import restart_with_huge_pages
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.study import (
    Trained,
    TrainingOptions,
    accuracy_table,
    families,
    train,
    with_seeds,
)  # fmt: skip
from experiments.training.config import FAMILIES, TrainConfig
from experiments.training.curves import draw, draw_times

ABOUT = """\
The same network adding, multiplying and in squared distances: accuracy and seconds of each epoch.

Same recipe, same order of the images, one after the other on the same devices. Seconds are those of
training and evaluation; the first epoch's contain the compilation. A machine that does other work
meanwhile spoils them. The first study's convolution took a tenth of the time of its adder layer
and learned, where the adder layer did not.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(dataset="mnist", epochs=10),
    smoke=TrainConfig(epochs=2, limit_train=64, batch_size=32, image_size=8),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--model", help="as of experiments.train (default: LeNet-5 or ResNet-20, by the images)"
    )
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    config = dataclasses.replace(config, model=options.model or config.model)
    seeds = TRAINING.chosen_seeds(options)
    runs = train(with_seeds(families(config, options.families), seeds), place)
    first = {one.config.family[0]: one for one in runs if one.config.seed == seeds[0]}
    curves = {name: one.rows for name, one in first.items()}
    what = f"{runs[0].config.model} on {config.dataset}"
    draw(place.folder / "curves.png", what, curves)
    draw_times(place.folder / "times.png", what, curves)
    return Outcome(
        f"Twins: {what}, batch {config.batch_size}",
        tables=[
            accuracy_table("Accuracy after the last epoch, mean over the seeds", runs),
            epoch_table(first),
        ],
        pictures=[
            Picture(
                "times.png",
                "Accuracy over epochs, and over seconds with those of compilation and "
                "evaluation, of the first seed",
            ),
            Picture("curves.png", "Loss and accuracy over epochs, of the first seed"),
        ],
        data={"runs": [one.summary() for one in runs]},
    )


def epoch_table(runs: dict[str, Trained]) -> Table:
    """Test accuracy and seconds of each epoch, a column of each for every family."""
    accuracies = {name: [row["test_accuracy"] for row in one.rows] for name, one in runs.items()}
    seconds = {name: epoch_seconds(one) for name, one in runs.items()}
    columns = ["epoch"]
    formats: dict[str, str] = {}
    for name in runs:
        columns += [name, f"{name}, s"]
        formats |= {name: ".2%", f"{name}, s": ".1f"}
    rows: list[list[Any]] = []
    for i in range(max(len(one.rows) for one in runs.values())):
        cells = [values[name][i:][:1] for name in runs for values in (accuracies, seconds)]
        rows.append([i + 1, *(cell[0] if cell else None for cell in cells)])
    return Table("Test accuracy and seconds of each epoch, of the first seed", columns, rows,
                 formats)  # fmt: skip


def epoch_seconds(run: Trained) -> Sequence[float]:
    """The seconds of each epoch, with its evaluation; the first has the compilation too."""
    return [b - a for a, b in itertools.pairwise([0.0, *(row["seconds"] for row in run.rows)])]


EXPERIMENT = Experiment("twins", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
