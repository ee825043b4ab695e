"""Figures as PNG files."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from experiments.common.files import write_bytes


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure, in inches. It draws with Agg and leaves pyplot's global state alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG, at once."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes(path, content.getvalue())
