"""Training curves as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

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
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, left)
    save(figure, path)


def draw_times(path: Path, title: str, runs: Mapping[str, Sequence[Row]]) -> None:
    """Writes a PNG with accuracy over epochs and over the seconds that training took.

    Args:
        path: the picture's file.
        title: the line above it.
        runs: as of `draw`.
    """
    figure, (left, right) = _panels(title)
    _plot(left, runs, "epoch", "accuracy")
    _plot(right, runs, "seconds", "accuracy")
    right.set_xlabel("seconds, the first epoch's with compilation")
    _legend(figure, left)
    save(figure, path)


def _panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = new_figure(10, 4, title)
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _plot(axes: Axes, runs: Mapping[str, Sequence[Row]], over: str, quantity: str) -> None:
    """Draws loss or accuracy of test and training, over "epoch" or "seconds"."""
    scale = 1 if quantity == "loss" else 100
    for i, (name, rows) in enumerate(runs.items()):
        places = [row[over] for row in rows]
        for split, style in (("test", "-"), ("train", ":")):
            values = [row[f"{split}_{quantity}"] for row in rows]
            points = [float("nan") if v is None else scale * v for v in values]
            marker = "." if len(points) == 1 else None
            axes.plot(
                places,
                points,
                style,
                color=f"C{i}",
                marker=marker,
                linewidth=max(1.5, 3 - 0.75 * i),  # one under another shows beside it
                label=f"{name}, {split}",
            )
    axes.set_xlabel(over)
    if over == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss" if quantity == "loss" else "accuracy (%)")
    axes.grid(alpha=0.3)


def _legend(figure: Figure, panel: Axes) -> None:
    """One for all panels, where it covers no line: below them, or beside them if it is long."""
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 6:
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    else:
        columns = len(labels) // 2 or 1
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")
