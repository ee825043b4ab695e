"""Small files that are either there as a whole or not at all, and those that others have left."""

import contextlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError

SCRATCH = re.compile(r"\..*\.\d+\.tmp")
"""The names of what `write_bytes` writes into; a killed process leaves one behind."""

LARGEST = 2**28
"""Bytes of a file that is read as a whole."""


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` at once: a reader, or a run killed meanwhile, never sees half a file.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    scratch = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def remove_scratch(folder: Path) -> None:
    """Removes what killed processes left of files that they were writing; for who owns it."""
    for path in folder.iterdir():
        if SCRATCH.fullmatch(path.name):
            path.unlink(missing_ok=True)


def is_there(path: Path) -> bool:
    """Whether anything has that name, if only a link to nothing."""
    return os.path.lexists(path)


def check_ordinary(folder: Path) -> None:
    """Refuses a folder for others to read where they would wait for ever, or never come to an end.

    Raises:
        UserError: something below it is no ordinary file or folder.
    """
    for path in folder.rglob("*"):
        if not os.path.isfile(path) and not os.path.isdir(path):
            raise UserError(f"{path} is no ordinary file")


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """What a file holds.

    Raises:
        UserError: it is not there, no ordinary file (which might have no end, or never a
            beginning), or larger than `largest` bytes.
    """
    try:
        # Without O_NONBLOCK, to open a FIFO would wait for somebody who writes.
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        number = os.open(path, os.O_RDONLY | flags)
        with os.fdopen(number, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{path} is no ordinary file")
            # A file may also grow while it is read.
            content = b"" if about.st_size > largest else file.read(largest + 1)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, expected a file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if max(about.st_size, len(content)) > largest:
        raise UserError(f"{path} is too large: more than {largest:,} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds something else.
    """
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def parse_json(content: bytes, where: str) -> Any:
    """A JSON value.

    Raises:
        UserError: `content`, which lies `where`, is none.
    """
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise UserError(f"{where} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from None


def entry(record: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: Path) -> Any:
    """The value of a key of a JSON object.

    Args:
        record: the object.
        key: one that it must have.
        kind: what the value must be; float takes whole numbers too, and nothing else takes bool
            for a number.
        where: the file.

    Raises:
        UserError: it is missing or of another kind.
    """
    if key not in record:
        raise UserError(f"{where} is damaged: it lacks {key!r}")
    value, kinds = record[key], kind if isinstance(kind, tuple) else (kind,)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{where} is damaged: its {key!r} is {value!r:.200}, expected {expected}")
    return value
