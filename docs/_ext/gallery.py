"""The gallery: every picture below experiments/results, with the command that made it."""

import json
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
PAGE = "gallery"


def _fill(app: Sphinx, docname: str, content: list[str]) -> None:
    if docname != PAGE:
        return
    for path in sorted(RESULTS.glob("*/result.json")):
        result = json.loads(path.read_text())
        if not result.get("pictures"):
            continue
        app.env.note_dependency(str(path))
        content[0] += f"\n## {result['title']}\n\n```{{code-block}} none\n:class: command\n\n"
        content[0] += f"{result['command']}\n```\n"
        for picture in result["pictures"]:
            file = f"../experiments/results/{path.parent.name}/{picture['file']}"
            content[0] += f"\n:::{{figure}} {file}\n:alt: {picture['caption']}\n\n"
            content[0] += f"{picture['caption']}.\n:::\n"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
