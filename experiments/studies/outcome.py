"""What an experiment found, in a form that one page can show: tables, pictures, notes, numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.files import write_json

Cell = str | float | int | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells. A number is shown as the column's format says; None is an empty cell.

    Attributes:
        title: the line above it.
        columns: their names, with the unit where there is one.
        rows: as many cells each as there are columns.
        formats: for the columns that hold numbers, by name: a format such as ".2%" or ",d".
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells for {len(self.columns)} columns")
        if unknown := set(self.formats) - set(self.columns):
            raise ValueError(f"{self.title}: formats of unknown columns {sorted(unknown)}")

    def texts(self) -> list[list[str]]:
        """The cells as they are shown.

        Example:
            >>> Table("t", ["name", "accuracy"], [["a", 0.5]], {"accuracy": ".1%"}).texts()
            [['a', '50.0%']]
        """
        return [
            [
                _text(cell, self.formats.get(c, ""))
                for c, cell in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    def text_columns(self) -> list[bool]:
        """Which columns hold words, and perhaps nothing; the others are set flush right."""
        places = range(len(self.columns))
        return [all(isinstance(row[i], str | None) for row in self.rows) for i in places]

    def __str__(self) -> str:
        lines = [list(self.columns), *self.texts()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = self.text_columns()
        return "\n".join(
            "  ".join(
                text.ljust(width) if is_left else text.rjust(width)
                for text, width, is_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        )


def _text(cell: Cell, form: str) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else format(cell, form)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG in the experiment's folder, and what it shows."""

    file: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An experiment's result.

    Attributes:
        title: what was asked.
        tables: for people; what they show is in `data` too, unless it is all there is.
        pictures: PNGs that lie in the folder.
        notes: sentences: what was seen, what differs from the study it repeats.
        data: all numbers, as JSON can hold them.
    """

    title: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path, **about: Any) -> None:
        """Writes `result.json`, with whatever is said `about` the run beside it.

        Raises:
            FileNotFoundError: a picture is not there.
        """
        for picture in self.pictures:
            if not (folder / picture.file).is_file():
                raise FileNotFoundError(f"{folder / picture.file} was not drawn")
        write_json(folder / "result.json", {**about, **dataclasses.asdict(self)})
