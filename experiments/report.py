"""All results of some folders as one HTML page: `python -m experiments.report --help`.

The page stands alone: pictures are part of it, there are no scripts, and it asks no other host for
anything. Whatever a result says is text to it.
"""

import argparse
import base64
import dataclasses
import os
import re
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError, one_line, status_of
from experiments.common.files import is_there, read_bytes, read_json, write_bytes
from experiments.studies.outcome import Picture, Table
from experiments.training.config import Parser

ABOUT = """\
Renders every result.json under some folders into one HTML page, with its tables and pictures.

Experiments have a section each, and so have training runs of experiments.train; those that an
experiment made are listed with all others in a table at the end.
"""
PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>jadder: experiments</title>
<style>
$style</style>
</head>
<body>
<h1>jadder: experiments</h1>
<p class="soft">$summary</p>
$contents
<main>
$sections
</main>
</body>
</html>
""")
# Formats from a file: what Python's format would make of others may fill the memory.
FORMAT = re.compile(r",?(\.\d{1,2})?[defg%]?")
# What a file that says something else than expected brings about.
DAMAGE = (UserError, KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError)
LARGEST_PICTURE = 2**24
PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Section:
    """A result as the page shows it.

    Attributes:
        folder: where it lies.
        title: its heading.
        smoke: whether it is of the small size.
        command: the command line that made it.
        facts: names and values: hardware, versions, time.
        tables, pictures, notes: as of `Outcome`.
    """

    folder: Path
    title: str
    smoke: bool
    command: str
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies under the folders.

    Attributes:
        experiments: their sections, full sizes first.
        runs: the results of all training runs, by their folder.
        damaged: files that could not be read, and why.
    """

    experiments: Sequence[Section]
    runs: dict[Path, dict[str, Any]]
    damaged: Sequence[tuple[Path, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return status_of(lambda: _write(sys.argv[1:] if argv is None else argv))


def _write(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    found = find([Path(folder) for folder in options.folders])
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page(found).encode(errors="replace"))
    for path, reason in found.damaged:
        print(f"{path} is left out: {reason}", file=sys.stderr)
    print(f"{count(len(found.experiments), 'experiment')}, "
          f"{count(len(found.runs), 'training run')}: {out}")  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments.report", description=ABOUT, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "folders", nargs="*", default=["runs"], metavar="RUNS_DIR",
        help="looked through with all that is below (default: runs)",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="report.html", metavar="FILE", help="the page (default: report.html)"
    )
    return parser


# -- reading ---------------------------------------------------------------------------------------


def find(folders: Iterable[Path]) -> Found:
    """Reads every `result.json` under the folders, each once.

    Raises:
        UserError: a folder is not there, or there is no result at all.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    damaged: list[tuple[Path, str]] = []
    paths: dict[str, Path] = {}
    for folder in folders:
        for path in _results(folder, damaged):
            paths.setdefault(os.path.realpath(path), path)
    if not paths:
        raise UserError(f"there is no result.json under {', '.join(map(str, folders))}")
    experiments: list[Section] = []
    runs: dict[Path, dict[str, Any]] = {}
    for path in sorted(paths.values()):
        try:
            result = read_json(path)
            if "experiment" in result:
                experiments.append(_experiment(path.parent, result))
            else:
                _run_section(path.parent, result)  # raises where something is missing
                runs[path.parent] = result
        except DAMAGE as error:
            damaged.append((path, _reason(error).removeprefix(f"{path} ")))
    experiments.sort(key=lambda section: (section.smoke, section.folder.name, section.folder))
    return Found(experiments, runs, damaged)


def _results(folder: Path, damaged: list[tuple[Path, str]]) -> Iterator[Path]:
    """Whatever is named `result.json` under a folder. No link to a folder is followed."""

    def unreadable(error: OSError) -> None:
        damaged.append((Path(error.filename), error.strerror or "cannot be read"))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        if "result.json" in (*folders, *files):
            yield Path(place, "result.json")


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(str(error))


def _an_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__}, expected an object")
    return value


def _experiment(folder: Path, result: dict[str, Any]) -> Section:
    """The section of an experiment's result, as `Outcome.save` writes it."""
    tables = [
        Table(str(table["title"]), [str(name) for name in table["columns"]],
              [[_cell(cell) for cell in row] for row in table["rows"]],
              {str(name): _format(form) for name, form in table["formats"].items()})
        for table in result["tables"]
    ]  # fmt: skip
    for table in tables:
        table.texts()  # raises where a format does not suit a cell
    return Section(
        folder,
        str(result["title"]),
        bool(result["smoke"]),
        str(result["command"]),
        _facts(result),
        tables,
        [Picture(_file_name(item["file"]), str(item["caption"])) for item in result["pictures"]],
        [str(note) for note in result["notes"]],
    )


def _run_section(folder: Path, result: dict[str, Any]) -> Section:
    """The section of a training run that no experiment made."""
    run = result["run"]
    title = f"{run['model']} on {run['dataset']}, {run['family']}, seed {run['seed']}"
    pictures = [Picture("curves.png", f"Loss and accuracy over epochs: {title}")]
    return Section(
        folder,
        f"Training run {folder.name}: {title}",
        False,
        str(result["command"]),
        _facts(result),
        [run_table("Result", {folder: result}, {})],
        pictures if is_there(folder / "curves.png") else [],
        [str(result["note"])] if result.get("note") else [],
    )


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    hardware = _an_object(result["hardware"], "hardware")
    versions = _an_object(result["versions"], "versions")
    devices = hardware["devices"]
    kinds = ", ".join(f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices))
    facts = [
        (
            "time of the command" if "experiment" in result else "time",
            duration(float(result["seconds"])),
        ),
        ("hardware", f"{hardware['processor']}, {hardware['cores']} cores; devices: {kinds}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    for key, name in (("peak_rss_bytes", "peak memory"), ("peak_device_bytes", "on the device")):
        if key in result:
            facts.append((name, f"{float(result[key]) / 2**30:.2f} GiB"))
    return facts


def _cell(cell: Any) -> Any:
    if cell is None or isinstance(cell, str | int | float):
        return cell
    raise ValueError(f"a table has a cell of type {type(cell).__name__}")


def _format(form: Any) -> str:
    if isinstance(form, str) and FORMAT.fullmatch(form):
        return form
    raise ValueError(f"a table has the format {form!r}")


def _file_name(name: Any) -> str:
    if isinstance(name, str) and name == Path(name).name and name.endswith(".png"):
        return name
    raise ValueError(f"a picture has the file name {name!r}")


# -- writing ---------------------------------------------------------------------------------------


def page(found: Found) -> str:
    """The whole page."""
    studies = {section.folder.resolve(): section for section in found.experiments}
    alone = [folder for folder in found.runs if _owner(folder, studies) is None]
    sections = [
        *found.experiments,
        *(_run_section(folder, found.runs[folder]) for folder in alone),
    ]
    blocks = [_section(f"s{i}", section) for i, section in enumerate(sections)]
    entries = [(f"s{i}", section.title, section.smoke) for i, section in enumerate(sections)]
    if found.runs:
        table = run_table("All training runs", found.runs, studies)
        blocks.append(_part("runs", f"<h2>{escape(table.title)}</h2>\n{_table(table)}"))
        entries.append(("runs", table.title, False))
    if found.damaged:
        blocks.append(_part("damaged", _damaged(found.damaged)))
        entries.append(("damaged", "Results that cannot be read", False))
    return PAGE.substitute(
        style=Path(__file__).with_suffix(".css").read_text(),
        summary=f"{count(len(found.experiments), 'experiment')}, "
        f"{count(len(found.runs), 'training run')}",
        contents=_contents(entries),
        sections="\n".join(blocks),
    )


def run_table(title: str, runs: dict[Path, dict[str, Any]], studies: dict[Path, Section]) -> Table:
    """A row for each training run, with the experiment that it is a part of.

    Args:
        title: of the table.
        runs: the runs' results, by folder.
        studies: the experiments, by resolved folder.
    """
    columns = ["run", "part of", "model", "data", "family", "seed", "epochs", "test accuracy",
               "best", "training accuracy", "s per epoch", "parameters"]  # fmt: skip
    rows = []
    for folder, result in runs.items():
        run = result["run"]
        owner = _owner(folder, studies)
        rows.append([
            folder.name, owner.folder.name if owner else None,
            *(str(run[name]) for name in ("model", "dataset", "family")),
            int(run["seed"]), int(run["epochs"]),
            *(float(result[name]) for name in ("test_accuracy", "best_test_accuracy",
                                               "train_accuracy", "seconds_per_epoch")),
            int(result["parameters"]),
        ])  # fmt: skip
    if not any(row[1] for row in rows):
        columns, rows = columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]
    formats = dict.fromkeys(("test accuracy", "best", "training accuracy"), ".2%")
    return Table(title, columns, rows, formats | {"s per epoch": ".1f", "parameters": ",d"})


def _owner(folder: Path, studies: dict[Path, Section]) -> Section | None:
    """The experiment in whose folder a run lies."""
    parents = folder.resolve().parents
    return next((studies[parent] for parent in parents if parent in studies), None)


def _contents(entries: Sequence[tuple[str, str, bool]]) -> str:
    items = "\n".join(
        f'<li><a href="#{anchor}">{escape(title)}</a>{_badge(smoke)}</li>'
        for anchor, title, smoke in entries
    )
    return f'<nav aria-label="Contents">\n<ol>\n{items}\n</ol>\n</nav>'


def _badge(smoke: bool) -> str:
    return ' <span class="badge">smoke size</span>' if smoke else ""


def _part(anchor: str, content: str) -> str:
    return f'<section id="{anchor}">\n{content}\n</section>'


def _section(anchor: str, section: Section) -> str:
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in section.facts
    )
    tables = "\n".join(f"<h3>{escape(t.title)}</h3>\n{_table(t)}" for t in section.tables)
    pictures = "\n".join(_figure(section.folder, picture) for picture in section.pictures)
    return _part(anchor, "\n".join([
        f"<h2>{escape(section.title)}{_badge(section.smoke)}</h2>",
        f"<pre><code>{escape(section.command)}</code></pre>",
        f"<dl>\n{facts}</dl>",
        *(f"<p>{escape(note)}</p>" for note in section.notes),
        pictures,
        tables,
    ]))  # fmt: skip


