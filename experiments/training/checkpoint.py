"""Checkpoints of a run with orbax: the whole training state, and what it belongs to."""

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.common.errors import UserError, disk_is_full, one_line
from experiments.common.files import LARGEST, check_ordinary, is_there
from experiments.training.folder import Fingerprint, remove_unfinished

LATER: Fingerprint = {
    "dtype": "float32",
    "model_options": {},
    "validation": 0,
    "adaptive_scaling": "auto",
    "adder_rate": 10.0,
    "anneal": "none",
    "start": None,
    "start_parameters": None,
    "bits": None,
    "teacher": None,
    "distill_weight": 0.5,
    "distill_temperature": 2.0,
    "earlier_epochs": [],
    "random_crop": None,
    "label_smoothing": 0.0,
    "bias_rate": 1.0,
    "decay_norms": True,
    "kernel_min": None,
    "kernel_max": None,
}
"""What earlier versions, whose fingerprints do not say so, did."""


class Checkpoints:
    """The two newest checkpoints of one run.

    A checkpoint appears under its final name when it is complete, so a process killed while it
    saves leaves the one before. Several processes make, save and restore them together, in a
    folder that all of them see.

    Args:
        folder: where the checkpoints lie, each in a folder named after its step.
        fingerprint: what decides the run's numbers; a checkpoint with another one is refused.
        or_these: fingerprints that a checkpoint may have as well.
        read_only: leaves the folder as it is, and makes none.

    Raises:
        UserError: the folder cannot be read or made.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        *,
        or_these: Sequence[Fingerprint] = (),
        read_only: bool = False,
    ):
        self.folder = folder
        self.fingerprint = fingerprint
        self.or_these = or_these
        if is_there(folder) and not folder.is_dir():
            raise UserError(f"{folder} is a file, expected a folder with checkpoints")
        limits: dict[str, Any] = (
            {"read_only": True, "create": False, "save_interval_steps": 0}
            if read_only
            else {"max_to_keep": 2}
        )
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **limits)
        # Its warning that a folder is read only says nothing that was not asked for.
        quiet = _log_level(logging.ERROR) if read_only else contextlib.nullcontext()
        with _one_error(f"{folder} cannot be opened"), quiet:
            self._manager = ocp.CheckpointManager(
                folder.absolute(), item_names=("state", "meta"), options=options
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves `state`, a tree of arrays; does nothing where this step is saved already.

        Raises:
            UserError: it cannot be saved, because the disk is full, say. What was saved before is
                there still.
        """
        if step in self._manager.all_steps():
            return
        meta = {"fingerprint": self.fingerprint, "progress": progress}
        try:
            what = f"{self.folder / str(step)} cannot be saved, --resume goes on later"
            with _one_error(what), _no_late_complaints():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                    ),
                )
        except UserError:
            with contextlib.suppress(OSError):  # makes room on a disk that has none
                remove_unfinished(self.folder)
            raise

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint's state and progress, None where there is none.

        Args:
            state: a tree with the shapes, dtypes and shardings of the arrays to read. They may
                have been saved from other devices.

        Raises:
            UserError: the checkpoint is of another model or another configuration, or damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._reading(step), _no_late_complaints():
            progress = self._progress(step)
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return self._manager.restore(step, args=args).state, progress

    def restore_part(self, state: Any) -> Any | None:
        """What of the newest checkpoint's state is in `state`, a part of its tree; None as above.

        Raises:
            UserError: as of `restore`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._reading(step), _no_late_complaints():
            self._progress(step)
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            part = ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            )
            return self._manager.restore(step, args=ocp.args.Composite(state=part)).state

    def progress(self) -> dict[str, Any] | None:
        """What the newest checkpoint says beside its state, None where there is none.

        Raises:
            UserError: as of `restore`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._reading(step):
            return self._progress(step)

    def _progress(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=args).meta
        if not any(is_of_run(meta["fingerprint"], one) for one in self.or_these):
            check_fingerprint(meta["fingerprint"], self.fingerprint, self.folder / str(step))
        progress: dict[str, Any] = meta["progress"]
        if not isinstance(progress["epochs"], int) or not progress["seconds"] >= 0:
            raise ValueError(f"progress {progress!r:.200}")
        return progress

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        where = self.folder / str(step)
        advice = "without that folder, --resume takes the one before"
        with _one_error(f"checkpoint {where} cannot be read; {advice}", status=2):
            check_ordinary(where)
            if (meta := where / "meta" / "metadata").is_file() and meta.stat().st_size > LARGEST:
                raise ValueError("its meta data are too large")
            yield


@contextlib.contextmanager
def _one_error(what: str, status: int | None = None) -> Iterator[None]:
    """Makes a UserError of whatever orbax and tensorstore raise, which is of many kinds.

    Args:
        what: could not be done.
        status: that the script ends with; None is 1 where no command line would have mended it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = disk_is_full(error)
        reason = "the disk is full" if full else f"{type(error).__name__}: {one_line(str(error))}"
        raise UserError(f"{what} ({reason})", status=status or 1) from None


@contextlib.contextmanager
def _log_level(level: int) -> Iterator[None]:
    """Of orbax's log, which is absl's."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(max(before, level))
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _no_late_complaints() -> Iterator[None]:
    """Keeps a save or restore that fails to one exception.

    When one array cannot be read or written, orbax closes its event loop while tensorstore still
    is at the others; each of those then prints that the loop is closed. Its threads log what they
    raise, too.
    """
    before, log = sys.unraisablehook, logging.getLogger("absl")

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook, level = hook, log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception:
        time.sleep(0.5)
        raise
    finally:
        sys.unraisablehook = before
        log.setLevel(level)


def check_fingerprint(saved: Any, current: Fingerprint, where: Path) -> None:
    """Raises UserError, naming the first difference, unless both are the same run's.

    Args:
        saved: as JSON gave it, from the file or folder `where`.
        current: of the run that is asked for.
        where: see above.
    """
    if not isinstance(saved, dict):
        raise UserError(f"{where} does not say of which run it is")
    check_same_options(LATER | saved, LATER | current, where)


def is_of_run(saved: Any, fingerprint: Fingerprint) -> bool:
    """Whether `check_fingerprint` finds no difference."""
    try:
        check_fingerprint(saved, fingerprint, Path())
    except UserError:
        return False
    return True


def check_same_options(saved: dict[str, Any], current: dict[str, Any], where: Path) -> None:
    """Raises UserError, naming the first difference; `saved` has been through JSON."""
    current = json.loads(json.dumps(current))  # which has no tuples
    for key in {**current, **saved}:
        old, new = saved.get(key), current.get(key)
        if old != new:
            raise UserError(f"{where} is of another run: its {key} is {old!r}, not {new!r}")


def describe(params: Any) -> str:
    """A digest of the names, shapes and dtypes of a model's parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
    return f"{len(lines)} arrays, {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]}"


def checksum(params: Any) -> str:
    """SHA-256 of the values of all parameters, in order of their names."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
