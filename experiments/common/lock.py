"""The one process that may write in a folder."""

import contextlib
import datetime
import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from experiments.common.errors import UserError

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Owns a folder, which is made where it is missing, while it is entered.

    The system lets go of the lock when its process ends, however it ends; the file `.lock` that a
    killed one leaves says nothing. A folder that was made and stayed empty is removed again.

    Raises:
        UserError: another process owns it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _acquire(folder)
    try:
        yield
    finally:
        _release(folder, file)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _acquire(folder: Path) -> IO[str] | None:
    """The locked file, None where there are no locks."""
    path = folder / NAME
    for _ in range(100):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            file = os.fdopen(os.open(path, flags, 0o666), "r+")
        except FileNotFoundError:  # the folder has just been removed by who had made it
            continue
        if not _lock(folder, file):
            return None
        # Who had the lock may have removed the file meanwhile, and somebody made a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                _sign(file)
                return file
        file.close()
    raise UserError(f"{folder} is in use by other processes")


def _lock(folder: Path, file: IO[str]) -> bool:
    """Locks an open file; False, after a word, where that cannot be had.

    Raises:
        UserError: another process has locked it.
    """
    reason = "this system has no fcntl"
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in TAKEN:
                with file:
                    raise UserError(f"{folder} is in use: {_who(file)}") from None
            reason = str(error)
    with file:
        print(f"{folder} cannot be locked ({reason}): nothing keeps a second process from writing "
              "there", file=sys.stderr)  # fmt: skip
    return False


def _sign(file: IO[str]) -> None:
    """Says who holds the lock, for those who do not get it."""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # a full disk does not hold up the lock
        file.truncate()
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": now}, file)
        file.flush()


def _who(file: IO[str]) -> str:
    try:
        owner = json.loads(file.read(1000))
        return f"process {owner['pid']} on {owner['host']} writes there since {owner['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process writes there"


def _release(folder: Path, file: IO[str] | None) -> None:
    """Removes the file while it is still locked, so that nobody waits for one that is gone."""
    with contextlib.suppress(OSError):
        (folder / NAME).unlink(missing_ok=True)
    if file is not None:
        file.close()
