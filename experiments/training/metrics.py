"""A run's metrics: one JSON object for each epoch, one line each.

Checkpoints have the rows too, and theirs count: metrics.jsonl is written after them.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.common.files import is_there, parse_json, read_bytes, write_bytes

Row = dict[str, Any]

NUMBERS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate",
           "seconds", "images_per_second")  # fmt: skip
"""What a row has beside its epoch and step. A loss that is not finite is null."""


class MetricsFile:
    """metrics.jsonl with the rows that a checkpoint knows of, whatever was in it before.

    Args:
        path: the file; made where it is missing.
        rows: of the epochs so far.
        write: False leaves the file as it is and keeps the rows in memory only.
    """

    def __init__(self, path: Path, rows: Sequence[Row] = (), *, write: bool = True):
        self.path, self.write = path, write
        self.rows = list(rows)
        if write:
            write_bytes(path, b"".join(map(_line, self.rows)))

    def append(self, row: Row) -> None:
        """Adds a row and sees it written to the disk."""
        self.rows.append(row)
        if not self.write:
            return
        with self.path.open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def plain(row: Row) -> Row:
    """The row as JSON keeps it, which has no NaN."""
    return {
        key: value if value is not None and math.isfinite(value) else None
        for key, value in row.items()
    }


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics file, [] where there is none.

    Raises:
        UserError: it is no ordinary file, or too large.
    """
    rows: list[Row] = []
    for line in read_bytes(path).splitlines() if is_there(path) else []:
        try:
            rows.append(parse_json(line, str(path)))
        except UserError:
            break
    return rows


def are_complete(rows: Any, *, steps_per_epoch: int) -> bool:
    """Whether these are the rows of the first epochs of a run, all of them and each once."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and (row.get("epoch"), row.get("step")) == (epoch, epoch * steps_per_epoch)
        and all(key in row and _is_number(row[key]) for key in NUMBERS)
        and row["test_accuracy"] is not None
        for epoch, row in enumerate(rows, 1)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return -1e300 < value < 1e300  # False of NaN too
    return value is None


def _line(row: Row) -> bytes:
    return (json.dumps(plain(row)) + "\n").encode()
