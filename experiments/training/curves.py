"""Training curves as pictures."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.common.drawing import new_figure, save
from experiments.training.metrics import Row


def draw(path: Path, title: str, runs: Mapping[str, Sequence[Row]]) -> None:
    """Writes a PNG with loss and accuracy over epochs.

    Args:
        path: the picture's file.
        title: the line above it.
        runs: the rows of each run's metrics file, by the name the legend shows.
    """
    figure, (left, right) = _panels(title)
    _plot(left, runs, "epoch", "loss")
    _plot(right, runs, "epoch", "accuracy")
    left.set_yscale("log")
    left.yaxis.set_major_formatter(partial(_plain_tick, left))
    left.yaxis.set_minor_formatter(partial(_plain_tick, left))
    _legend(figure, left)
    save(figure, path)


def draw_times(path: Path, title: str, runs: Mapping[str, Sequence[Row]]) -> None:
    """Writes a PNG with accuracy over epochs and over the seconds that it took to get there.

    These begin when the run does: compilation is among them, and evaluation after each epoch.

    Args:
        path: the picture's file.
        title: the line above it.
        runs: as of `draw`.
    """
    figure, (left, right) = _panels(title)
    _plot(left, runs, "epoch", "accuracy")
    _plot(right, runs, "seconds", "accuracy")
    right.set_xlabel("seconds, with compilation and evaluation")
    _legend(figure, left)
    save(figure, path)


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = new_figure(10, 4, title)
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _plot(axes: Axes, runs: Mapping[str, Sequence[Row]], over: str, quantity: str) -> None:
    """Draws loss or accuracy of test and training, over "epoch" or "seconds".

    A later run's lines are thinner, so that one below them is seen on both sides.
    """
    scale = 1 if quantity == "loss" else 100
    for i, (name, rows) in enumerate(runs.items()):
        places = [row[over] for row in rows]
        for split, style in (("test", "-"), ("train", ":")):
            values = [row[f"{split}_{quantity}"] for row in rows]
            points = [float("nan") if v is None else scale * v for v in values]
            marker = "." if len(points) == 1 else None
            axes.plot(
                places, points, style, color=f"C{i}", marker=marker, label=f"{name}, {split}",
                linewidth=max(1.0, 2.6 - 0.8 * i), zorder=3 if split == "test" else 2,
            )  # fmt: skip
    axes.set_xlabel(over)
    if over == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss" if quantity == "loss" else "accuracy (%)")
    axes.grid(alpha=0.3)


def _plain_tick(axes: Axes, value: float, _place: float | None = None) -> str:
    """The label of a tick of a logarithmic axis: 2.5 and not 2.5×10⁰, and not one for each."""
    low, high = axes.get_ylim()
    crowded = high > 4 * low and f"{value:e}"[0] not in "125"
    return "" if crowded else f"{value:g}"


def _legend(figure: Figure, axes: Axes) -> None:
    """Outside of the panels, which have the same lines: in them it would cover some."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 6:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    else:
        figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=2)
