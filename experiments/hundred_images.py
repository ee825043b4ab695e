"""Training on a hundred images, which a network that learns at all can learn by heart."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from experiments.common.allocation import restart_with_huge_pages
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.study import Trained, TrainingOptions, families, train, with_seeds
from experiments.training.config import FAMILIES, TrainConfig
from experiments.training.curves import draw
from experiments.training.run import Run

ABOUT = """\
A hundred training images, batch 16, 20 epochs: the adder network has to fit them.

The first study's numpy network stayed at chance here. Ours has batch normalisation and adaptive
scaling, and no augmentation. Training accuracy is given twice: as the running mean of the last
epoch, in training mode (batch statistics, 96 images, while the network changes), and of all images
after it, in evaluation mode (running statistics). The test images are the validation.

LeNet-5 for digits, MNIST and Fashion-MNIST; ResNet-20 for CIFAR-10, with a recipe of its own for
each family. The 120 steps fit all images of the former, not of CIFAR-10, adding or multiplying.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(model="auto", epochs=20, batch_size=16, limit_train=100, augment="none"),
    smoke=TrainConfig(
        model="lenet5", epochs=20, batch_size=16, limit_train=100, augment="none", image_size=8
    ),
    seeds=(0, 1, 2),
)
SGD: Mapping[str, Any] = {"learning_rate": 0.3}
RESNET20: Mapping[str, Mapping[str, Any]] = {
    "adder": {
        "optimizer": "adamw", "learning_rate": 0.003, "adder_rate": 300.0,
        "model_options": ("norm=centered_batch",),
    },
    "conv": {"learning_rate": 0.03},
}  # fmt: skip
"""What fitted most of a hundred CIFAR-10 images, of those tried with seed 0; none fits all."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="(default: adder conv)")
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    chosen = options.families or (["adder"] if options.smoke else ["adder", "conv"])
    recipes = RESNET20 if config.dataset == "cifar10" else {}
    plans = {
        name: dataclasses.replace(one, **recipes.get(name, SGD))
        for name, one in families(config, chosen).items()
    }
    plans = with_seeds(plans, TRAINING.chosen_seeds(options))
    runs = train(plans, place, at_end=training_accuracy)
    what = f"{runs[0].config.model} on {config.limit_train} images of {config.dataset}"
    draw(place.folder / "curves.png", what, {one.label: one.rows for one in runs})
    adders = [one for one in runs if one.config.family == ("adder",)]
    fitted = sum(one.seen == 1 for one in adders)
    return Outcome(
        f"Learning by heart: {what}, batch {config.batch_size}, {config.epochs} epochs",
        tables=[table(runs)],
        pictures=[Picture("curves.png", "Loss and accuracy; the test images are the validation")],
        notes=[f"{fitted} of {len(adders)} adder networks have all training images right."],
        data={
            "runs": [{**one.summary(), "train_accuracy_evaluated": one.seen} for one in runs],
            "fitted": [one.label for one in runs if one.seen == 1],
        },
    )


def training_accuracy(run: Run) -> float:
    """Of all training images, in evaluation mode."""
    return run.evaluate(run.dataset.train_images, run.dataset.train_labels)[1]


def table(runs: list[Trained]) -> Table:
    columns = ["network", "training accuracy, evaluated", "last epoch's mean", "best epoch's mean",
               "first epoch at 100 %", "test accuracy"]  # fmt: skip
    rows: list[list[Any]] = []
    for one in runs:
        means = [row["train_accuracy"] for row in one.rows]
        first = next((i for i, mean in enumerate(means, 1) if mean == 1), None)
        last, best = (means[-1], max(means)) if means else (None, None)
        rows.append([one.label, one.seen, last, best, first, one.test_accuracy])
    formats = dict.fromkeys((*columns[1:4], columns[5]), ".2%")
    return Table("Accuracy on the training images, and on the test images", columns, rows, formats)


EXPERIMENT = Experiment("hundred_images", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
