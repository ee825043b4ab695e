"""Files that are there as a whole or not at all, and strict reading of what others wrote."""

import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any, BinaryIO

PathLike = str | os.PathLike[str]


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces ``path`` at once."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def open_regular(path: PathLike) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      FileNotFoundError: no file.
      ValueError: a folder, a pipe, or another thing without an end.
    """
    # A pipe without a writer would keep a reader waiting.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def parse_json(content: bytes | str, where: str) -> Any:
    """The JSON value of ``content``, which lies ``where``; no name twice, and no NaN.

    Raises:
      ValueError: it is none.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{where}: too many brackets in brackets") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field twice in one object")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"a finite number expected, got {name}")


def expect(value: Any, fits: bool, expected: str, where: str) -> Any:
    """``value``, which lies ``where``, or a ValueError that says what was ``expected``."""
    if not fits:
        raise ValueError(f"{where}: {expected} expected, got {short(value)}")
    return value


def expect_fields(value: Any, names: tuple[str, ...], where: str, *, others: bool = False) -> None:
    """ValueError unless ``value`` is an object that has these fields, and no ``others``."""
    expect(value, isinstance(value, dict), "an object", where)
    missing = [name for name in names if name not in value]
    extra = [] if others else [name for name in value if name not in names]
    if missing or extra:
        raise ValueError(f"{where}: the fields {', '.join(names)} expected, got {short([*value])}")


def short(value: Any) -> str:
    """The value's text, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
