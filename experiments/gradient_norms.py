"""The size of every layer's gradient, and of the step it takes, with and without scaling."""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.studies.command import Experiment, Place
from experiments.studies.keep import Step, keeping
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.study import Trained, TrainingOptions, train
from experiments.training.build import build_model
from experiments.training.config import TrainConfig
from experiments.training.run import Run

ABOUT = """\
Gradient sizes of every layer while a network trains: with adaptive scaling, without, multiplying.

A size is the root of a mean square, ‖g‖₂/√k for a kernel of k elements, of two things in each step:
the kernel's gradient as the backward pass gives it, and the update that the optimizer adds to the
kernel. The first study found gradients that vanish from layer to layer; adaptive scaling
(AdderNet, CVPR 2020, eqs. 11-13) gives all adder layers a step of one size. The first and the
last layer multiply in each of the networks.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(model="resnet20", dataset="cifar10", epochs=3),
    smoke=TrainConfig(model="lenet5", epochs=2, limit_train=128, batch_size=32, image_size=8),
)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "adder, scaled": {"family": ("adder",), "adaptive_scaling": "on"},
    "adder, not scaled": {"family": ("adder",), "adaptive_scaling": "off"},
    "conv": {"family": ("conv",)},
}
Sizes = dict[str, list[float]]
"""A number for each step, by the layer's name; layers in the model's order."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adaptive-scaling", nargs="+", choices=("on", "off"), default=["on", "off"],
        help="of the adder networks that are drawn (default: both)",
    )  # fmt: skip
    parser.add_argument("--model", help=f"as of experiments.train (default: {TRAINING.full.model})")
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    config = TRAINING.config(options)
    config = dataclasses.replace(
        config, model=options.model or config.model, seed=TRAINING.one_seed(options)
    )
    plans = {
        label: dataclasses.replace(config, **changes)
        for label, changes in VARIANTS.items()
        if changes.get("adaptive_scaling", "on") in options.adaptive_scaling
    }
    runs = train(plans, place, wrap=recording, at_end=recorded)
    shown = [one for one in runs if one.seen is not None]
    draw_steps(place.folder / "steps.png", shown)
    draw_layers(place.folder / "layers.png", shown)
    return Outcome(
        f"Gradient sizes: {runs[0].config.model} on {config.dataset}, {config.epochs} epochs",
        tables=[
            layer_table("gradients", "Gradient of each kernel, median over the steps", shown),
            layer_table("updates", "Update of each kernel, median over the steps", shown),
            learned_table(runs),
        ],
        pictures=[
            Picture("steps.png", "Gradient and update of every kernel over the steps"),
            Picture("layers.png", "Gradient and update by layer, median over the steps"),
        ],
        notes=[spread_note(one) for one in shown],
        data={"runs": [{**one.summary(), "sizes": one.seen} for one in runs]},
    )


# -- recording -------------------------------------------------------------------------------------


class Record(NamedTuple):
    """The sizes of all steps so far: (steps, leaves), in the order of `jax.tree.leaves`."""

    gradients: jax.Array
    updates: jax.Array


def recording(tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """The same optimizer, which keeps the sizes of what goes in and of what comes out.

    Args:
        tx: the optimizer.
        steps: of the whole run.

    Example:
        >>> tx = recording(optax.sgd(0.1), steps=2)
        >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
        >>> gradients = state.record.gradients
        >>> bool(jnp.allclose(gradients[0], (25 / 2) ** 0.5)), gradients[1].tolist()
        (True, [0.0])
    """

    def begin(params: optax.Params) -> Record:
        shape = (steps, len(jax.tree.leaves(params)))
        return Record(jnp.zeros(shape), jnp.zeros(shape))

    def after(record: Record, step: Step) -> Record:
        return Record(
            record.gradients.at[step.number].set(sizes(step.gradients)),
            record.updates.at[step.number].set(sizes(step.updates)),
        )

    return keeping(tx, begin, after)


def sizes(tree: Any) -> jax.Array:
    """The size of each leaf."""
    return jnp.stack([root_mean_square(leaf) for leaf in jax.tree.leaves(tree)])


def root_mean_square(leaf: jax.Array) -> jax.Array:
    """‖leaf‖₂/√k. Divided by the largest element first, small squares do not underflow."""
    largest = jnp.max(jnp.abs(leaf))
    scaled = leaf / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.mean(jnp.square(scaled)))


