"""How alike the channels of an untrained ResNet are: multiplying, adding, and adding otherwise."""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Initializer
from matplotlib.ticker import MaxNLocator

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.common.errors import UserError
from experiments.images.augment import normalize
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Cell, Outcome, Picture, Table
from experiments.studies.ranks import effective_rank
from experiments.studies.watch import Watched
from experiments.training.config import TrainConfig
from jadder.models import BasicBlock, ResNet, get_family

ABOUT = """\
How alike the channels of an untrained ResNet-20 are, product by product.

Inputs of an adder layer within a ResNet come from a ReLU, so they are not negative, while its
kernels start as N(0, 1): half of all |x - w| just grow with x, in every channel alike. Measured
after the normalisation of each 3 x 3 product, on real images, in training mode: the correlation of
two channels (mean of its absolute value over all pairs), and the effective rank (Roy & Vetterli,
2007) of positions x channels as a share of the channels. Beside the network as published stand the
multiplying one, others with norm=centered_batch, and kernels from N(mean, deviation^2).
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """A network: its family, its norms, and where its adder kernels start."""

    family: str = "adder"
    norm: Any = "batch"
    mean: float = 0.0
    deviation: float = 1.0


STARTS: Mapping[str, Start] = {
    "multiplying": Start("conv"),
    "multiplying, centred": Start("conv", "centered_batch"),
    "adder, N(0, 1) as published": Start(),
    "adder, N(0, 9)": Start(deviation=3.0),
    "adder, N(½, 1)": Start(mean=0.5),
    "adder, N(½, 4)": Start(mean=0.5, deviation=2.0),
    "adder, N(½, 9)": Start(mean=0.5, deviation=3.0),
    "adder, centred, N(0, 1)": Start(norm="centered_batch"),
    "adder, centred, N(½, 4)": Start(norm="centered_batch", mean=0.5, deviation=2.0),
}
SMOKE_STARTS = ("multiplying", "adder, N(½, 4)", "adder, centred, N(0, 1)")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="as of experiments.train (default: cifar10)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder with the data set's files")
    parser.add_argument("--images", type=int, help="test images (default: 64; smoke: 8)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace, place: Place) -> Outcome:
    count = (8 if place.smoke else 64) if options.images is None else options.images
    if count < 1:
        raise UserError(f"--images must be positive, got {count}")
    seed = TrainConfig(seed=options.seed).seed  # raises where it cannot be one
    size = 8 if place.smoke else None
    default = "digits" if place.smoke else "cifar10"
    dataset = load(options.dataset or default, options.data_dir, image_size=size)
    names = SMOKE_STARTS if place.smoke else tuple(STARTS)
    blocks, width = ((1, 1), 4) if place.smoke else ((3, 3, 3), 16)
    rows = []
    for name in names:
        network = build(STARTS[name], blocks, width, dataset, seed)
        rows.append({"label": name, "products": observe(network, dataset, count)})
    draw(place.folder / "channels.png", rows)
    return Outcome(
        "How alike the channels of an untrained ResNet are",
        tables=[table(rows, f"{dataset.name}, {count} test images, seed {seed}")],
        pictures=[Picture("channels.png", "Each 3 x 3 product in the order of the forward pass")],
        notes=["The first block's input comes from the stem, which multiplies in all of them."],
        data={"networks": rows},
    )


def build(start: Start, blocks: tuple[int, ...], width: int, dataset: Dataset, seed: int) -> ResNet:
    family = get_family(start.family)
    if family.name == "adder":
        family = dataclasses.replace(family, conv_init=shifted_normal(start.mean, start.deviation))
    return ResNet(
        blocks, BasicBlock, dataset.num_classes, width=width, norm=start.norm, family=family,
        channels=dataset.train_images.shape[-1], rngs=nnx.Rngs(seed),
    )  # fmt: skip


def shifted_normal(mean: float, deviation: float) -> Initializer:
    """Draws from N(mean, deviation²)."""
    normal = nnx.initializers.normal(deviation)

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        return mean + normal(key, shape, dtype, out_sharding=out_sharding)

    return init


def observe(network: ResNet, dataset: Dataset, count: int) -> list[dict[str, float]]:
    """For each 3 x 3 product: the correlation of its channels and their effective rank's share."""
    seen = watch_norms(network)
    mean, std = (jnp.asarray(moment) for moment in (dataset.mean, dataset.std))
    network(normalize(jnp.asarray(dataset.test_images[:count]), mean, std))
    return [{"correlation": correlation(y), "rank": rank_share(y)} for y in map(np.asarray, seen)]


def watch_norms(network: ResNet) -> list[jax.Array]:
    """A list that the network's next call fills with what follows each 3 x 3 product's norm."""
    seen: list[jax.Array] = []

    def keep(norm: Any, x: jax.Array) -> Any:
        y = norm(x)
        seen.append(y.reshape(-1, y.shape[-1]))
        return y

    for _, block in nnx.iter_graph(network):
        if isinstance(block, BasicBlock):
            block.bn1, block.bn2 = Watched(block.bn1, keep), Watched(block.bn2, keep)  # type: ignore[assignment]
    return seen


def correlation(y: Any) -> float:
    """Mean absolute correlation of two columns, over all pairs.

    Example:
        >>> correlation(np.array([[1.0, -2.0], [2.0, -4.0], [4.0, -8.0]]))
        1.0
    """
    matrix = np.abs(np.corrcoef(np.asarray(y, np.float64).T))
    n = len(matrix)
    return round(float((matrix.sum() - n) / (n * (n - 1))), 12)


def rank_share(y: Any) -> float:
    """Effective rank of the columns, their means taken away, as a share of their number."""
    y = np.asarray(y, np.float64)
    triangle = np.linalg.qr(y - y.mean(0), mode="r")  # of the same singular values
    return float(effective_rank(triangle)) / y.shape[-1]


def table(rows: Sequence[Mapping[str, Any]], what: str) -> Table:
    def mean(row: Mapping[str, Any], key: str) -> float:
        return statistics.fmean(product[key] for product in row["products"])

    cells: list[list[Cell]] = [
        [row["label"], mean(row, "correlation"), mean(row, "rank")] for row in rows
    ]
    columns = ("network", "correlation of channels", "effective rank, of the channels")
    return Table(
        f"Mean over the 3 x 3 products: {what}", columns, cells, {columns[1]: ".2f",
        columns[2]: ".0%"},
    )  # fmt: skip


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Correlation on the left, rank on the right, product by product."""
    figure = new_figure(12, 5, "Channels of an untrained ResNet, after each normalisation")
    panels = figure.subplots(1, 2)
    for axes, key, name in zip(
        panels, ("correlation", "rank"),
        ("mean |correlation| of two channels", "effective rank, share of the channels"),
        strict=True,
    ):  # fmt: skip
        for row in rows:
            values = [product[key] for product in row["products"]]
            style = "--" if "centred" in row["label"] else "-"
            axes.plot(range(1, len(values) + 1), values, style, marker=".", label=row["label"])
        axes.set(xlabel="3 x 3 product", ylabel=name, ylim=(0, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


EXPERIMENT = Experiment("channels", ABOUT, run, add_options, saves=False)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
