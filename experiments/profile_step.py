"""Where the time of a training step goes: by layer, and by forward, ∂x, ∂w and update."""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jadder
from benchmarks.timing import interleaved
from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.common.environment import check_memory
from experiments.common.errors import UserError
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Cell, Outcome, Picture, Table
from experiments.studies.products import Product, products
from experiments.studies.programs import (
    Images,
    create,
    load_average,
    make_optimizer,
    prepare,
    random_normal,
    update,
)
from experiments.training.config import FAMILIES, IMPLEMENTATIONS
from jadder.models import Family, get_family
from jadder.nn import adder_mask

ABOUT = """\
Where the time of a training step goes.

Every product of the network is run alone, at the shapes and with the arguments of the network's own
calls: the forward pass, the gradients for input and kernel, and the optimizer's update of the
kernel. Beside them stand whole programs: the training forward pass, the gradient, the update of all
parameters, the step. All are compiled, run in turns in one process, and reported by their median.
Of attention's two products, which have no kernel, x and w are the left and the right operand.
"""
PASSES = ("forward", "∂x", "∂w", "update")
WHOLE = ("forward", "gradient", "update", "step")
Times = dict[str, list[float]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=jadder.models.names(), default="resnet20")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["adder", "conv"])
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--channels", type=int, default=3, help="of the images (default: 3)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds to take the median of")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="of adder products")


def run(options: argparse.Namespace, place: Place) -> Outcome:
    model, repeats, families = options.model, options.repeats, options.families
    images = Images(options.batch_size, options.image_size, options.channels)
    if place.smoke:
        model, repeats, families, images = "lenet5", 2, families[:1], Images(4, 8, 1)
    if min(*images.shape, repeats) < 1:
        raise UserError(f"images {images.shape} and --repeats {repeats} must be positive")
    check_memory(4 * math.prod(images.shape), "a batch of --batch-size images")
    loads = [load_average()]
    profiles = {
        family: profile(model, chosen(family, options.implementation), images, repeats)
        for family in families
    }
    loads.append(load_average())
    size = "x".join(map(str, images.shape))
    title = f"{model}, images {size}, on {jax.devices()[0].device_kind}"
    draw_layers(place.folder / "layers.png", profiles, title)
    draw_totals(place.folder / "totals.png", profiles, title)
    return Outcome(
        f"Where a training step's time goes: {title}",
        tables=[
            totals_table(profiles, repeats),
            whole_table(profiles),
            *layer_tables(profiles),
        ],
        pictures=[
            Picture("totals.png", "The sum of the parts beside the whole step"),
            Picture("layers.png", "Each product alone, in the order of the forward pass"),
        ],
        notes=notes(profiles, loads),
        data={"profiles": profiles, "repeats": repeats, "load_average": loads},
    )


def chosen(name: str, implementation: Any) -> Family:
    """The family, with the implementation of adder products that was asked for."""
    family = get_family(name)
    if name != "adder":
        return family
    return dataclasses.replace(family, implementation=implementation)


def profile(name: str, family: Family, images: Images, repeats: int) -> dict[str, Any]:
    """Milliseconds of every part of one network's step and of the whole.

    Returns:
        layers: for each product its path, shapes and milliseconds of its passes.
        whole: milliseconds of the whole programs.
        nothing: milliseconds of a program that does nothing to speak of.
    """
    model = create(name, family, images)
    try:
        parts = products(model, jax.ShapeDtypeStruct(images.shape, jnp.float32))
    except ValueError as error:  # what shows only when the network is called
        raise UserError(f"{name} on images of {images.shape}: {error}") from error
    network = prepare(model, name, images)
    runs: dict[str, Callable[[], Any]] = {}
    for part in {part.signature: part for part in parts}.values():
        for what, run in part_runs(part, name).items():
            runs[f"{what} {part.signature}"] = run
    for program in WHOLE:
        runs[program] = network.call(program, network.compile(program))
    scalar = jnp.zeros(())
    nothing = jax.jit(lambda x: x + 1).lower(scalar).compile()
    runs["nothing"] = lambda: nothing(scalar)
    times = {run: 1e3 * statistics.median(t) for run, t in interleaved(runs, repeats, 60).items()}
    return {
        "layers": [
            {
                "path": part.path,
                "shapes": part.shapes,
                "ms": {what: times.get(f"{what} {part.signature}") for what in PASSES},
            }
            for part in parts
        ],
        "whole": {program: times[program] for program in WHOLE},
        "nothing": times["nothing"],
    }


def part_runs(part: Product, name: str) -> dict[str, Callable[[], Any]]:
    """The compiled passes of one product on random operands, by the name of the pass."""
    out = jax.eval_shape(part.function, part.lhs, part.rhs)
    operands = [random_normal(struct) for struct in (part.lhs, part.rhs, out)]
    runs: dict[str, Callable[[], Any]] = {}
    for what, function in part.passes().items():
        runs[what] = _compiled(function, *operands)
    if part.kernel is not None:
        params = {"kernel": operands[1]}
        tx = make_optimizer(name, adder_mask({"kernel": part.kernel(operands[1])}))
        step = functools.partial(update, tx)
        runs["update"] = _compiled(step, params, params, tx.init(params))
    return runs


def _compiled(function: Callable[..., Any], *operands: Any) -> Callable[[], Any]:
    program = jax.jit(function, keep_unused=True).lower(*operands).compile()
    return lambda: program(*operands)


# -- what it comes to ------------------------------------------------------------------------------


