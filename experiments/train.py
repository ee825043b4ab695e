"""Train an AdderNet and its multiplying twin: `python -m experiments.train --help`."""

import contextlib
import dataclasses
import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.allocation import restart_with_huge_pages
from experiments.common.errors import UserError, status_of
from experiments.training.config import TrainConfig, parse

if TYPE_CHECKING:
    from experiments.common.interrupt import StopRequest
    from experiments.images.dataset import Dataset
    from experiments.training.folder import Result
    from experiments.training.run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def train() -> int:
        config = parse(argv)
        check_extras(config)
        return train_all(config, argv)

    return status_of(train)


def check_extras(config: TrainConfig) -> None:
    """Raises UserError unless the packages of the extra "train" that the run needs are there."""
    needed = {"tqdm": "tqdm", "matplotlib": "matplotlib", "orbax": "orbax-checkpoint"}
    if config.dataset == "digits":
        needed["sklearn"] = "scikit-learn"
    if config.dataset.startswith("tfds:"):
        needed |= {"tensorflow_datasets": "tensorflow-datasets", "array_record": "array-record"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install 'jadder[train]'")


def train_all(config: TrainConfig, argv: Sequence[str]) -> int:
    """Trains each family in turn and prints what came out."""
    from experiments.common.interrupt import Interrupted, StopRequest
    from experiments.training import build, folder, processes

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's and tfds' own progress reports
    command = shlex.join(["python", "-m", "experiments.train", *argv])
    processes.connect(config)
    with contextlib.ExitStack() as held:
        with processes.together():
            dataset = read_dataset(config)
            config = dataclasses.replace(config, model=build.choose_model(config.model, dataset))
            folder.check_folders(config)
        stop = held.enter_context(StopRequest())
        with processes.together():
            if processes.is_first():
                for family in config.family:
                    held.enter_context(folder.owned(run_folder(config, family)))
                folder.check_folders(config)
            runs = prepare(config, dataset, command, stop)
            finished = {family: one.finished() for family, one in runs.items()}
        ended = [family for family, result in finished.items() if result is not None]
        fingerprints = [one.fingerprint for one in runs.values()]
        processes.check_same("the options, data or finished runs", (fingerprints, ended))
        first = processes.is_first()
        results = {}
        try:
            for family, one in runs.items():
                result = finished[family]
                if result is not None and first:
                    accuracy = f"test accuracy {result['test_accuracy']:.2%}"
                    print(f"{one.folder} is finished already: {accuracy}", file=sys.stderr)
                    one.leave_model(result)
                results[family] = result or one.train(stop)
        except Interrupted as stopped:
            again = command if config.resume else f"{command} --resume"
            if first:
                print(f"{stopped} and saved; go on with:\n{again}", file=sys.stderr)
            return 128 + stopped.signum
        if first:
            report(config, runs, results)
    return 0


def read_dataset(config: TrainConfig) -> "Dataset":
    """The images that the configuration names.

    Raises:
        UserError: they are not to be had.
    """
    from experiments.training.data import dataset_of

    return dataset_of(config)


def run_folder(config: TrainConfig, family: str) -> Path:
    return Path(config.out_dir) / config.run_name(family)


def prepare(
    config: TrainConfig, dataset: "Dataset", command: str, stop: "StopRequest"
) -> "dict[str, Run]":
    """Each family's run, before the first one trains.

    Raises:
        UserError: what cannot be done, all of it found out now.
        Interrupted: `stop` was requested.
    """
    from experiments.training.run import Run

    runs = {}
    for family in config.family:
        runs[family] = Run(config, family, dataset, command)
        stop.check("interrupted before training began")
    return runs


def report(config: TrainConfig, runs: "dict[str, Run]", results: "dict[str, Result]") -> None:
    """Prints a table of the runs and draws them in one picture."""
    from experiments.training.curves import draw

    if len(runs) == 1:
        picture = next(iter(runs.values())).folder / "curves.png"
    else:
        picture = Path(config.out_dir) / f"{config.comparison_name}.png"
        title = f"{config.model} on {config.dataset}"
        draw(picture, title, {family: one.rows for family, one in runs.items()})
    print(table(results))
    print(f"picture: {picture}")


def table(results: "dict[str, Result]") -> str:
    """The runs' results, a line for each family."""
    columns: dict[str, Any] = {
        "family": lambda family, r: family,
        "test accuracy": lambda family, r: f"{r['test_accuracy']:.2%}",
        "best": lambda family, r: f"{r['best_test_accuracy']:.2%}",
        "seconds": lambda family, r: f"{r['seconds']:.1f}",
        "images/s": lambda family, r: f"{r['images_per_second']:.0f}",
        "parameters": lambda family, r: f"{r['parameters']:,}",
    }
    lines = [list(columns)]
    lines += [[cell(family, r) for cell in columns.values()] for family, r in results.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w)
                  for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )  # fmt: skip


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
