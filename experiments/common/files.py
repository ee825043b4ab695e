"""Small files that are either there as a whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` at once: a reader, or a run killed meanwhile, never sees half a file."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
