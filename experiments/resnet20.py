"""ResNet-20 on CIFAR-10 by AdderNet's recipe, adding, multiplying and in Euclid distances."""

import argparse
import dataclasses
import sys

from experiments.common.allocation import restart_with_huge_pages
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome
from experiments.studies.study import (
    TrainingOptions,
    changed,
    comparison,
    families,
    train,
    with_seeds,
)
from experiments.training.config import FAMILIES, TrainConfig
from experiments.training.recipes import RECIPES, add_recipe

ABOUT = """\
ResNet-20 on CIFAR-10: adder, conv and euclid at equal budget.

SGD with rate 0.1, momentum 0.9, weight decay 5e-4, crop and flip; one epoch of warm-up and a
cosine over the run's length, whatever that is: --epochs 10, 30 and 100 are short budgets with a
schedule of their own. The adder network has eta = 0.4 in adaptive scaling then, and takes the mean
over the channels away before each batch normalisation (norm=centered_batch). --recipe inside keeps
its kernels where their inputs are, with steps of eta = 0.1; --recipe exact, besides, lets gradient
rules become steep, nearly the derivative, in the second half; --recipe annealed, besides, begins
with Euclid's distance. --recipe addernet is that of AdderNet's paper (Chen et al., 2020): 400
epochs at batch 256, eta = 0.2, batch normalisation alone.
The small size is of LeNet-5, which compiles sooner.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(model="resnet20", dataset="cifar10", epochs=10),
    smoke=TrainConfig(model="lenet5", epochs=1, limit_train=64, batch_size=32, image_size=8),
    seeds=(0, 1, 2),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    add_recipe(parser)
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    if options.recipe == "addernet" and not options.smoke:
        config = dataclasses.replace(
            config, epochs=options.epochs or 400, batch_size=options.batch_size or 256
        )
    plans = families(config, options.families)
    if "adder" in plans:
        plans["adder"] = changed(plans["adder"], RECIPES[options.recipe or "short"])
    length = f"{config.epochs} epochs"
    plans = {f"{name}, {length}": one for name, one in plans.items()}
    runs = train(with_seeds(plans, TRAINING.chosen_seeds(options)), place)
    title = f"{config.model} on {config.dataset}: {length}, batch {config.batch_size}"
    return comparison(title, runs, place)


EXPERIMENT = Experiment("resnet20", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