def _table(table: Table) -> str:
    classes = ["" if is_text else ' class="number"' for is_text in table.text_columns()]

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>"
            for cell, kind in zip(cells, classes, strict=True)
        )
        return f"<tr>{inner}</tr>"

    head = line("th", table.columns)
    body = "\n".join(line("td", row) for row in table.texts())
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _figure(folder: Path, picture: Picture) -> str:
    path, caption = folder / picture.file, escape(picture.caption)
    try:
        content = read_bytes(path, LARGEST_PICTURE)
        reason = "" if content.startswith(PNG) else f"{path} is not a PNG"
    except UserError as error:
        reason = str(error)
    if reason:
        return f'<p class="bad">{escape(reason)}. {caption}</p>'
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return (
        f'<figure><div class="scroll"><img alt="{caption}" src="{source}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _damaged(damaged: Sequence[tuple[Path, str]]) -> str:
    items = "\n".join(
        f'<p class="bad">{escape(str(path))}: {escape(reason)}</p>' for path, reason in damaged
    )
    return f"<h2>Results that cannot be read</h2>\n{items}"


def count(number: int, noun: str) -> str:
    """
    Example:
        >>> count(1, "run"), count(3, "run")
        ('1 run', '3 runs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """
    Example:
        >>> duration(7.25), duration(125), duration(7300)
        ('7.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    sys.exit(main())
