"""Speed and memory of multiplying, of adders as one first writes them, and of jadder's."""

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jadder
from benchmarks.timing import interleaved
from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.common.environment import check_memory
from experiments.common.errors import UserError
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Cell, Outcome, Picture, Table
from experiments.studies.programs import (
    Images,
    create,
    load_average,
    prepare,
    temporaries_mib,
)
from jadder.models import Family, get_family

ABOUT = """\
Speed and memory in training and inference, in the form of Adder-ViT's table.

The multiplying network; the adder network as its authors wrote it first, with an array of all
differences (implementation="reference"); and with jadder's kernels. Each at the shapes of CIFAR-10,
by the recipe of experiments.train, all of one network in turns in one process. A time is the
minimum over the rounds. Memory is what XLA plans for temporaries: parameters and images come on
top. The first adder network runs with as many images as --memory-limit allows; what it would need
for the whole batch is compiled, not run. What others published about their own speed is quoted.
"""
NETWORKS: Mapping[str, str] = {"ResNet-20": "resnet20", "SimpleViT": "vit"}
BASE, NAIVE = "multiply", "adder, naive"
ADDERS: Mapping[str, Any] = {NAIVE: "reference", "jadder": None, "jadder, cpu_fast": "cpu_fast"}
PROGRAMS = {"inference": "inference", "training": "step"}
FEWEST = 2
"""Images that batch normalisation needs to train."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of others, on their hardware."""

    source: str
    what: str
    hardware: str
    method: str
    training: str
    inference: str = ""
    memory: str = ""


_VIT = ("Adder-ViT, README of github.com/MTDoven/Adder-ViT", "SimpleViT, relative to Multi, about",
        "a GPU, not named")  # fmt: skip
_CUDA = ("AdderNetCUDA, README of github.com/LingYeAI/AdderNetCUDA",
         "ResNet-20 on CIFAR-10, a training batch", "RTX 2080 Ti")  # fmt: skip
