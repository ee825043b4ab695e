"""The page of all results: complete, harmless, and in one file."""

import base64
import html.parser
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import report
from experiments.common.errors import UserError
from experiments.studies.outcome import Outcome, Picture, Table

PNG = b"\x89PNG\r\n\x1a\n" + b"what follows is not looked at"
EVIL = "<script>alert('\"&')</script>"
LONE = "\ud800"  # JSON can say it, UTF-8 cannot
ABOUT = {
    "smoke": False, "seconds": 75.0, "peak_rss_bytes": 2**31,
    "versions": {"python": "3.11", "jax": "0.10.2"},
    "hardware": {"processor": "a processor", "cores": 2, "devices": ["cpu", "cpu"],
                 "processes": 1, "platform": "cpu"},
}  # fmt: skip


def experiment(folder: Path, title: str = "a title", **changes: Any) -> None:
    """Writes an experiment's result, through the class that all experiments use."""
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(PNG)
    Outcome(
        title,
        tables=[Table("a table", ["name", "value"], [["x", 0.25], ["y", None]], {"value": ".1%"})],
        pictures=[Picture("a.png", f"a caption {title}")],
        notes=[f"a note {title}"],
    ).save(folder, **{**ABOUT, "experiment": title, "command": f"a command {title}", **changes})


def training_run(folder: Path, **changes: Any) -> None:
    """Writes a training run's result, in the form of `Run._finish`."""
    folder.mkdir(parents=True)
    result = {
        "run": {"model": "lenet5", "dataset": "digits", "family": "adder", "seed": 3, "epochs": 2},
        "test_accuracy": 0.875, "best_test_accuracy": 0.9, "train_accuracy": 0.95,
        "parameters": 61942, "seconds_per_epoch": 1.5, "command": "a training command",
        "note": "a note on the data", **ABOUT,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps({**result, **changes}))


class Page(html.parser.HTMLParser):
    """The page's tags and text, and what is wrong with them."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def render(*folders: Path) -> Page:
    """Runs the command on folders and reads what it wrote."""
    out = folders[0].parent / "out" / "report.html"
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    return Page(out.read_text())


def test_page_has_all_results(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    experiment(runs / "b")
    experiment(runs / "a-smoke", "a small one", smoke=True)
    training_run(runs / "b" / "inner")
    training_run(runs / "alone")
    (runs / "alone" / "curves.png").write_bytes(PNG)
    page = render(runs, runs / "b")  # a folder given twice is shown once

    headings = [item["href"] for item in page.find("a")]
    assert headings == ["#s0", "#s1", "#s2", "#runs"]
    assert [item["id"] for item in page.find("section")] == ["s0", "s1", "s2", "runs"]
    assert page.text.index("a title") < page.text.index("a small one")  # full sizes first
    assert page.text.count("smoke size") == 2  # in the contents and in its section
    for text in ("a command a title", "a note a title", "1 min 15 s", "a processor, 2 cores",
                 "2 × cpu", "jax 0.10.2", "2.00 GiB", "25.0%", "a training command",
                 "a note on the data",
                 "Training run alone: lenet5 on digits, adder, seed 3"):  # fmt: skip
        assert text in page.text
    # The run inside the experiment has no section, but both are in the table.
    assert page.text.count("87.50%") == 3
    assert re.search(r"inner\s*b\s*lenet5", page.text)

    images = page.find("img")
    assert [image["alt"] for image in images][:2] == ["a caption a title", "a caption a small one"]
    assert len(images) == 3
    for image in images:
        kind, _, data = (image["src"] or "").partition("base64,")
        assert kind == "data:image/png;"
        assert base64.b64decode(data) == PNG


def test_page_stands_alone(tmp_path: Path) -> None:
    experiment(tmp_path / "runs" / "a")
    page = render(tmp_path / "runs")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;", "#")), (tag, value)
    style = Path(report.__file__).with_suffix(".css").read_text()
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.find("meta")
    )


def test_hostile_text_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    experiment(folder / "a", EVIL, versions={EVIL: EVIL + LONE})
    training_run(folder / EVIL.replace("/", "_"), command=EVIL, note=EVIL)
    page = render(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 6
    assert page.find("img")[0]["alt"] == f"a caption {EVIL}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tables": None}, "not iterable"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[1, 2]], "formats": {}}]},
         "2 cells for 1 columns"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[1]],
                      "formats": {"a": "999999999d"}}]}, "has the format '999999999d'"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [["text"]], "formats": {"a": "d"}}]},
         None),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[0.5]], "formats": {"a": ",d"}}]},
         "Unknown format code 'd'"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [[{}]], "formats": {}}]},
         "a cell of type dict"),
        ({"pictures": [{"file": "../secret.png", "caption": ""}]},
         "the file name '../secret.png'"),
        ({"hardware": []}, "hardware holds a list, expected an object"),
        ({"seconds": "soon"}, "could not convert string to float"),
    ],
)  # fmt: skip
def test_damaged_values_are_named(
    changes: dict[str, Any], reason: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    experiment(folder / "good")
    experiment(folder / "odd")
    path = folder / "odd" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    page = render(folder)
    assert "a title" in page.text
    if reason is None:
        assert "cannot be read" not in page.text
    else:
        assert re.search(rf"odd/result\.json: .*{re.escape(reason)}", page.text)
        assert f"{path} is left out: " in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"{}", b"\xff\xfe", b"null",
                                     b"[" * 100000])  # fmt: skip
def test_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / "result.json").write_bytes(content)
    page = render(tmp_path / "runs")
    assert "Results that cannot be read" in page.text
    assert "odd/result.json: " in page.text


def test_lost_pictures_are_named(tmp_path: Path) -> None:
    experiment(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "a.png").write_bytes(b"<svg onload='alert()'>")
    page = render(tmp_path / "runs")
    assert page.find("img") == []
    assert "a.png is not a PNG. a caption a title" in page.text


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path),
     Path.mkdir, lambda path: (path.touch(), os.truncate(path, 2**40))],
    ids=["FIFO", "endless", "loop", "folder", "huge"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["result.json", "a.png", "curves.png"])
def test_what_never_ends_is_passed_over(make: Any, name: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    experiment(runs / "good")
    if name == "curves.png":
        training_run(runs / "odd")
    else:
        experiment(runs / "odd")
    (runs / "odd" / name).unlink(missing_ok=True)
    make(runs / "odd" / name)
    page = render(runs)
    assert "a title" in page.text
    assert re.search(rf"odd/{name}:? ", page.text)
    assert len(page.find("img")) == 1


def test_long_names_cycles_and_closed_folders_are_passed_over(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    experiment(runs / "long")
    path = runs / "long" / "result.json"
    result = json.loads(path.read_text())
    result["pictures"][0]["file"] = "x" * 300 + ".png"
    path.write_text(json.dumps(result))
    (runs / "long" / "again").symlink_to(runs)
    training_run(runs / ("y" * 250))
    page = render(runs)
    assert "File name too long" in page.text
    assert "Training run " + "y" * 250 in page.text
    assert page.text.count("a note a title") == 1


def test_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        report.find([tmp_path / "none"])
    assert report.main([str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    assert capsys.readouterr().err == f"error: there is no result.json under {tmp_path}\n"
    assert not (tmp_path / "report.html").exists()
