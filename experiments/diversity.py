"""The diversity problem: do distances map many inputs to one output, and does it matter in a ViT?

Level sets in two dimensions; effective ranks of single layers on Gaussian inputs; effective ranks
of AdderViT's attention maps and block outputs on real images, before and after training.
"""

import argparse
import dataclasses
import itertools
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import MaxNLocator

import jadder
from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.common.errors import UserError
from experiments.common.files import entry, is_there, read_json, write_json
from experiments.common.interrupt import Interrupted
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Cell, Outcome, Picture, Table
from experiments.studies.ranks import Observer, effective_rank
from experiments.studies.study import TrainingOptions
from experiments.training import devices, optimizer, steps
from experiments.training.build import refusals
from experiments.training.checkpoint import check_same_options
from experiments.training.config import TrainConfig
from experiments.training.run import Diverged, epoch_order, means
from jadder.implementations import Implementation
from jadder.models import Family, get_family

ABOUT = """\
The diversity problem of L1 distances, drawn and measured.

Level sets of L1, L2 and the dot product in two dimensions. The effective rank (Roy & Vetterli,
2007: exp of the entropy of the singular values, divided by their sum) of what one layer gives for
Gaussian inputs. And the effective rank of SimpleViT's attention maps and of each block's tokens on
test images, at the start and after a short training by the library's recipe: multiplying, with
adders, with adders without the scales E and F, and each of them with identity mapping.
"""
TRAINING = TrainingOptions(
    full=TrainConfig(model="vit", dataset="cifar10", epochs=4, limit_train=20_000),
    smoke=TrainConfig(
        model="vit", epochs=1, limit_train=64, batch_size=32, image_size=8, devices=1,
        model_options=("patch_size=2", "features=16", "depth=1", "num_heads=2", "mlp_features=16"),
    ),
)  # fmt: skip
NORMS = ("auto", "layer", "batch")


def plain_adders() -> Family:
    """Adder projections without the scales E and F, with the gradient rule of those that have."""
    return dataclasses.replace(
        get_family("adder"), projection_class=jadder.AdderLinear, rule=jadder.ADDER_VIT
    )


PRODUCTS: Mapping[str, Family] = {
    "multiplying": get_family("conv"),
    "adder, E and F": get_family("adder"),
    "adder, plain": plain_adders(),
}
VARIANTS: Mapping[str, tuple[str, bool]] = {
    f"{product}, identity" if identity else product: (product, identity)
    for product in PRODUCTS
    for identity in (False, True)
}
SMOKE_VARIANTS = ("adder, E and F, identity",)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="VARIANT",
        help=f"of {'; '.join(VARIANTS)} (default: all; smoke: one)",
    )  # fmt: skip
    parser.add_argument(
        "--norm", choices=NORMS, default="auto",
        help="after each projection; 'auto' is the model's own: none where it multiplies",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, help="test images to take ranks from (default: 128; smoke: 8)"
    )
    TRAINING.add(parser)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    if options.images is not None and options.images < 1:
        raise UserError(f"--images must be positive, got {options.images}")
    config = dataclasses.replace(TRAINING.config(options), out_dir=str(place.folder))
    dataset = load(
        config.dataset, config.data_dir, image_size=config.image_size,
        limit_train=config.limit_train,
    )  # fmt: skip
    count = options.images or (8 if place.smoke else 128)
    labels = options.variants or (SMOKE_VARIANTS if place.smoke else tuple(VARIANTS))
    variants = [
        vit(config, seed, label, options.norm, dataset, count, place)
        for seed in TRAINING.chosen_seeds(options)
        for label in labels
    ]
    gaussian = gaussian_layers(place.smoke)
    draw_level_sets(place.folder / "level_sets.png")
    draw_gaussian(place.folder / "gaussian.png", gaussian)
    draw_vit(place.folder / "vit.png", variants, f"SimpleViT on {dataset.name}")
    trained = f"{config.epochs} epochs of {len(dataset.train_images)} images"
    return Outcome(
        "Diversity: level sets and effective ranks",
        tables=[
            gaussian_table(gaussian),
            vit_table(variants, f"{dataset.name}, {trained}, ranks from {count} test images"),
        ],
        pictures=[
            Picture("level_sets.png", "Inputs that one output unit cannot tell apart"),
            Picture("gaussian.png", "Effective rank of one layer's outputs for Gaussian inputs"),
            Picture("vit.png", "Effective ranks in SimpleViT, block by block"),
        ],
        notes=[
            "E and F start at 1 and b at 0: with one seed, networks with and without them are the "
            "same function at the start.",
            "With identity mapping, the values are mixed by the attention map plus the identity.",
            "Tokens are ranked after their mean over the image is taken away. Batch norm takes the "
            "moments of the images that are ranked; accuracies take the running ones.",
        ],
        data={"gaussian": gaussian, "vit": variants},
    )


