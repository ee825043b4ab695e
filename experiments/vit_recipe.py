"""What makes adder transformers train: one change at a time from a common recipe."""

import argparse
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import save
from experiments.studies.ablations import check_teachers, find_teacher, picture
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Picture
from experiments.studies.study import (
    TrainingOptions,
    accuracy_table,
    changed,
    train,
    with_seeds,
)
from experiments.training.config import TrainConfig

ABOUT = """\
What makes adder transformers train: the recipe, with one thing changed at a time.

A fixed proxy: SimpleViT with adders in every projection, the first 20,000 training images of
CIFAR-10, 4 epochs, batch 64, crop and flip, AdamW with rate 1e-3, warm-up and cosine; judged on
the last 5,000 training images, which no run trains on. Every run takes all seeds of --seeds.
The multiplying twins stand beside it: without norms, and with the norms of the adder network.
"""
_BASE = ("norm=batch",)
_TWIN = "multiplying twin, batch norm"
CHANGES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "recipe": {},
        "multiplying twin": {"family": ("conv",), "model_options": ()},
        _TWIN: {"family": ("conv",)},
        "rate 2e-3": {"learning_rate": 2e-3},
        "multiplying twin, batch norm, rate 2e-3": {"family": ("conv",), "learning_rate": 2e-3},
        "batch 128": {"batch_size": 128},
        "multiplying twin, batch norm, batch 128": {"family": ("conv",), "batch_size": 128},
        "centered batch norm": {"model_options": ("norm=centered_batch",)},
        "multiplying twin, centered batch norm": {
            "family": ("conv",),
            "model_options": ("norm=centered_batch",),
        },
        "layer norm": {"model_options": ("norm=layer",)},
        "no norm": {"model_options": ("norm=none",)},
        "rate of adder kernels x1": {"adder_rate": 1.0},
        "rate of adder kernels x10": {"adder_rate": 10.0},
        "rate of adder kernels x100": {"adder_rate": 100.0},
        "HT(d)": {"rule": "addernet"},
        "sign": {"rule": "sign"},
        "no E and F": {"model_options": (*_BASE, "scales=False")},
        "kernels N(0, 1/4)": {"model_options": (*_BASE, "kernel_std=0.5")},
        "kernels N(0, 4)": {"model_options": (*_BASE, "kernel_std=2.0")},
        "kernels N(0, 9)": {"model_options": (*_BASE, "kernel_std=3.0")},
        "identity mapping": {"model_options": (*_BASE, "identity=True")},
        "adder scores": {"model_options": (*_BASE, "scores=adder")},
        "adders in qkv and MLP only": {"model_options": (*_BASE, "family_parts=qkv,mlp")},
        "SGD with adaptive scaling": {"optimizer": "sgd", "learning_rate": 0.1},
        "rule from wide to sharp": {"anneal": "rule"},
        "distance from L2 to L1": {"anneal": "distance"},
        "learning from the twin": {"teacher": _TWIN},
        "twin learning from the twin": {"family": ("conv",), "teacher": _TWIN},
    }
)
TRAINING = TrainingOptions(
    full=TrainConfig(
        model="vit", family=("adder",), dataset="cifar10", epochs=4, limit_train=20_000,
        batch_size=64, validation=5_000, model_options=_BASE,
    ),
    smoke=TrainConfig(
        model="vit", family=("adder",), epochs=1, limit_train=64, batch_size=32, validation=64,
        model_options=_BASE,
    ),
    seeds=(0, 1, 2),
)  # fmt: skip
_TINY = ("depth=1", "features=16", "num_heads=2", "mlp_features=16", "patch_size=7")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--changes", nargs="+", choices=tuple(CHANGES), metavar="CHANGE",
        help="some of: " + "; ".join(CHANGES),
    )  # fmt: skip
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    names = options.changes or (tuple(CHANGES)[:1] if options.smoke else tuple(CHANGES))
    check_teachers(names, CHANGES)
    extra = _TINY if options.smoke else ()
    # In the order of CHANGES, which has teachers before those who learn from them.
    plans = {name: changed(config, CHANGES[name], extra) for name in CHANGES if name in names}
    seeded = with_seeds(plans, TRAINING.chosen_seeds(options))
    runs = train({label: find_teacher(plan, place) for label, plan in seeded.items()}, place)
    save(picture(runs, "recipe"), place.folder / "ablations.png")
    title = f"AdderViT on {config.dataset}: one change at a time"
    return Outcome(
        title,
        tables=[accuracy_table("Accuracy on images held back, mean over the seeds", runs)],
        pictures=[Picture("ablations.png", "Each change beside the recipe; a dot for each seed")],
        data={"runs": [one.summary() for one in runs]},
    )


EXPERIMENT = Experiment("vit_recipe", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
