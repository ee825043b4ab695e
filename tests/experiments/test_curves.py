"""Training curves: what their pictures show, and that nothing covers it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments.common.drawing import new_figure
from experiments.training import curves


def rows(losses: list[float]) -> list[Any]:
    return [
        {"epoch": i, "seconds": 2.0 * i, "test_loss": loss, "train_loss": loss,
         "test_accuracy": 0.5, "train_accuracy": 0.5}
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 5])
def test_the_legend_covers_no_panel(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: drawn.append(figure))
    runs = {f"run {i}": rows([2.9, 2.4, 2.1]) for i in range(count)}
    curves.draw(Path("x.png"), "title", runs)
    curves.draw_times(Path("x.png"), "title", runs)
    for figure in drawn:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert len(legend.get_texts()) == 2 * count
        place = legend.get_window_extent()
        assert not any(place.overlaps(axes.get_window_extent()) for axes in figure.axes)
        # A line below another one is wider.
        widths = [line.get_linewidth() for line in figure.axes[0].lines if "test" in line._label]
        assert widths[0] > widths[1]
    assert drawn[1].axes[1].get_xlabel() == "seconds, with compilation and evaluation"


def test_ticks_of_losses_are_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = new_figure(4, 4, "").subplots()
    tick = partial(curves._plain_tick, axes)
    axes.set_yscale("log")
    axes.set_ylim(2.0, 3.0)
    assert [tick(value, 0) for value in (2.1, 2.9)] == ["2.1", "2.9"]
    axes.set_ylim(0.01, 3.0)
    assert [tick(value, 0) for value in (0.02, 0.03, 0.1, 0.5, 0.9)] == [
        "0.02",
        "",
        "0.1",
        "0.5",
        "",
    ]
