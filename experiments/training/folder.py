"""A run's folder: what lies there, whose it is, and what its files say.

config.json     the run's fingerprint, and the command that began it
checkpoints/    a folder for each step that was saved, with the rows of the epochs before it
metrics.jsonl   those rows, a line each
result.json     of a run that has ended, and which run that is
model.safetensors   its network, as jadder.models.load reads it; none of a run with --bits
diverged.json   of a run in a study whose loss became infinite or NaN
curves.png
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.common import lock
from experiments.common.errors import UserError
from experiments.common.files import SCRATCH, entry, is_there, read_json, remove_scratch
from experiments.training.config import TrainConfig

Fingerprint = dict[str, Any]
Result = dict[str, Any]

UNFINISHED = ".orbax-checkpoint-tmp"
"""In the names of what orbax saves into before it is a checkpoint."""

RESULT: dict[str, type | tuple[type, ...]] = {
    "run": dict,
    "test_accuracy": float,
    "best_test_accuracy": float,
    "train_accuracy": float,
    "parameters": int,
    "epochs": int,
    "steps": int,
    "seconds": float,
    "seconds_per_epoch": float,
    "images_per_second": float,
}
"""What others read in a result."""


def check_folders(config: TrainConfig) -> None:
    """Refuses to write over earlier runs, or to resume where nothing is.

    Raises:
        UserError: see above; nothing has been written then.
    """
    folders = [Path(config.out_dir) / config.run_name(family) for family in config.family]
    for folder in folders:
        if is_used(folder) and not config.resume:
            raise UserError(
                f"{folder} holds a run already; --resume goes on with it, --name or --out-dir "
                "makes a new one"
            )
        check_folder(folder)
    if config.resume and not any(map(is_used, folders)):
        raise UserError(f"nothing to resume: there is no run in {' or '.join(map(str, folders))}")


def check_folder(folder: Path) -> None:
    """Refuses a folder in which no run can begin or go on.

    Raises:
        UserError: it is no folder, holds something else, has lost its checkpoints, or what it says
            of its run is damaged.
    """
    if is_there(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder for the run")
    if not is_used(folder):
        return
    if not is_there(folder / "config.json"):
        raise UserError(f"{folder} has files, but no run: it lacks config.json")
    read_fingerprint(folder)
    ended = read_result(folder) is not None or is_there(folder / "diverged.json")
    if not ended and not saved_steps(folder) and _has_rows(folder):
        raise UserError(
            f"{folder} has rows of finished epochs in metrics.jsonl, but no checkpoint to go on "
            "from: put its folder checkpoints back, or begin anew with --name or --out-dir"
        )


def is_used(folder: Path) -> bool:
    """Whether it holds more than a run leaves that was killed before it wrote anything."""
    if not folder.is_dir():
        return False
    for path in folder.iterdir():
        if path.name == lock.NAME or SCRATCH.fullmatch(path.name):
            continue
        if path.name == "checkpoints" and path.is_dir() and not saved_steps(folder):
            continue
        return True
    return False


def saved_steps(folder: Path) -> list[int]:
    """The steps of which there are checkpoints."""
    place = folder / "checkpoints"
    if is_there(place) and not place.is_dir():
        raise UserError(f"{place} is a file, expected a folder with checkpoints")
    names = [path.name for path in place.iterdir()] if place.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and len(name) < 20)


def _has_rows(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return is_there(path) and not (path.is_file() and path.stat().st_size == 0)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Owns a run's folder, without what killed runs have left half written there.

    Raises:
        UserError: another process owns it, or no run can begin or go on there.
    """
    check_folder(folder)
    with lock.hold(folder):
        check_folder(folder)
        remove_scratch(folder)
        remove_unfinished(folder / "checkpoints")
        yield


def remove_unfinished(checkpoints: Path) -> None:
    """Removes what processes that were killed, or had no room, left of checkpoints."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if UNFINISHED in path.name and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def read_fingerprint(folder: Path) -> Fingerprint:
    """Which run a folder is of.

    Raises:
        UserError: config.json is not there or damaged.
    """
    path = folder / "config.json"
    return entry(read_json(path), "run", dict, path)


def read_result(folder: Path) -> Result | None:
    """The result of the run that has ended there, None where none has.

    Raises:
        UserError: result.json is damaged.
    """
    path = folder / "result.json"
    if not is_there(path):
        return None
    result = read_json(path)
    for key, kind in RESULT.items():
        entry(result, key, kind, path)
    return result
