"""Several processes that train one network: how they meet, agree and fail together.

Of one process all of this is true without communication.
"""

import contextlib
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common.errors import UserError
from experiments.common.interrupt import left_to_the_system
from experiments.training.config import TrainConfig


def connect(config: TrainConfig) -> None:
    """Joins the other processes where the options ask for it; comes before any use of a device.

    Raises:
        UserError: the options are not enough here, or the coordinator cannot be reached.
    """
    if not config.many_processes:
        return
    # JAX's handler of SIGTERM would take the place of Python's, and knows nothing of Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with left_to_the_system():  # it waits for the others, for minutes
            jax.distributed.initialize(
                config.coordinator_address, config.num_processes, config.process_id
            )
    except ValueError as error:
        raise UserError(
            f"--distributed: {error} Where JAX does not find it out by itself, every process needs "
            "--coordinator-address, --num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--distributed: {error}") from error


def is_first() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Fails in every process if the body fails in one of them; the others would wait for it.

    Raises:
        UserError: the body has failed in another process.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = multihost_utils.process_allgather(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failed.any():
        raise UserError(f"process {int(np.argmax(failed))} failed; it has said why")


def check_same(what: str, value: object) -> None:
    """Raises UserError in every process unless `value` is the same in all."""
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(value).encode())))
    others = np.flatnonzero(digests != digests[0])
    if len(others):
        raise UserError(f"{what} of process {others[0]} differ from those of process 0")


def make_shared(folder: Path) -> None:
    """Makes a folder that all processes see.

    Raises:
        UserError: one of them does not see it, or it cannot be made.
    """
    with together():
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
    with together():
        # A network file system may show a new folder late.
        deadline = time.monotonic() + 30
        while not folder.is_dir():
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {jax.process_index()} does not see the folder {folder.absolute()} "
                    "that process 0 made: --out-dir must be on a file system that all share"
                )
            time.sleep(0.1)


class Votes:
    """What all processes do at the same step, though each of them may be asked for it alone.

    Several processes exchange their wishes every few steps, about twice a second, for it waits for
    the step. They count the steps alike, so all of them learn of a wish at the same step.
    """

    def __init__(self) -> None:
        self._every, self._since, self._last = 1, 0, time.monotonic()

    def __call__(self, signum: int | None, save: bool) -> tuple[int | None, bool]:
        """The signal that stops all, None if they go on, and whether all save.

        Args:
            signum: the signal that asks this process to stop.
            save: whether this process wants a checkpoint.
        """
        if jax.process_count() == 1:
            return signum, save
        self._since += 1
        if self._since < self._every:
            return None, False
        took = (time.monotonic() - self._last) / self._since
        every = min(int(0.5 / max(took, 1e-6)), 2 * self._since)
        wishes = np.asarray([signum or 0, save, max(1, every)], np.int32)
        signum, save, self._every = multihost_utils.process_allgather(wishes).max(0).tolist()
        self._since, self._last = 0, time.monotonic()
        return signum or None, bool(save)
