"""One change at a time from a common recipe: plans by the name of the change, and their picture."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.common.drawing import new_figure
from experiments.common.errors import UserError
from experiments.studies.command import Place
from experiments.studies.study import Trained, by_label, folder_name
from experiments.training.config import TrainConfig

Changes = Mapping[str, Mapping[str, Any]]
"""What each change sets of a configuration, by the change's name. A teacher is another change's."""


def check_teachers(names: Sequence[str], changes: Changes) -> None:
    """Raises UserError where a change learns from one that is not trained beside it."""
    for name in names:
        teacher = changes[name].get("teacher", name)
        if teacher not in names:
            raise UserError(f"--changes {name!r} needs {teacher!r} beside it, to learn from")


def find_teacher(plan: TrainConfig, place: Place) -> TrainConfig:
    """A plan whose teacher is a change has that change's run of its own seed instead."""
    if plan.teacher is None:
        return plan
    folder = place.folder / folder_name(f"{plan.teacher} s{plan.seed}")
    return dataclasses.replace(plan, teacher=str(folder))


def picture(runs: Sequence[Trained], recipe: str) -> Figure:
    """A line for each change: a dot for each seed, a bar at their mean; `recipe` is marked."""
    groups = by_label(runs)
    figure = new_figure(8, 1.2 + 0.32 * len(groups))
    axes = figure.subplots()
    for place, (label, group) in enumerate(groups.items()):
        values = [100 * one.test_accuracy for one in group if one.test_accuracy is not None]
        multiplies = group[0].config.family == ("conv",)
        colour = "C0" if label == recipe else "C1" if multiplies else "0.4"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
        if values:
            axes.plot(statistics.fmean(values), place, "|", color=colour, markersize=16)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on images held back (%)")
    axes.grid(axis="x", alpha=0.3)
    return figure
