"""The results that are kept, and the figures that the documentation takes from them."""

import json
import re
from pathlib import Path

import experiments
from experiments.report import find
from tests.experiments.json_values import numbers

FOLDER = Path(experiments.__file__).parent
RESULTS = FOLDER / "results"
PAGES = [FOLDER / "README.md", *(FOLDER.parent / "docs" / "experiments").glob("*.md")]
PUBLISHED = {"91.84", "92.25", "84.73", "65.89", "83.40"}
"""By others; the text names where."""


def test_all_of_them_can_be_read() -> None:
    found = find([RESULTS])
    assert found.experiments
    assert found.runs
    assert not found.damaged


def test_accuracies_of_the_documentation_are_theirs() -> None:
    files = [*RESULTS.rglob("result.json"), *RESULTS.rglob("metrics.jsonl")]
    kept = {
        f"{100 * number:.2f}"
        for path in files
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        )
        for number in numbers(json.loads(line))
        if isinstance(number, float)  # the whole ones are no accuracies
    }
    text = "\n".join(page.read_text() for page in PAGES)
    written = set(re.findall(r"\b\d{2,3}\.\d\d\b(?= %| \||,)", text))
    assert len(written) > 200
    assert written - PUBLISHED <= kept


def test_they_name_no_path_of_a_machine() -> None:
    for path in RESULTS.rglob("*.json*"):
        assert not re.search(r'["\s=](/|[A-Z]:\\)\w', path.read_text()), path