# -- one layer -------------------------------------------------------------------------------------

LAYERS: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "dot": jnp.matmul,
    "adder": jadder.adder_matmul,
    "euclid": jadder.euclid_matmul,
}


def gaussian_layers(smoke: bool) -> list[dict[str, Any]]:
    """Effective ranks of x ⊕ w, for x from N(0, 1) and w from N(0, scale²)."""
    widths = (8, 16) if smoke else (8, 16, 32, 64, 128, 256)
    scales = (0.5, 1.0, 2.0) if smoke else tuple(2.0**e for e in range(-4, 5))
    width, inputs = (16, 64) if smoke else (128, 2048)
    plans = [(width, scale, "scale") for scale in scales]
    plans += [(width, 1.0, "width") for width in widths]
    rows = []
    for features, scale, sweep in plans:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((inputs, features)), jnp.float32)
        w = jnp.asarray(scale * rng.standard_normal((features, features)), jnp.float32)
        for name, product in LAYERS.items():
            y = np.asarray(product(x, w), np.float64)
            rows.append({
                "sweep": sweep, "layer": name, "features": features, "scale": scale,
                "raw": float(effective_rank(y)),
                "centred": float(effective_rank(y - y.mean(0))),
            })  # fmt: skip
    return rows


def gaussian_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """At the width of the sweep over scales, which is SimpleViT's."""
    width = next(row["features"] for row in rows if row["sweep"] == "scale")
    cells: list[list[Cell]] = [
        [row["layer"], row["scale"], row["raw"], row["centred"], row["centred"] / width]
        for row in sorted(rows, key=lambda row: list(LAYERS).index(row["layer"]))
        if row["sweep"] == "scale" and row["scale"] in (0.25, 1.0, 4.0)
    ]
    return Table(
        f"Effective rank of a layer's outputs, {width} features, inputs from N(0, 1)",
        ("layer", "kernel's deviation", "as they are", "mean taken away", "share of features"),
        cells,
        {"kernel's deviation": "g", "as they are": ".1f", "mean taken away": ".1f",
         "share of features": ".0%"},
    )  # fmt: skip


# -- SimpleViT -------------------------------------------------------------------------------------


def vit(
    config: TrainConfig,
    seed: int,
    label: str,
    norm: str,
    dataset: Dataset,
    count: int,
    place: Place,
) -> dict[str, Any]:
    """Ranks of one network at the start and after training; read from its file where it is done."""
    config = dataclasses.replace(config, seed=seed)
    plan = {"variant": label, "norm": norm, "images": count, "data": dataset.fingerprint()}
    plan |= config.science()
    path = place.folder / (re.sub(r"\W+", "-", f"{label} s{seed}") + ".json")
    if is_there(path):
        found = read_json(path)
        check_same_options(entry(found, "plan", dict, path), plan, path)
        _check_ranks(found, path)
        return found
    network = build(config, label, norm, dataset)
    observer = Observer(network, dataset, count)
    row: dict[str, Any] = {"label": label, "seed": seed, "plan": plan}
    row["start"] = observer.ranks(network)
    network, row["train_accuracy"] = train(network, config, dataset, place, label)
    row["trained"] = observer.ranks(network)
    row["test_accuracy"] = observer.accuracy(network)
    write_json(path, row)
    return row


