"""A run's metrics: one JSON object for each epoch, one line each."""

import json
import math
import os
from pathlib import Path
from typing import Any

from experiments.common.files import write_bytes

Row = dict[str, Any]


class MetricsFile:
    """metrics.jsonl, cut back to the rows that a checkpoint knows of.

    Args:
        path: the file; made where it is missing.
        epochs: rows of later epochs, and a last line that was not written whole, are dropped:
            a run that goes on from a checkpoint writes them again.
        write: False leaves the file as it is and keeps the rows in memory only.
    """

    def __init__(self, path: Path, epochs: int = 0, *, write: bool = True):
        self.path, self.write = path, write
        self.rows = [row for row in read_rows(path) if row["epoch"] <= epochs]
        if write:
            write_bytes(path, b"".join(_line(row) for row in self.rows))

    def append(self, row: Row) -> None:
        """Adds a row and sees it written to the disk."""
        self.rows.append(row)
        if not self.write:
            return
        with self.path.open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a metrics file, [] where there is none."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _line(row: Row) -> bytes:
    # JSON has no NaN.
    numbers = {key: value if math.isfinite(value) else None for key, value in row.items()}
    return (json.dumps(numbers) + "\n").encode()
