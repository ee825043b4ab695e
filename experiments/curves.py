"""Training curves as a picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.files import write_bytes
from experiments.metrics import Row


def draw(path: Path, title: str, runs: Mapping[str, Sequence[Row]]) -> None:
    """Writes a PNG with loss and accuracy over epochs.

    Args:
        path: the picture's file.
        title: the line above it.
        runs: the rows of each run's metrics file, by the name the legend shows.
    """
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for axes, quantity, scale in zip(panels, ("loss", "accuracy"), (1, 100), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            for split, style in (("test", "-"), ("train", ":")):
                values = [row[f"{split}_{quantity}"] for row in rows]
                points = [float("nan") if v is None else scale * v for v in values]
                marker = "." if len(points) == 1 else None
                axes.plot(
                    epochs, points, style, color=f"C{i}", marker=marker, label=f"{name}, {split}"
                )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("loss" if quantity == "loss" else "accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_yscale("log")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes(path, content.getvalue())
