"""Which gradient rules diverge, or do not learn, at which learning rates."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.study import Trained, TrainingOptions, train
from experiments.training.config import OPTIMIZERS, TrainConfig

ABOUT = """\
HT(d) against HT(4d), with and without adaptive scaling, over a grid of learning rates.

HT(d) is AdderNet's rule (--rule addernet), HT(4d) Adder-ViT's (adder_vit). Every variant trains
once at every rate. A run diverges if its loss becomes infinite or NaN; it did not learn if the
training accuracy of its last epoch is below twice chance. Under Adam, whose steps do not depend on
the gradient's size, scaling can only change how the steps of a kernel weigh against each other.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(model="vit", dataset="cifar10", epochs=4, limit_train=5000),
    smoke=TrainConfig(model="lenet5", epochs=1, limit_train=64, batch_size=32, image_size=8),
)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SMOKE_RATES = (0.1, 1e30)
RULES: Mapping[str, str] = {"addernet": "HT(d)", "adder_vit": "HT(4d)"}
SCALINGS: Mapping[str, str] = {"on": "scaled", "off": "not scaled"}
DIVERGED, NOT_LEARNED = "diverged", "did not learn"
Grid = Mapping[str, Sequence[Trained]]
"""The runs of each variant, one for each rate."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"(default: {TRAINING.full.model})")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="auto")
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="RATE",
        help=f"learning rates (default: {' '.join(map(str, RATES))})",
    )  # fmt: skip
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument(
        "--adaptive-scaling", nargs="+", choices=list(SCALINGS), help="(default: on off)"
    )
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    config = dataclasses.replace(
        config, family=("adder",), model=options.model or config.model,
        optimizer=options.optimizer, seed=TRAINING.one_seed(options),
    )  # fmt: skip
    rates = options.rates or (SMOKE_RATES if options.smoke else RATES)
    scalings = options.adaptive_scaling or (["on"] if options.smoke else list(SCALINGS))
    changes = {
        f"{RULES[rule]}, {SCALINGS[scaling]}": {"rule": rule, "adaptive_scaling": scaling}
        for rule in options.rules
        for scaling in scalings
    }
    plans = {
        f"{variant}, rate {rate:g}": dataclasses.replace(config, learning_rate=rate, **change)
        for variant, change in changes.items()
        for rate in rates
    }
    runs = train(plans, place)
    grid = {variant: runs[i * len(rates) :][: len(rates)] for i, variant in enumerate(changes)}
    what = f"{runs[0].config.model} on {config.dataset}"
    draw_map(place.folder / "map.png", what, rates, grid)
    return Outcome(
        f"Stability: {what}, {config.epochs} epochs",
        tables=[
            map_table("train_accuracy", "Training accuracy of the last epoch", rates, grid),
            map_table("test_accuracy", "Test accuracy after the last epoch", rates, grid),
        ],
        pictures=[
            Picture(
                "map.png",
                "Training accuracy of the last epoch for every rule and learning rate; runs that "
                "diverged are hatched, those that did not learn are framed",
            )
        ],
        notes=[
            f"{DIVERGED}: the loss became infinite or NaN. {NOT_LEARNED}: the training accuracy "
            f"of the last epoch is below {2 / runs[0].classes:.0%}, twice chance.",
            *(verdict(variant, rates, row) for variant, row in grid.items()),
        ],
        data={
            "rates": list(rates),
            "runs": [
                {**one.summary(), "variant": variant, "verdict": fate(one)}
                for variant, row in grid.items()
                for one in row
            ],
        },
    )


def fate(run: Trained) -> str:
    """How the run ended, in a word or two; nothing where it learned."""
    if run.diverged:
        return DIVERGED
    return "" if run.learned else NOT_LEARNED


def verdict(variant: str, rates: Sequence[float], runs: Sequence[Trained]) -> str:
    """A sentence: at which rates a variant diverged and did not learn."""

    def at(ending: str) -> str:
        found = [f"{rate:g}" for rate, one in zip(rates, runs, strict=True) if fate(one) == ending]
        return f"{ending} at {', '.join(found)}" if found else ""

    said = [text for text in map(at, (DIVERGED, NOT_LEARNED)) if text]
    return f"{variant}: {'; '.join(said) or 'learned at every rate'}."


def map_table(name: str, title: str, rates: Sequence[float], grid: Grid) -> Table:
    """A row for each variant, a column for each rate: a number of the result, or its absence."""
    columns = ["rule", *(f"{rate:g}" for rate in rates)]
    rows = [
        [variant, *(DIVERGED if one.result is None else one.result[name] for one in runs)]
        for variant, runs in grid.items()
    ]
    return Table(title, columns, rows, dict.fromkeys(columns[1:], ".1%"))


def draw_map(path: Path, title: str, rates: Sequence[float], grid: Grid) -> None:
    """Learning rate × variant, coloured and lettered by the last epoch's training accuracy."""
    values = np.array([
        [np.nan if one.result is None else 100 * one.result["train_accuracy"] for one in runs]
        for runs in grid.values()
    ])  # fmt: skip
    size = (3.2 + 1.05 * len(rates), 1.8 + 0.7 * len(grid))
    figure = new_figure(*size)
    axes = figure.subplots()
    axes.set_title(title)
    image = axes.imshow(values, cmap="viridis", vmin=0, aspect="auto")
    figure.colorbar(image, label="training accuracy (%)")
    for y, runs in enumerate(grid.values()):
        for x, one in enumerate(runs):
            _mark(axes, x, y, one, bright=bool(values[y, x] > 0.6 * np.nanmax(values)))
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_xlabel("learning rate")
    save(figure, path)


def _mark(axes: Axes, x: int, y: int, run: Trained, *, bright: bool) -> None:
    """Letters a cell; hatches it where the run diverged, frames it where it did not learn."""
    ending = fate(run)
    text = DIVERGED if run.result is None else f"{100 * run.result['train_accuracy']:.1f}"
    colour = "black" if bright or run.diverged else "white"
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    if ending == DIVERGED:
        cell = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="mistyrose", edgecolor="firebrick")
        cell.set(hatch="///", alpha=0.5)
        axes.add_patch(cell)
    elif ending == NOT_LEARNED:
        frame = Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor="orange")
        frame.set_linewidth(2)
        axes.add_patch(frame)


EXPERIMENT = Experiment("stability", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
