"""Checkpoints of a run with orbax: the whole training state, and what it belongs to."""

import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.common.errors import UserError

Fingerprint = dict[str, Any]

LATER: Fingerprint = {
    "dtype": "float32",
    "model_options": {},
    "validation": 0,
    "adaptive_scaling": "auto",
    "adder_rate": 10.0,
    "anneal": "none",
    "teacher": None,
    "distill_weight": 0.5,
    "distill_temperature": 2.0,
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
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint):
        self.folder = folder
        self.fingerprint = fingerprint
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves `state`, a tree of arrays; does nothing where this step is saved already."""
        if step in self._manager.all_steps():
            return
        meta = {"fingerprint": self.fingerprint, "progress": progress}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )

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
        where = self.folder / str(step)
        try:
            with _no_late_complaints():
                return self._read(step, where, state)
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds on damaged files
            raise UserError(
                f"checkpoint {where} cannot be read; without that folder, --resume takes the one "
                f"before ({type(error).__name__}: {error})"
            ) from None

    def _read(self, step: int, where: Path, state: Any) -> tuple[Any, dict[str, Any]]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=args).meta
        check_fingerprint(meta["fingerprint"], self.fingerprint, where)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return self._manager.restore(step, args=args).state, meta["progress"]


@contextlib.contextmanager
def _no_late_complaints() -> Iterator[None]:
    """Keeps a failed restore to one exception.

    When one array cannot be read, orbax closes its event loop while tensorstore still reads the
    others; each of those then prints that the loop is closed.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        time.sleep(0.5)
        raise
    finally:
        sys.unraisablehook = before


def check_fingerprint(saved: Fingerprint, current: Fingerprint, where: Path) -> None:
    """Raises UserError, naming the first difference, unless both are the same run's."""
    saved, current = LATER | saved, LATER | current
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
