"""Where adder kernels go while a network trains: into the inputs' range, or out of it."""

import argparse
import dataclasses
import statistics
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import colormaps

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.common.errors import UserError
from experiments.images.augment import normalize
from experiments.images.dataset import Dataset
from experiments.studies.command import Experiment, Place
from experiments.studies.keep import Step, keeping
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.studies.ranges import Range, ranges
from experiments.studies.study import Trained, TrainingOptions, train
from experiments.training import recipes
from experiments.training.build import build_model
from experiments.training.config import TrainConfig
from experiments.training.data import dataset_of
from experiments.training.run import Run
from jadder.models import load_torch_state
from jadder.nn import AdderKernel

ABOUT = """\
The scale of every adder kernel and of its inputs while a network trains.

|x - w| bends at w; where all inputs of a channel lie on one side of w it is ±(x - w), a binary
weight of slope ±1. For each adder layer, at the start and after each of --looks equal parts of the
run: the root mean square of the kernel, of its input and the input's maximum, on 256 training
images; the share of the kernel's elements that bend for 1 to 99 % of their channel's inputs; and
the share of elements that change their sign in a step. For AdderNet's recipe, for the one with
centred normalisation, for that with bounds and smaller steps and, with --torch-state, for a network
that was trained in PyTorch.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(model="resnet20", family=("adder",), dataset="cifar10", epochs=3),
    smoke=TrainConfig(
        model="lenet5", family=("adder",), epochs=2, limit_train=128, batch_size=32, image_size=8
    ),
)
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "AdderNet's recipe": recipes.RECIPES["addernet"],
    "centred": recipes.RECIPES["short"],
    "kept inside": recipes.RECIPES["inside"],
}
IMAGES = 256
"""Training images on which inputs are looked at."""

Look = dict[str, Range]
"""What there was to be seen of each layer."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--looks", type=int, default=12, metavar="N", help="looks during a run (default: 12)"
    )
    parser.add_argument(
        "--torch-state", metavar="FILE.npz",
        help="the arrays of a PyTorch state dict of the AdderNet repository's ResNet-20, named as "
        "there or behind 'state/'",
    )  # fmt: skip
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    if options.looks < 1:
        raise UserError(f"--looks must be positive, got {options.looks}")
    config = dataclasses.replace(TRAINING.config(options), seed=TRAINING.one_seed(options))
    plans = {
        label: dataclasses.replace(config, **changes)
        for label, changes in RECIPES.items()
        if label in options.recipes
    }
    imported = None
    if options.torch_state is not None:
        imported = ranges_of_torch_state(Path(options.torch_state), dataset_of(config))
    runs = train(
        plans, place,
        wrap=lambda tx, steps: looking(tx, steps, min(options.looks, steps)), at_end=looks,
    )  # fmt: skip
    shown = [one for one in runs if one.seen is not None]
    draw(place.folder / "kernels.png", shown, imported)
    last = {one.label: one.seen.looks[-1] for one in shown}
    if imported is not None:
        last["trained in PyTorch"] = imported
    return Outcome(
        f"Where kernels go: {config.model} on {config.dataset}, {config.epochs} epochs",
        tables=[course_table(shown), *(layer_table(label, look) for label, look in last.items())],
        pictures=[Picture("kernels.png", "A line for each layer, from the first (dark) on")],
        notes=[verdict(label, look) for label, look in last.items()],
        data={
            "runs": [{**one.summary(), "seen": _record(one.seen)} for one in runs],
            "imported": None if imported is None else _plain(imported),
        },
    )


