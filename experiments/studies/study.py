"""Several training runs side by side: trained one after the other, compared in tables and pictures.

Each run has a folder of its own, as `experiments.train` makes it. A run that is finished, or has
diverged, is not trained again, one that was interrupted goes on: a study that is killed is
continued by its command.
"""

import argparse
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.errors import UserError
from experiments.common.files import entry, is_there, read_json, write_json
from experiments.images.dataset import Dataset
from experiments.studies.command import Place
from experiments.studies.outcome import Outcome, Picture, Table
from experiments.training.build import choose_model
from experiments.training.checkpoint import check_fingerprint
from experiments.training.config import FAMILIES, IMPLEMENTATIONS, TrainConfig
from experiments.training.curves import draw
from experiments.training.data import dataset_of, source_of
from experiments.training.folder import Result, owned
from experiments.training.metrics import Row
from experiments.training.run import Diverged, Run, Wrap


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that has come to its end.

    Attributes:
        label: what the tables and pictures call it.
        config: what it was asked for; its family is one.
        folder: where it lies.
        rows: its metrics, a row for each epoch.
        result: what `result.json` says, None for a run whose loss became infinite or NaN.
        classes: of the data.
        seen: what `at_end` made of it; None for a run that diverged.
    """

    label: str
    config: TrainConfig
    folder: Path
    rows: Sequence[Row]
    result: Result | None
    classes: int
    seen: Any = None

    @property
    def diverged(self) -> bool:
        return self.result is None

    @property
    def learned(self) -> bool:
        """Whether the training accuracy of its last epoch is at least twice chance."""
        return self.result is not None and self.result["train_accuracy"] >= 2 / self.classes

    @property
    def test_accuracy(self) -> float | None:
        """Of the last epoch, between 0 and 1."""
        return None if self.result is None else self.result["test_accuracy"]

    def summary(self) -> dict[str, Any]:
        """What a study's result keeps of it, as JSON."""
        kept = ("test_accuracy", "best_test_accuracy", "train_accuracy", "parameters", "seconds",
                "seconds_per_epoch")  # fmt: skip
        return {
            "label": self.label,
            "folder": self.folder.name,
            "run": {"family": self.config.family[0], **self.config.science()},
            "diverged": self.diverged,
            "learned": self.learned,
            **({} if self.result is None else {name: self.result[name] for name in kept}),
            "epochs": list(self.rows),
        }


def train(
    plans: Mapping[str, TrainConfig],
    place: Place,
    *,
    wrap: Wrap | None = None,
    at_end: Callable[[Run], Any] | None = None,
) -> list[Trained]:
    """Trains each configuration in a folder under `place`, named after its label.

    Args:
        plans: the configurations, of one family each, by label.
        place: whose folder takes the runs.
        wrap: as of `Run`.
        at_end: looks at each run that has come to its end, with its last state; what it returns
            is the run's `seen`.

    Raises:
        UserError: a configuration that cannot be had, or a folder with another run.
        Interrupted: the run at hand has been saved.
    """
    datasets: dict[tuple[Any, ...], Dataset] = {}
    done = []
    for label, config in plans.items():
        source = tuple(source_of(config).values())
        if source not in datasets:
            datasets[source] = dataset_of(config)
        dataset = datasets[source]
        config = dataclasses.replace(
            config,
            model=choose_model(config.model, dataset),
            out_dir=str(place.folder),
            name=folder_name(label),
        )
        with owned(place.folder / config.run_name(config.family[0])):
            run = Run(config, config.family[0], dataset, place.command, wrap)
            place.stop.check(f"interrupted: what comes before {run.name} is done")
            result = _train_one(run, place)
            seen = None
            if at_end is not None and result is not None:
                run.restore()
                seen = at_end(run)
        done.append(Trained(label, config, run.folder, run.rows, result, dataset.num_classes, seen))
        if not place.smoke:
            # The programs of a run are of no use to the next one, and large.
            jax.clear_caches()
    return done


def folder_name(label: str) -> str:
    """The name of the folder of the run with that label.

    Example:
        >>> folder_name("rate 2e-3, batch norm s0")
        'rate-2e-3-batch-norm-s0'
    """
    return re.sub(r"[^\w.+-]+", "-", label).strip("-")


def _train_one(run: Run, place: Place) -> Result | None:
    """The run's result, None where it diverged, now or in an earlier process."""
    record = run.folder / "diverged.json"
    if is_there(record):
        saved = read_json(record)
        entry(saved, "message", str, record)
        if "run" in saved:  # earlier versions did not say it
            check_fingerprint(saved["run"], run.fingerprint, record)
        run.rows = run.saved_rows()
        return None
    try:
        return run.finished() or run.train(place.stop)
    except Diverged as diverged:
        print(diverged, file=sys.stderr)
        write_json(record, {
            "step": diverged.step, "message": str(diverged), "run": run.fingerprint
        })  # fmt: skip
        return None


def with_seeds(plans: Mapping[str, TrainConfig], seeds: Iterable[int]) -> dict[str, TrainConfig]:
    """Each plan once for every seed, as "label s0", "label s1", ...

    Example:
        >>> list(with_seeds({"a": TrainConfig()}, (0, 1)))
        ['a s0', 'a s1']
    """
    return {
        f"{label} s{seed}": dataclasses.replace(config, seed=seed)
        for seed in seeds
        for label, config in plans.items()
    }