def recorded(run: Run) -> dict[str, Sizes]:
    """The sizes of every kernel's gradients and updates, from the state of a finished run."""
    record: Record = run.state["optimizer"].record
    leaves = jax.tree_util.tree_leaves_with_path(run.state["params"])
    places = {tuple(str(key.key) for key in path): i for i, (path, _) in enumerate(leaves)}
    model = build_model(run.config, run.family, run.dataset)
    kernels = {
        "/".join(part for part in path[:-1] if part != "product"): places[path]
        for path in parameter_paths(model)
        if path[-1] == "kernel"
    }
    gradients, updates = np.asarray(record.gradients), np.asarray(record.updates)
    return {
        name: {layer: [float(f"{size:.4g}") for size in table[:, i]]
               for layer, i in kernels.items()}
        for name, table in (("gradients", gradients), ("updates", updates))
    }  # fmt: skip


def parameter_paths(model: nnx.Module) -> list[tuple[str, ...]]:
    """The names of a model's parameters, in the order in which it makes them.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
        >>> parameter_paths(model)[::2]
        [('layers', '0', 'kernel'), ('layers', '1', 'kernel')]
    """

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, value in vars(node).items():
            if isinstance(value, nnx.Param):
                yield (*path, name)
            elif isinstance(value, nnx.Pytree):
                yield from walk(value, (*path, name))

    return list(walk(model, ()))


# -- tables and pictures ---------------------------------------------------------------------------


def layer_table(what: str, title: str, runs: Sequence[Trained]) -> Table:
    """A row for each layer, a column for each run."""
    layers = list(runs[0].seen[what]) if runs else []
    rows = [
        [layer, *(statistics.median(one.seen[what][layer]) for one in runs)] for layer in layers
    ]
    labels = [one.label for one in runs]
    return Table(title, ["layer", *labels], rows, dict.fromkeys(labels, ".2e"))


def learned_table(runs: Sequence[Trained]) -> Table:
    """What each run came to."""
    rows = [
        [one.label, "diverged" if one.diverged else "",
         *((None, None) if one.result is None
           else (one.result["train_accuracy"], one.result["test_accuracy"]))]
        for one in runs
    ]  # fmt: skip
    columns = ["network", "", "training accuracy", "test accuracy"]
    formats = dict.fromkeys(columns[2:], ".2%")
    return Table("Accuracy after the last epoch", columns, rows, formats)


def spread_note(run: Trained) -> str:
    """How far apart the layers between the first and the last one, which multiply, are."""

    def spread(what: str) -> float:
        medians = [statistics.median(steps) for steps in list(run.seen[what].values())[1:-1]]
        return max(medians) / min(medians) if min(medians) > 0 else float("inf")

    return (
        f"{run.label}: between the largest and the smallest inner layer, gradients differ by a "
        f"factor of {spread('gradients'):.3g}, updates by {spread('updates'):.3g}."
    )


def draw_steps(path: Path, runs: Sequence[Trained]) -> None:
    """A column for each run; gradients above, updates below; a line for each layer."""
    figure = new_figure(4 * max(len(runs), 2), 7)
    panels = figure.subplots(2, max(len(runs), 1), sharex=True, sharey="row", squeeze=False)
    colours = colormaps["viridis"]
    layers = 1
    for column, one in zip(panels.T, runs, strict=False):
        column[0].set_title(one.label)
        for axes, what in zip(column, ("gradients", "updates"), strict=True):
            layers = len(one.seen[what])
            for i, line in enumerate(one.seen[what].values()):
                steps = np.arange(1, len(line) + 1)
                values = np.where(np.asarray(line) > 0, line, np.nan)
                axes.plot(steps, values, color=colours(i / max(layers - 1, 1)), linewidth=0.8)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        column[1].set_xlabel("step")
    panels[0, 0].set_ylabel("gradient, ‖g‖₂/√k")
    panels[1, 0].set_ylabel("update, ‖Δ‖₂/√k")
    scale = ScalarMappable(Normalize(1, max(layers, 2)), colours)
    whole = MaxNLocator(integer=True)
    figure.colorbar(scale, ax=panels, label="layer, from the first", shrink=0.6, ticks=whole)
    save(figure, path)


def draw_layers(path: Path, runs: Sequence[Trained]) -> None:
    """Medians over the steps, layer by layer."""
    figure = new_figure(11, 4.8)
    panels = figure.subplots(1, 2)
    for axes, what in zip(panels, ("gradients", "updates"), strict=True):
        for one, marker in zip(runs, "osD^v", strict=False):
            values = [statistics.median(steps) or np.nan for steps in one.seen[what].values()]
            axes.plot(list(one.seen[what]), values, f"{marker}-", markersize=4, label=one.label)
        axes.set_yscale("log")
        axes.set_title("gradient" if what == "gradients" else "update")
        axes.tick_params(axis="x", rotation=90, labelsize=7)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("‖·‖₂/√k, median over the steps")
    if runs:
        panels[0].legend()
    save(figure, path)


EXPERIMENT = Experiment("gradient_norms", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