# -- recording -------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What has been seen so far.

    `params` are the parameters after each part of the run, along a new first axis; `flips` is
    (parts, leaves), the share of a leaf's elements that changed their sign, summed over the steps.
    """

    params: Any
    flips: jax.Array


def looking(
    tx: optax.GradientTransformation, steps: int, parts: int
) -> optax.GradientTransformation:
    """The same optimizer, which keeps the parameters after each of equal parts of the run.

    Args:
        tx: the optimizer.
        steps: of the whole run.
        parts: how many, at most as many as steps.

    Example:
        >>> tx = looking(optax.sgd(1.0), steps=2, parts=1)
        >>> params = jnp.array([0.5, 3.0])
        >>> _, state = tx.update(jnp.ones(2), tx.init(params), params)
        >>> state.record.params.tolist(), state.record.flips.tolist()
        ([[-0.5, 2.0]], [[0.5]])
    """

    def begin(params: optax.Params) -> Record:
        kept = jax.tree.map(lambda p: jnp.zeros((parts, *p.shape), p.dtype), params)
        return Record(kept, jnp.zeros((parts, len(jax.tree.leaves(params)))))

    def after(record: Record, step: Step) -> Record:
        part = jnp.minimum(step.number * parts // steps, parts - 1)
        new = step.new_params
        changed = jax.tree.map(lambda a, b: jnp.mean((a < 0) != (b < 0)), step.params, new)
        return Record(
            jax.tree.map(lambda kept, p: kept.at[part].set(p), record.params, new),
            record.flips.at[part].add(jnp.stack(jax.tree.leaves(changed))),
        )

    return keeping(tx, begin, after)


class Seen(NamedTuple):
    """What a run's state tells.

    Attributes:
        steps: after how many steps each look was taken, the first one at 0.
        looks: by layer, at the start and after each part.
        flips: share of each layer's elements that change their sign in a step, in each part.
    """

    steps: list[int]
    looks: list[Look]
    flips: list[dict[str, float]]


def looks(run: Run) -> Seen:
    """`Seen` of a finished run."""
    record: Record = run.state["optimizer"].record
    parts = len(record.flips)
    # The first step of part i is the first one with step · parts // steps = i.
    ends = [-(-part * run.total_steps // parts) for part in range(parts + 1)]
    model = build_model(run.config, run.family, run.dataset)
    images = calibration_images(run.dataset)
    model.train()
    seen = [ranges(model, images)]
    params = nnx.state(model, nnx.Param)
    for part in range(parts):
        nnx.replace_by_pure_dict(params, jax.tree.map(lambda p, i=part: p[i], record.params))
        nnx.update(model, params)
        seen.append(ranges(model, images))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))
    kernels = {path for path, _ in nnx.to_flat_state(nnx.state(model, AdderKernel))}
    places = {}
    for place, (keys, _) in enumerate(leaves):
        path = tuple(key.key for key in keys)
        if path in kernels:
            places[_name(path)] = place
    flips = np.asarray(record.flips) / np.diff(ends)[:, None]
    return Seen(
        ends,
        seen,
        [{name: float(f"{row[place]:.3g}") for name, place in places.items()} for row in flips],
    )


def _name(path: Sequence[Any]) -> str:
    return "/".join(str(part) for part in path[:-1] if part != "product")


def _plain(look: Look) -> dict[str, dict[str, float]]:
    return {
        name: {field: float(f"{value:.4g}") for field, value in seen._asdict().items()}
        for name, seen in look.items()
    }


def _record(seen: Seen | None) -> dict[str, Any] | None:
    """`Seen` as JSON can hold it."""
    if seen is None:
        return None
    return seen._asdict() | {"looks": [_plain(look) for look in seen.looks]}


def calibration_images(dataset: Dataset) -> jax.Array:
    """The first training images, as the network takes them."""
    images = jnp.asarray(dataset.train_images[np.arange(min(IMAGES, len(dataset.train_images)))])
    return normalize(images, jnp.asarray(dataset.mean), jnp.asarray(dataset.std))


def ranges_of_torch_state(file: Path, dataset: Dataset) -> Look:
    """The ranges of an AdderNet ResNet-20 with these arrays, by its running statistics.

    Raises:
        UserError: the file is none, or holds other arrays.
    """
    model = build_model(TrainConfig(model="resnet20"), "adder", dataset)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            state = {name: arrays[name] for name in arrays.files}
        marked = {
            name.removeprefix("state/"): array
            for name, array in state.items()
            if name.startswith("state/")
        }
        load_torch_state(model, marked or state)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--torch-state {file}: {error}") from None
    model.eval()
    return ranges(model, calibration_images(dataset))


# -- tables and pictures ---------------------------------------------------------------------------


def mean_of(look: Look, field: str) -> float:
    """A field's mean over the layers."""
    return statistics.fmean(getattr(seen, field) for seen in look.values())


