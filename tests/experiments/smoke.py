"""Experiments at their small size."""

import json
from pathlib import Path
from typing import Any


def smoke(module: Any, folder: Path, *options: str) -> dict[str, Any]:
    """Runs a script at its small size and returns its result."""
    assert module.main(["--smoke", "--out-dir", str(folder), "--devices", "1", *options]) == 0
    place = folder / f"{module.EXPERIMENT.name}-smoke"
    result: dict[str, Any] = json.loads((place / "result.json").read_text())
    assert result["experiment"] == module.EXPERIMENT.name
    assert result["smoke"] is True
    for picture in result["pictures"]:
        assert (place / picture["file"]).read_bytes().startswith(b"\x89PNG")
        assert picture["caption"]
    return result