def by_label(runs: Iterable[Trained]) -> dict[str, list[Trained]]:
    """The runs of all seeds together, by the label that `with_seeds` was given."""
    groups: dict[str, list[Trained]] = {}
    for run in runs:
        groups.setdefault(run.label.removesuffix(f" s{run.config.seed}"), []).append(run)
    return groups


def accuracy_table(title: str, runs: Sequence[Trained]) -> Table:
    """A row for each label: accuracies over the seeds, their spread and the time of an epoch.

    The spread is the largest less the smallest; a diverged run counts as such, not in the mean.
    """
    columns = ("network", "seeds", "diverged", "test accuracy", "spread", "best",
               "training accuracy", "parameters", "seconds per epoch")  # fmt: skip
    rows: list[list[Any]] = []
    for label, group in by_label(runs).items():
        results = [run.result for run in group if run.result is not None]

        def mean(name: str, results: Sequence[Result] = results) -> float | None:
            return statistics.fmean(r[name] for r in results) if results else None

        accuracies = [r["test_accuracy"] for r in results]
        rows.append([
            label, len(group), len(group) - len(results), mean("test_accuracy"),
            max(accuracies) - min(accuracies) if len(accuracies) > 1 else None,
            max((r["best_test_accuracy"] for r in results), default=None),
            mean("train_accuracy"),
            results[0]["parameters"] if results else None,
            statistics.median(r["seconds_per_epoch"] for r in results) if results else None,
        ])  # fmt: skip
    formats = dict.fromkeys(("test accuracy", "spread", "best", "training accuracy"), ".2%")
    formats |= {"parameters": ",d", "seconds per epoch": ".1f"}
    return Table(title, columns, rows, formats)


def comparison(title: str, runs: Sequence[Trained], place: Place) -> Outcome:
    """What runs side by side came to: a table over the seeds, and each first seed's curves."""
    curves = {label: group[0].rows for label, group in by_label(runs).items()}
    draw(place.folder / "curves.png", title, curves)
    return Outcome(
        title,
        tables=[accuracy_table("Accuracy after the last epoch, mean over the seeds", runs)],
        pictures=[Picture("curves.png", "Loss and accuracy of each network's first seed")],
        data={"runs": [one.summary() for one in runs]},
    )


# -- plans -----------------------------------------------------------------------------------------


def changed(
    config: TrainConfig, changes: Mapping[str, Any], model_options: Sequence[str] = ()
) -> TrainConfig:
    """`config` with the changes, and with `model_options` after its own or the changes'.

    Example:
        >>> changed(TrainConfig(), {"model_options": ("norm=batch",)}, ["depth=1"]).model_options
        ('norm=batch', 'depth=1')
    """
    config = dataclasses.replace(config, **changes)
    return dataclasses.replace(config, model_options=(*config.model_options, *model_options))


def families(config: TrainConfig, names: Sequence[str] = FAMILIES) -> dict[str, TrainConfig]:
    """The same run for each of the families; that which multiplies has no implementation to choose.

    Example:
        >>> config = TrainConfig(implementation="xla")
        >>> {name: one.implementation for name, one in families(config, ["adder", "conv"]).items()}
        {'adder': 'xla', 'conv': None}
    """
    plans = {name: dataclasses.replace(config, family=(name,)) for name in names}
    if "conv" in plans:
        plans["conv"] = dataclasses.replace(plans["conv"], implementation=None)
    return plans


# -- options ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The options of studies that train, with their defaults in the full and the small size.

    The small size trains on the digits that come with scikit-learn, whatever the full one's data.
    """

    full: TrainConfig
    smoke: TrainConfig
    seeds: tuple[int, ...] = (0,)

    def add(self, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("training")
        full = self.full
        group.add_argument("--dataset", help=f"as of experiments.train (default: {full.dataset})")
        group.add_argument("--data-dir", metavar="DIR", help="folder with the data set's files")
        group.add_argument("--epochs", type=int, help=f"(default: {full.epochs})")
        group.add_argument("--batch-size", type=int, help=f"(default: {full.batch_size})")
        group.add_argument("--limit-train", type=int, metavar="N", help="first N images only")
        group.add_argument(
            "--seeds", type=int, nargs="+", metavar="SEED",
            help=f"each run once for each (default: {' '.join(map(str, self.seeds))})",
        )  # fmt: skip
        group.add_argument("--implementation", choices=IMPLEMENTATIONS, help="of adder products")
        group.add_argument("--devices", type=int, metavar="N", help="(default: all)")

    def config(self, options: argparse.Namespace) -> TrainConfig:
        """What the options change of the full or the small size."""
        names = ("dataset", "data_dir", "epochs", "batch_size", "limit_train", "implementation",
                 "devices")  # fmt: skip
        given = {name: getattr(options, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.smoke if options.smoke else self.full, **changes)

    def chosen_seeds(self, options: argparse.Namespace) -> tuple[int, ...]:
        if options.seeds is not None:
            return tuple(options.seeds)
        return self.seeds[:1] if options.smoke else self.seeds

    def one_seed(self, options: argparse.Namespace) -> int:
        """The seed of a study that has its runs once.

        Raises:
            UserError: several were given.
        """
        first, *others = self.chosen_seeds(options)
        if others:
            given = " ".join(map(str, (first, *others)))
            raise UserError(f"--seeds: this study takes one seed, got {given}")
        return first
