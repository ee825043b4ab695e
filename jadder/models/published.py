"""Weights that come with the package, each with its accuracy and the command that trained it."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jadder.files import write_bytes

FOLDER = Path(__file__).parent / "weights"
_INDEX = "weights.json"


@cache
def pretrained() -> Mapping[str, Mapping[str, Any]]:
    """The weights that `create` has, by the name of their file without its ending.

    Each has ``model``, ``family``, ``data`` (what ``pretrained=`` names), ``test_accuracy`` of the
    file as it is (between 0 and 1), the number of its ``parameters``, their ``dtype``, the file's
    ``bytes`` and ``sha256``, the ``command`` that trained it in so many ``epochs``, the version of
    ``jadder`` then, and perhaps a ``note``.

    Example:
      >>> sorted(pretrained())[0], pretrained()["lenet5-adder-mnist"]["test_accuracy"] > 0.99
      ('lenet5-adder-mnist', True)
    """
    index = json.loads((FOLDER / _INDEX).read_text())
    return MappingProxyType({name: MappingProxyType(index[name]) for name in sorted(index)})


def find(model: str, family: str, data: str) -> Path:
    """The file of a model's weights.

    Raises:
      ValueError: there are none, or the file is not the one that was published.
    """
    name = f"{model}-{family}-{data}"
    if name not in pretrained():
        there = ", ".join(pretrained())
        raise ValueError(
            f"create: no pretrained {model!r} of the family {family!r} on {data!r}; there are "
            f"{there}"
        )
    path = FOLDER / f"{name}.safetensors"
    if hashlib.sha256(path.read_bytes()).hexdigest() != pretrained()[name]["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum is not that in {_INDEX}")
    return path


def add(content: bytes, entry: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Adds weights to those of the package, or replaces them.

    Args:
      content: a file, as `jadder.models.save` writes it.
      entry: see `pretrained`; the checksum is added.
      folder: of the weights.

    Returns:
      The file.
    """
    path = folder / f"{entry['model']}-{entry['family']}-{entry['data']}.safetensors"
    index_path = folder / _INDEX
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    index[path.stem] = {**entry, "sha256": hashlib.sha256(content).hexdigest()}
    write_bytes(path, content)
    text = json.dumps(dict(sorted(index.items())), indent=2) + "\n"
    write_bytes(index_path, text.encode())
    pretrained.cache_clear()
    return path
