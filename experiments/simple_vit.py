"""SimpleViT on CIFAR-10 in the variants of the second study, each at its own best rate."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from experiments.common.allocation import restart_with_huge_pages
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Table
from experiments.studies.study import (
    Trained,
    TrainingOptions,
    changed,
    comparison,
    train,
    with_seeds,
)
from experiments.training.config import TrainConfig

ABOUT = """\
SimpleViT on CIFAR-10: the variants of Adder-ViT (github.com/MTDoven/Adder-ViT), and jadder's.

Each variant has the same budget, the same search and the same rates to choose from: every rate of
--rates is tried for --search-epochs on the first --search-images training images and judged on the
last 5,000, which the search alone holds back; the best one trains on all of them. The second study
gave its adder networks a tenth of the multiplying network's rate.

Variants, their networks as `jadder.models.vit` reads them:
  multi          multiplies
  multi_batch    multiplies, with batch norm where final_batch has it: its twin
  qkv 1ffn 2ffn  only these parts add
  adder          AdderNet's rule in all of them, without E and F
  noupdtm        final without adaptive scaling
  euclider       Euclid distances
  wopout         final without the attention's last projection
  final          F * ((E * x) adder W) + b with HT(4d), layer norm after each product
  final_batch    the same with batch norm, a rate 30 times as high for adder kernels and no weight
                 decay on them: jadder's recipe
  final_annealed the same, and in four stages from Euclid distances to adders

Theirs, but for the last two, give adder kernels the rate of the others after adaptive scaling,
which AdamW cancels. Weight decay 2e-3 as theirs, which here is never on adder kernels.
"""
_PARTS = "family_parts=qkv,mlp"
_LAYER = "norm=layer"
_FINAL = (_PARTS, _LAYER)
_THEIRS: dict[str, Any] = {"adaptive_scaling": "on", "adder_rate": 1.0}
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "multi": {"family": ("conv",)},
        "multi_batch": {"family": ("conv",), "model_options": (_PARTS, "norm=batch")},
        "qkv": {"model_options": ("family_parts=qkv", _LAYER), **_THEIRS},
        "1ffn": {"model_options": ("family_parts=mlp", _LAYER, "mlp_layers=1"), **_THEIRS},
        "2ffn": {"model_options": ("family_parts=mlp", _LAYER), **_THEIRS},
        "adder": {"model_options": (*_FINAL, "scales=False"), "rule": "addernet", **_THEIRS},
        "noupdtm": {"model_options": _FINAL, "adder_rate": 1.0},
        "euclider": {"model_options": _FINAL, "family": ("euclid",)},
        "wopout": {"model_options": (*_FINAL, "project_out=False"), **_THEIRS},
        "final": {"model_options": _FINAL, **_THEIRS},
        "final_batch": {"model_options": (_PARTS, "norm=batch")},
        "final_annealed": {"model_options": (_PARTS, "norm=batch"), "anneal": "distance"},
    }
)
TRAINING = TrainingOptions(
    full=TrainConfig(
        model="vit", family=("adder",), dataset="cifar10", epochs=30, weight_decay=2e-3
    ),
    smoke=TrainConfig(model="vit", family=("adder",), epochs=1, limit_train=64, batch_size=32),
    seeds=(0, 1, 2),
)
_TINY = ("depth=1", "features=16", "num_heads=2", "mlp_features=16", "patch_size=7")
HELD_BACK = 5000


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), metavar="VARIANT")
    group.add_argument("--rates", nargs="+", type=float, metavar="RATE",
                       help="to choose from (default: 0.0003 0.001 0.003)")  # fmt: skip
    group.add_argument("--search-epochs", type=int, default=4, help="(default: 4)")
    group.add_argument("--search-images", type=int, default=20_000, help="(default: 20000)")
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    names = options.variants or (("final_batch",) if options.smoke else tuple(VARIANTS))
    rates = options.rates or ([1e-3] if options.smoke else [3e-4, 1e-3, 3e-3])
    extra = _TINY if options.smoke else ()
    plans = {name: changed(config, VARIANTS[name], extra) for name in names}
    found = train(searches(plans, rates, options), place)
    best = best_rates(found)
    plans = {
        name: dataclasses.replace(plan, learning_rate=best[name]) for name, plan in plans.items()
    }
    runs = train(with_seeds(plans, TRAINING.chosen_seeds(options)), place)
    title = f"SimpleViT on {config.dataset}, {config.epochs} epochs: the variants of Adder-ViT"
    outcome = comparison(title, runs, place)
    return dataclasses.replace(
        outcome,
        tables=[*outcome.tables, search_table(found)],
        data={"runs": [one.summary() for one in (*found, *runs)], "rates": best},
    )


def searches(
    plans: Mapping[str, TrainConfig], rates: Sequence[float], options: argparse.Namespace
) -> dict[str, TrainConfig]:
    """Each plan with each rate, shorter and on fewer images, without the test images."""
    size: dict[str, Any] = {"validation": 64, "epochs": 1}
    if not options.smoke:
        size = {"validation": HELD_BACK, "epochs": options.search_epochs,
                "limit_train": options.search_images}  # fmt: skip
    return {
        f"search {name} {rate:g}": dataclasses.replace(plan, learning_rate=rate, **size)
        for name, plan in plans.items()
        for rate in rates
    }


def best_rates(found: Sequence[Trained]) -> dict[str, float]:
    """Of each variant, the rate of the highest validation accuracy; the lowest if all diverged."""
    groups = _searched(found)
    return {
        name: max(rates, key=lambda rate: (rates[rate] or 0.0, -rate))
        for name, rates in groups.items()
    }


def search_table(found: Sequence[Trained]) -> Table:
    groups = _searched(found)
    rates = sorted({rate for group in groups.values() for rate in group})
    columns = [f"{rate:g}" for rate in rates]
    rows = [[name, *(group.get(rate) for rate in rates)] for name, group in groups.items()]
    return Table(
        "Search: validation accuracy by rate; an empty cell diverged",
        ("variant", *columns),
        rows,
        dict.fromkeys(columns, ".2%"),
    )


def _searched(found: Sequence[Trained]) -> dict[str, dict[float, float | None]]:
    groups: dict[str, dict[float, float | None]] = {}
    for one in found:
        _, name, rate = one.label.split(" ")
        groups.setdefault(name, {})[float(rate)] = one.test_accuracy
    return groups


EXPERIMENT = Experiment("simple_vit", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