def _check_ranks(found: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless a network's file has all that tables and pictures show."""
    entry(found, "label", str, path)
    entry(found, "seed", int, path)
    for key in ("train_accuracy", "test_accuracy"):
        entry(found, key, float, path)
    for when in ("start", "trained"):
        ranks = entry(found, when, dict, path)
        for what in ("maps", "mixing", "tokens"):
            for rank in entry(ranks, what, list, path):
                entry({what: rank}, what, float, path)


def build(config: TrainConfig, label: str, norm: str, dataset: Dataset) -> nnx.Module:
    """The network of a variant.

    Raises:
        UserError: it cannot take such images.
    """
    product, identity = VARIANTS[label]
    family = PRODUCTS[product]
    if config.implementation is not None and family.name == "adder":
        implementation = cast(Implementation, config.implementation)
        family = dataclasses.replace(family, implementation=implementation)
    height, width, channels = dataset.train_images.shape[1:]
    with refusals(f"images of {height} x {width} x {channels}"):
        return jadder.models.create(
            config.model,
            family=family,
            num_classes=dataset.num_classes,
            image_size=(height, width),
            channels=channels,
            identity=identity,
            norm=norm,
            rngs=nnx.Rngs(config.seed),
            **config.model_arguments(),
        )


def train(
    network: nnx.Module, config: TrainConfig, dataset: Dataset, place: Place, label: str
) -> tuple[Any, float]:
    """The network after the recipe's training, and its accuracy over the last epoch.

    Raises:
        Interrupted: the networks before this one are kept.
        Diverged: the loss of an epoch is not finite.
        UserError: there are fewer images than a batch has.
    """
    images, labels = dataset.train_images, dataset.train_labels
    per_epoch = len(images) // config.batch_size
    if per_epoch == 0:
        raise UserError(f"--batch-size {config.batch_size} is more than {len(images)} images")
    several = devices.choose(config)
    tx = recipe(config, network, per_epoch)
    dtype = jnp.dtype("float32")
    graphdef, state = steps.initial_state(network, tx, dtype)
    state = several.replicate(state)
    step = steps.make_train_step(
        graphdef, tx, dataset, several, dtype=dtype, seed=config.seed, augment=config.augment
    )
    train_accuracy = math.nan
    for epoch in range(config.epochs):
        state["sums"] = several.replicate(steps.zero_sums(dtype))
        order = epoch_order(config.seed, epoch, len(images))
        for number in range(per_epoch):
            index = order[number * config.batch_size :][: config.batch_size]
            state, _ = step(state, several.rows(images, index), several.rows(labels, index))
            if place.stop.signum is not None:
                raise Interrupted(f"the networks before {label!r} are done", place.stop.signum)
        loss, train_accuracy = means(state["sums"])
        if not math.isfinite(loss):
            raise Diverged(label, loss, (epoch + 1) * per_epoch)
        line = f"{label}: epoch {epoch + 1}, loss {loss:.3f}, accuracy {train_accuracy:.2%}"
        print(line, file=sys.stderr)
    state = jax.device_get(state)
    return nnx.merge(graphdef, state["params"], state["model"]), train_accuracy


def recipe(
    config: TrainConfig, network: nnx.Module, steps_per_epoch: int
) -> optax.GradientTransformation:
    """The optimizer that `experiments.train` takes for such a run."""
    chosen = optimizer.choose(config)
    schedule = optimizer.warmup_cosine(
        chosen.learning_rate,
        total_steps=steps_per_epoch * config.epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.warmup_epochs,
    )
    return optimizer.make(config, chosen, schedule, jadder.adder_mask(network))


def vit_table(variants: Sequence[Mapping[str, Any]], what: str) -> Table:
    """Means over the blocks and over the seeds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in variants:
        groups.setdefault(row["label"], []).append(row)

    def mean(group: Sequence[Mapping[str, Any]], when: str, what: str) -> float | None:
        values = [value for row in group for value in row[when][what]]
        return statistics.fmean(values) if values else None

    names = {"maps": "attention maps", "mixing": "maps + identity", "tokens": "tokens"}
    measures = [(what, when) for what in names for when in ("start", "trained")]
    rows: list[list[Cell]] = [
        [label, *(mean(group, when, what) for what, when in measures),
         statistics.fmean(row["test_accuracy"] for row in group)]
        for label, group in groups.items()
    ]  # fmt: skip
    columns = [f"{names[what]}, {when}" for what, when in measures]
    return Table(
        f"Effective rank in SimpleViT, mean over its blocks: {what}",
        ("projections and MLP", *columns, "test accuracy"),
        rows,
        dict.fromkeys(columns, ".1f") | {"test accuracy": ".2%"},
    )


# -- pictures --------------------------------------------------------------------------------------


def draw_level_sets(path: Path) -> None:
    """One output unit's value over a plane of inputs, with lines of equal value."""
    kernel = np.array([0.5, 0.25])
    grid = np.linspace(-2, 2, 201)
    x = np.stack(np.meshgrid(grid, grid), -1)
    stretch = np.array([2.0, 0.5])
    panels = {
        "dot product: Σ xw": (x @ kernel, kernel),
        "L2: -Σ (x - w)²": (-np.sum((x - kernel) ** 2, -1), kernel),
        "L1: -Σ |x - w|": (-np.sum(np.abs(x - kernel), -1), kernel),
        "L1 with E = (2, ½): -Σ |Ex - w|": (
            -np.sum(np.abs(stretch * x - kernel), -1), kernel / stretch,
        ),
    }  # fmt: skip
    figure = new_figure(14, 3.9, "Inputs that one unit cannot tell apart: lines of equal output")
    for axes, (title, (values, where)) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        shades = axes.contourf(grid, grid, values, 12, cmap="Blues", alpha=0.6)
        lines = axes.contour(
            grid, grid, values, shades.levels, colors="k", linewidths=0.7, linestyles="solid"
        )
        axes.clabel(lines, lines.levels[1:-1:2], fontsize=8)
        axes.plot(*where, "o", color="C1", markeredgecolor="k")
        name = "w / E" if "E =" in title else "w"
        axes.annotate(name, where, xytext=(6, 4), textcoords="offset points", weight="bold")
        axes.set(title=title, xlabel="x₁", ylabel="x₂", aspect="equal")
    save(figure, path)


def draw_gaussian(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Share of the features that the effective rank is, over the scale of the kernel and width."""
    figure = new_figure(11, 4.2, "Effective rank of one layer's outputs, inputs from N(0, 1)")
    by_scale, by_width = figure.subplots(1, 2)
    for i, layer in enumerate(LAYERS):
        for kind, style in (("centred", "-"), ("raw", ":")):
            for axes, sweep, over in (
                (by_scale, "scale", "scale"),
                (by_width, "width", "features"),
            ):
                mine = [row for row in rows if row["sweep"] == sweep and row["layer"] == layer]
                shares = [100 * row[kind] / row["features"] for row in mine]
                label = f"{layer}, " + ("mean taken away" if kind == "centred" else "as they are")
                axes.plot([row[over] for row in mine], shares, style, marker=".", color=f"C{i}",
                          label=label)  # fmt: skip
    width = next(row["features"] for row in rows if row["sweep"] == "scale")
    by_scale.set(title=f"{width} features", xlabel="standard deviation of the kernel")
    by_width.set(title="kernel from N(0, 1)", xlabel="features, in and out")
    for axes in (by_scale, by_width):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("effective rank (% of the features)")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    figure.legend(*by_scale.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def draw_vit(path: Path, variants: Sequence[Mapping[str, Any]], title: str) -> None:
    """Attention maps on the left, tokens on the right; at the start above, trained below."""
    figure = new_figure(11, 7.5, f"{title}: effective ranks, block by block")
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    titles = {"maps": "attention maps", "tokens": "tokens after the block"}
    seed = variants[0]["seed"]
    for (i, when), (j, (what, name)) in itertools.product(
        enumerate(("start", "trained")), enumerate(titles.items())
    ):
        axes = panels[i, j]
        for row in variants:
            if row["seed"] != seed:
                continue
            blocks = range(1, len(row[when][what]) + 1)
            product, identity = VARIANTS[row["label"]]
            place = list(PRODUCTS).index(product)
            axes.plot(
                blocks, row[when][what], "--" if identity else "-", marker=".",
                color=f"C{place}", linewidth=(2, 4, 1.5)[place], label=row["label"],
            )  # fmt: skip
        axes.set(title=f"{name}, {'at the start' if when == 'start' else 'trained'}")
        axes.set_ylabel("effective rank")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[1]:
        axes.set_xlabel("block")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


EXPERIMENT = Experiment("diversity", ABOUT, run, add_options)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
