"""Train an AdderNet and its multiplying twin: `python -m experiments.train --help`."""

import dataclasses
import importlib.util
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.errors import UserError, status_of
from experiments.training.config import TrainConfig, parse

if TYPE_CHECKING:
    from experiments.training.run import Result, Run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def train() -> int:
        config = parse(argv)
        check_extras(config)
        return train_all(config, argv)

    try:
        return status_of(train)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is kept, --resume goes on from it", file=sys.stderr)
        return 130


def check_extras(config: TrainConfig) -> None:
    """Raises UserError unless the packages of the extra "train" that the run needs are there."""
    needed = {"tqdm": "tqdm", "matplotlib": "matplotlib", "orbax": "orbax-checkpoint"}
    if config.dataset == "digits":
        needed["sklearn"] = "scikit-learn"
    if config.dataset.startswith("tfds:"):
        needed["tensorflow_datasets"] = "tensorflow-datasets"
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install 'jadder[train]'")


def train_all(config: TrainConfig, argv: Sequence[str]) -> int:
    """Trains each family in turn and prints what came out."""
    from experiments.common.interrupt import Interrupted, StopRequest
    from experiments.training import processes, run

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's and tfds' own progress reports
    command = shlex.join(["python", "-m", "experiments.train", *argv])
    processes.connect(config)
    with processes.together():
        config, runs = prepare(config, command)
        finished = {family: one.finished() for family, one in runs.items()}
    ended = [family for family, result in finished.items() if result is not None]
    fingerprints = [one.fingerprint for one in runs.values()]
    processes.check_same("the options, data or finished runs", (fingerprints, ended))
    first = processes.is_first()
    results = {}
    try:
        with StopRequest() as stop:
            for family, one in runs.items():
                result = finished[family]
                if result is not None and first:
                    accuracy = f"test accuracy {result['test_accuracy']:.2%}"
                    print(f"{one.folder} is finished already: {accuracy}", file=sys.stderr)
                results[family] = result or one.train(stop)
    except Interrupted as stopped:
        again = command if config.resume else f"{command} --resume"
        if first:
            print(f"{stopped} and saved; go on with:\n{again}", file=sys.stderr)
        return run.exit_status(stopped.signum)
    if first:
        report(config, results)
    return 0


def prepare(config: TrainConfig, command: str) -> "tuple[TrainConfig, dict[str, Run]]":
    """The configuration with its model, and each family's run, before the first one trains.

    Raises:
        UserError: what cannot be done, all of it found out now.
    """
    from experiments.images.load import load
    from experiments.training import build, run

    dataset = load(
        config.dataset, config.data_dir, image_size=config.image_size,
        limit_train=config.limit_train, validation=config.validation,
        image_memory=config.image_memory,
    )  # fmt: skip
    config = dataclasses.replace(config, model=build.choose_model(config.model, dataset))
    run.check_folders(config)
    return config, {f: run.Run(config, f, dataset, command) for f in config.family}


def report(config: TrainConfig, results: "dict[str, Result]") -> None:
    """Prints a table of the runs and draws them in one picture."""
    from experiments.training.curves import draw
    from experiments.training.metrics import read_rows

    folders = {family: Path(config.out_dir) / config.run_name(family) for family in results}
    if len(folders) == 1:
        picture = next(iter(folders.values())) / "curves.png"
    else:
        picture = Path(config.out_dir) / f"{config.comparison_name}.png"
        rows = {family: read_rows(folder / "metrics.jsonl") for family, folder in folders.items()}
        draw(picture, f"{config.model} on {config.dataset}", rows)
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
    sys.exit(main())