PUBLISHED = (
    Published(*_VIT, "Multi", "x1.0", "x1.0", "x1.0"),
    Published(*_VIT, "Adder", "out of memory", "x6.2", "out of memory"),
    Published(*_VIT, "optim-Adder (CUDA)", "x4.1", "x1.3", "x1.3"),
    Published(*_CUDA, "AdderNet's own code", "1.61 s"),
    Published(*_CUDA, "torch.cdist", "1.49 s"),
    Published(*_CUDA, "jdnie/AdderNetCuda", "0.4508 s"),
    Published(*_CUDA, "AdderNetCUDA", "0.3158 s"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME",
        help=f"of {', '.join(NETWORKS)} (default: both)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=12, help="rounds to take the minimum of")
    parser.add_argument(
        "--memory-limit", type=float, default=2.0, metavar="GIB",
        help="for the temporaries of the naive adder network (default: 2)",
    )  # fmt: skip


def run(options: argparse.Namespace, place: Place) -> Outcome:
    networks = {name: NETWORKS[name] for name in options.networks}
    images, repeats = Images(options.batch_size, 32, 3), options.repeats
    if place.smoke:
        networks, images, repeats = {"LeNet-5": "lenet5"}, Images(4, 8, 1), 2
    if images.batch < FEWEST or repeats < 1 or not options.memory_limit > 0:
        raise UserError(
            f"--batch-size must be at least {FEWEST}, --repeats and --memory-limit positive, got "
            f"{images.batch}, {repeats} and {options.memory_limit:g}"
        )
    check_memory(4 * math.prod(images.shape), "a batch of --batch-size images")
    loads = [load_average()]
    rows = [
        row
        for title, name in networks.items()
        for row in measure(title, name, images, repeats, options.memory_limit * 1024, place.smoke)
    ]
    loads.append(load_average())
    where = f"{jax.devices()[0].device_kind}, images {'x'.join(map(str, images.shape))}"
    draw(place.folder / "speed.png", rows, where)
    return Outcome(
        f"Speed and memory in training and inference: {where}",
        tables=[relative_table(rows), absolute_table(rows, repeats), published_table()],
        pictures=[Picture("speed.png", "Time for each image, and temporaries")],
        notes=[
            f"jadder's default here: {default_kernels()}.",
            "A network that runs with a smaller batch is compared image by image: the optimizer's "
            "update, which comes once for each step, counts for more in it.",
            f"Load average of the machine: {loads[0]} before, {loads[1]} after. Above the number "
            "of cores, other work shared them and the times are not to be quoted.",
        ],
        data={"rows": rows, "repeats": repeats, "load_average": loads,
              "published": [dataclasses.asdict(figure) for figure in PUBLISHED]},
    )  # fmt: skip


def default_kernels() -> str:
    """What `implementation=None` takes on this platform."""
    native = jadder.implementations()["cpu"]
    if jax.default_backend() == "cpu" and native.available:
        return native.about
    return jadder.implementations()["xla"].about


# -- measuring -------------------------------------------------------------------------------------


def families(smoke: bool) -> dict[str, Family]:
    """The forms of the network that can be had here; the small size goes without cpu_fast."""
    forms = {BASE: get_family("conv")}
    available = jadder.implementations()
    for form, implementation in ADDERS.items():
        wanted = not smoke or implementation != "cpu_fast"
        if wanted and (implementation is None or available[implementation].available):
            forms[form] = dataclasses.replace(get_family("adder"), implementation=implementation)
    return forms


def measure(
    title: str, name: str, images: Images, repeats: int, limit: float, smoke: bool
) -> list[dict[str, Any]]:
    """A row for each form of a network and each program.

    Returns:
        rows with network, form, program, the batch it ran with, seconds of each round, their
        minimum in ms, ms for each image, and MiB of temporaries for the whole batch.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for form, family in families(smoke).items():
        model = create(name, family, images)
        for program, method in PROGRAMS.items():

            def compiled(batch: int, model: Any = model, method: str = method) -> Any:
                network = prepare(model, name, dataclasses.replace(images, batch=batch))
                program = network.compile(method)
                return temporaries_mib(program), network.call(method, program)

            whole, call = compiled(images.batch)
            batch = images.batch
            if form == NAIVE and whole > limit:
                batch, call = largest(compiled, whole, batch, limit)
            runs[f"{form} {program}"] = call
            rows[form, program] = {
                "network": title, "form": form, "program": program, "batch": batch,
                "temporaries_mib": whole,
            }  # fmt: skip
    times = interleaved(runs, repeats, slow=2)
    for (form, program), row in rows.items():
        seconds = times[f"{form} {program}"]
        least, median = 1e3 * min(seconds), 1e3 * statistics.median(seconds)
        row |= {"ms": least, "median_ms": median, "rounds": len(seconds)}
        row["ms_per_image"] = least / row["batch"]
    for (_, program), row in rows.items():
        base = rows[BASE, program]
        row["times"] = row["ms_per_image"] / base["ms_per_image"]
        row["memory"] = row["temporaries_mib"] / base["temporaries_mib"]
    return list(rows.values())


def largest(
    compiled: Callable[[int], tuple[float, Any]], whole: float, batch: int, limit: float
) -> tuple[int, Any]:
    """A batch, a power of two, whose program keeps within `limit` MiB.

    Args:
        compiled: MiB and the program for a batch.
        whole: MiB of the program for `batch`.
        batch: too large.
        limit: in MiB.

    Raises:
        UserError: not even two images do, the fewest that can be trained on.

    Example:
        >>> largest(lambda batch: (3.0 * batch, f"for {batch}"), 48.0, 16, 13.0)
        (4, 'for 4')
    """
    memory, call = whole, None
    while memory > limit:
        if batch <= FEWEST:
            raise UserError(
                f"--memory-limit {limit / 1024:g}: {batch} images need {memory:.0f} MiB"
            )
        # As if temporaries were in proportion to the batch; then it is seen whether they are.
        batch = max(FEWEST, 2 ** math.floor(math.log2(batch * limit / memory)))
        memory, call = compiled(batch)
    return batch, call


# -- tables ----------------------------------------------------------------------------------------


def pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each form's training and inference."""
    of = {(row["network"], row["form"], row["program"]): row for row in rows}
    return [
        (of[network, form, "training"], of[network, form, "inference"])
        for network, form, program in of
        if program == "training"
    ]


def relative_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Theirs above, ours below, both relative to the multiplying network."""
    columns = ("network", "method", "training time", "inference time", "training memory",
               "inference memory")  # fmt: skip
    theirs: list[list[Cell]] = [
        ["theirs: SimpleViT", figure.method, figure.training, figure.inference, figure.memory, None]
        for figure in PUBLISHED
        if figure.inference
    ]
    ours: list[list[Cell]] = [
        [training["network"], training["form"], training["times"], inference["times"],
         training["memory"], inference["memory"]]
        for training, inference in pairs(rows)
    ]  # fmt: skip
    return Table(
        "Relative to the multiplying network, image by image (theirs: Adder-ViT, on their GPU)",
        columns, theirs + ours, dict.fromkeys(columns[2:], ".2f"),
    )  # fmt: skip


def absolute_table(rows: Sequence[Mapping[str, Any]], repeats: int) -> Table:
    cells: list[list[Cell]] = [
        [row[name] for name in ("network", "form", "program", "batch", "ms", "median_ms")]
        + [1e3 / row["ms_per_image"], row["temporaries_mib"]]
        for row in rows
    ]
    batch = max(row["batch"] for row in rows)
    memory = f"temporaries at batch {batch} (MiB)"
    return Table(
        f"Minimum over {repeats} rounds; three where one takes more than 2 s",
        ("network", "form", "program", "batch", "minimum (ms)", "median (ms)", "images/s", memory),
        cells,
        {"minimum (ms)": ".2f", "median (ms)": ".2f", "images/s": ",.1f", memory: ",.1f"},
    )


def published_table() -> Table:
    rows: list[list[Cell]] = [
        [f.source, f.what, f.hardware, f.method, f.training, f.inference, f.memory]
        for f in PUBLISHED
    ]
    return Table(
        "What others published: their figures, on their hardware",
        ("source", "what", "hardware", "method", "training", "inference", "training memory"),
        rows,
    )


# -- the picture -----------------------------------------------------------------------------------


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Bars relative to the multiplying network, a row of panels for each network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    panels = {
        "training time": ("training", "times"),
        "inference time": ("inference", "times"),
        "temporaries in training": ("training", "memory"),
    }
    figure = new_figure(11, 1.4 + 2.1 * len(networks), title)
    grid = figure.subplots(len(networks), 3, squeeze=False, sharey=True, sharex="col")
    for column, (name, (program, what)) in zip(grid.T, panels.items(), strict=True):
        ends = [1.0]
        for axes, network in zip(column, networks, strict=True):
            of = {row["form"]: row[what] for row in rows
                  if (row["network"], row["program"]) == (network, program)}  # fmt: skip
            bars = axes.barh(forms, [of[form] for form in forms], color=[f"C{i}" for i in range(9)])
            axes.bar_label(bars, [f"×{of[form]:.2f}" for form in forms], padding=3)
            axes.axvline(1, color="k", linewidth=0.8)
            axes.set_title(f"{network}: {name}", fontsize=10)
            axes.grid(alpha=0.3, axis="x")
            ends += of.values()
        axes = column[-1]
        axes.set_xscale("log", base=2)
        # Bars of a logarithmic scale have no zero to start from; labels need room on the right.
        axes.set_xlim(0.7 * min(ends), max(ends) * (max(ends) / min(ends)) ** 0.4 * 1.5)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("relative to multiply")
    grid[0, 0].invert_yaxis()
    save(figure, path)


EXPERIMENT = Experiment("speed", ABOUT, run, add_options, saves=False)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