def totals(found: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of all products by pass, of the update of all parameters, and of the rest.

    The rest, what the step takes over the sum, is negative where the parts together are slower.
    """
    sums = {
        what: sum(layer["ms"][what] or 0 for layer in found["layers"])
        for what in ("forward", "∂x", "∂w")
    }
    sums["update"] = found["whole"]["update"]
    return sums | {"rest": found["whole"]["step"] - sum(sums.values())}


def totals_table(profiles: Mapping[str, Any], repeats: int) -> Table:
    rows: list[list[Cell]] = []
    for family, found in profiles.items():
        parts, whole = totals(found), found["whole"]
        products_only = parts["forward"] + parts["∂x"] + parts["∂w"]
        explained = products_only + parts["update"]
        rows.append([
            family, parts["forward"], parts["∂x"], parts["∂w"], parts["update"], explained,
            whole["step"], explained / whole["step"], parts["forward"] / whole["forward"],
            products_only / whole["gradient"],
        ])  # fmt: skip
    times = ("forward", "∂x", "∂w", "update", "sum", "whole step")
    columns = ("family", *(f"{time} (ms)" for time in times), "sum / step",
               "products / forward program", "products / gradient program")  # fmt: skip
    formats = {column: ".2f" if "ms" in column else ".0%" for column in columns[1:]}
    return Table(
        f"All products of a step and the optimizer, run alone; medians of {repeats}",
        columns, rows, formats,
    )  # fmt: skip


def whole_table(profiles: Mapping[str, Any]) -> Table:
    columns = ["family", *(f"{program} (ms)" for program in WHOLE), "nothing (ms)"]
    rows: list[list[Cell]] = [
        [family, *found["whole"].values(), found["nothing"]] for family, found in profiles.items()
    ]
    return Table("Whole programs", columns, rows, dict.fromkeys(columns[1:], ".3f"))


def layer_tables(profiles: Mapping[str, Any]) -> list[Table]:
    """One for each family: a row for each product."""
    tables = []
    for family, found in profiles.items():
        rows = []
        for layer in found["layers"]:
            ms = [layer["ms"][what] for what in PASSES]
            products_only = sum(value or 0 for value in ms[:3])
            share = products_only / found["whole"]["step"]
            rows.append([layer["path"], layer["shapes"], *ms, share])
        columns = ["layer", "operands", *(f"{what} (ms)" for what in PASSES), "of the step"]
        formats = dict.fromkeys(columns[2:-1], ".3f") | {"of the step": ".1%"}
        tables.append(Table(f"{family}: each product alone", columns, rows, formats))
    return tables


def notes(profiles: Mapping[str, Any], loads: Sequence[float | None]) -> list[str]:
    lines = []
    for family, found in profiles.items():
        parts, step = totals(found), found["whole"]["step"]
        share = 1 - parts["rest"] / step
        lines.append(
            f"{family}: products and optimizer, run alone, add up to {share:.0%} of the step. The "
            "rest is what is no product (normalisation, activations, additions, the loss), less "
            "what XLA saves by fusing it with the products and by not writing and reading between "
            "programs; a share above 100 % means that it saves more than the rest costs."
        )
    nothing = max(found["nothing"] for found in profiles.values())
    lines.append(
        f"A program that does nothing takes {nothing:.3f} ms, which is in every figure: the "
        "updates of single kernels are little else, so the sum has the update of all parameters "
        "at once instead. Products of one shape are measured once."
    )
    if loads[0] is not None:
        lines.append(
            f"Load average of the machine: {loads[0]} before, {loads[-1]} after. Above the number "
            "of cores, other work shared them and the times are not to be quoted."
        )
    return lines


# -- pictures --------------------------------------------------------------------------------------

COLORS = {"forward": "C0", "∂x": "C1", "∂w": "C2", "update": "C3", "rest": "0.8"}


def draw_layers(path: Path, profiles: Mapping[str, Any], title: str) -> None:
    """A stacked bar for each product, a panel for each family."""
    height = max(len(found["layers"]) for found in profiles.values())
    figure = new_figure(5.5 * len(profiles) + 2, 1.8 + 0.24 * height, title)
    panels = figure.subplots(1, len(profiles), sharex=True, squeeze=False)[0]
    for axes, (family, found) in zip(panels, profiles.items(), strict=True):
        names = [layer["path"].removesuffix(".product") for layer in found["layers"]]
        left = [0.0] * len(names)
        for what in PASSES:
            widths = [layer["ms"][what] or 0 for layer in found["layers"]]
            places = range(len(names))
            axes.barh(places, widths, 0.75, left, color=COLORS[what], label=what)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set(title=family, xlabel="ms for each step, run alone")
        axes.margins(y=0.01)
        axes.grid(alpha=0.3, axis="x")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


def draw_totals(path: Path, profiles: Mapping[str, Any], title: str) -> None:
    """For each family, the parts stacked, and the whole step below them."""
    figure = new_figure(9, 1.8 + 1.1 * len(profiles), title)
    axes = figure.subplots()
    for i, found in enumerate(profiles.values()):
        left, parts = 0.0, totals(found)
        for what in PASSES:
            axes.barh(2.5 * i, parts[what], 0.9, left, color=COLORS[what],
                      label=what if i == 0 else None)  # fmt: skip
            left += parts[what]
        step = found["whole"]["step"]
        axes.barh(2.5 * i + 1, step, 0.9, color=COLORS["rest"],
                  label="whole step" if i == 0 else None)  # fmt: skip
        axes.text(left, 2.5 * i, f" {left:.1f} ms", va="center")
        axes.text(step, 2.5 * i + 1, f" {step:.1f} ms", va="center")
    ticks = [2.5 * i + j for i in range(len(profiles)) for j in (0, 1)]
    names = [f"{family}: {what}" for family in profiles for what in ("parts alone", "whole step")]
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.15 * axes.get_xlim()[1])
    axes.set_xlabel("ms")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, path)


EXPERIMENT = Experiment("profile_step", ABOUT, run, add_options, saves=False)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