def course_table(runs: Sequence[Trained]) -> Table:
    """Means over the layers, a row for each look of each run."""
    shares = ("below", "above", "bending", "bending_well")
    columns = ["network", "steps", "rms of w", "rms of x", "max of x", "w below all x",
               "w above all x", "bends for 1-99 %", "for 10-90 %", "flips a step"]  # fmt: skip
    rows: list[list[Any]] = []
    for one in runs:
        seen: Seen = one.seen
        for i, (steps, look) in enumerate(zip(seen.steps, seen.looks, strict=True)):
            flips = statistics.fmean(seen.flips[i - 1].values()) if i else None
            sizes = [mean_of(look, field) for field in ("kernel_rms", "input_rms", "input_max")]
            rows.append(
                [one.label, steps, *sizes, *(mean_of(look, field) for field in shares), flips]
            )
    formats = {"steps": ",d"} | dict.fromkeys(columns[2:5], ".2f")
    formats |= dict.fromkeys(columns[5:9], ".1%") | {"flips a step": ".2%"}
    return Table("Means over the adder layers", columns, rows, formats)


def layer_table(label: str, look: Look) -> Table:
    """A row for each layer of a network at its end."""
    columns = ["layer", "rms of w", "rms of x", "max of x", "w below all x", "w above all x",
               "bends for 1-99 %", "for 10-90 %"]  # fmt: skip
    rows: list[list[Any]] = [[name, *seen] for name, seen in look.items()]
    formats = dict.fromkeys(columns[1:4], ".2f") | dict.fromkeys(columns[4:], ".1%")
    return Table(f"Each layer: {label}", columns, rows, formats)


def verdict(label: str, look: Look) -> str:
    """What share of a network's elements bends at all."""
    return (
        f"{label}: {mean_of(look, 'bending'):.1%} of the elements of a kernel bend for 1 to 99 % "
        f"of their inputs, {1 - mean_of(look, 'bending'):.1%} are all but binary weights; "
        f"the kernels' rms is {mean_of(look, 'kernel_rms'):.2f}, "
        f"the inputs' {mean_of(look, 'input_rms'):.2f}."
    )


PANELS = {
    "kernel_rms": "rms of w",
    "input_rms": "rms of x",
    "bending": "share of w that bends\nfor 1-99 % of x",
    "flips": "share of w that changes\nits sign in a step",
}


def draw(path: Path, runs: Sequence[Trained], imported: Look | None) -> None:
    """A column for each run, a row for each of `PANELS`, a line for each layer; dots: imported."""
    figure = new_figure(4.2 * max(len(runs), 2), 9)
    panels = figure.subplots(len(PANELS), max(len(runs), 1), sharey="row", squeeze=False)
    colours = colormaps["viridis"]
    for column, one in zip(panels.T, runs, strict=False):
        seen: Seen = one.seen
        column[0].set_title(one.label)
        for axes, field in zip(column, PANELS, strict=True):
            for i, name in enumerate(seen.looks[0]):
                steps = seen.steps[1:] if field == "flips" else seen.steps
                values = (
                    [flips[name] for flips in seen.flips]
                    if field == "flips"
                    else [getattr(look[name], field) for look in seen.looks]
                )
                colour = colours(i / max(len(seen.looks[0]) - 1, 1))
                axes.plot(steps, values, color=colour, linewidth=0.9)
            if imported is not None and field != "flips":
                places = [seen.steps[-1] * 1.04] * len(imported)
                values = [getattr(layer, field) for layer in imported.values()]
                axes.plot(places, values, "k_", label="trained in PyTorch")
                axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
        column[-1].set_xlabel("step")
    for axes, title in zip(panels[:, 0], PANELS.values(), strict=True):
        axes.set_ylabel(title)
    save(figure, path)


EXPERIMENT = Experiment("kernel_scale", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
