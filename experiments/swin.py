"""Swin on CIFAR-10, adding and multiplying."""

import argparse
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from experiments.common.allocation import restart_with_huge_pages
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome
from experiments.studies.study import TrainingOptions, changed, comparison, train, with_seeds
from experiments.training.config import TrainConfig

ABOUT = """\
Swin transformer on CIFAR-10 at equal budget: adder, its multiplying twin with the same batch norms,
and the multiplying network as it is usually built.

The sizes are those of `jadder.models.Swin`, small as in the second study. AdamW, rate 1e-3, warm-up
and cosine, crop and flip; adder kernels take 30 times the rate and no weight decay.
"""
NETWORKS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "adder": {"family": ("adder",), "model_options": ("norm=batch",)},
    "conv, batch norm": {"family": ("conv",), "model_options": ("norm=batch",)},
    "conv": {"family": ("conv",)},
    "euclid": {"family": ("euclid",), "model_options": ("norm=batch",)},
})  # fmt: skip
_TINY = ("patch_size=2", "features=8", "depths=(2,)", "num_heads=(2,)", "window_size=4")
TRAINING = TrainingOptions(
    full=TrainConfig(model="swin", dataset="cifar10", epochs=30),
    smoke=TrainConfig(model="swin", epochs=1, limit_train=64, batch_size=32, image_size=16),
    seeds=(0, 1, 2),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks", nargs="+", choices=tuple(NETWORKS), metavar="NETWORK",
        help=f"some of: {'; '.join(NETWORKS)} (default: all but the last)",
    )  # fmt: skip
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    names = options.networks or tuple(NETWORKS)[: 1 if options.smoke else 3]
    extra = _TINY if options.smoke else ()
    plans = {name: changed(config, NETWORKS[name], extra) for name in names}
    runs = train(with_seeds(plans, TRAINING.chosen_seeds(options)), place)
    return comparison(f"Swin on {config.dataset}, {config.epochs} epochs", runs, place)


EXPERIMENT = Experiment("swin", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
