"""experiments.training.metrics: rows survive an interruption once, in order, and are valid JSON."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.training.curves import draw
from experiments.training.metrics import MetricsFile, read_rows


def row(epoch: int, value: float = 0.5) -> dict[str, float]:
    return {"epoch": epoch, "test_accuracy": value}


@settings(max_examples=30, deadline=None)
@given(written=st.integers(0, 6), kept=st.integers(0, 6), torn=st.booleans())
def test_goes_on_from_a_checkpoint(
    tmp_path_factory: "object", written: int, kept: int, torn: bool
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"  # type: ignore[attr-defined]
    first = MetricsFile(path)
    for epoch in range(1, written + 1):
        first.append(row(epoch))
    if torn:
        with path.open("ab") as file:
            file.write(b'{"epoch": 7, "test_acc')
    second = MetricsFile(path, kept)
    kept = min(kept, written)
    assert second.rows == [row(epoch) for epoch in range(1, kept + 1)]
    second.append(row(kept + 1))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, kept + 2))


def test_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append({"epoch": 1, "test_loss": float("nan"), "train_loss": float("inf")})
    assert json.loads(path.read_text(), parse_constant=lambda name: 1 / 0) == {
        "epoch": 1, "test_loss": None, "train_loss": None,
    }  # fmt: skip


def test_curves_are_a_png_and_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [
        {f"{split}_{what}": value / epoch for split in ("train", "test") for what, value in
         (("loss", 2.0), ("accuracy", 0.5))} | {"epoch": epoch}
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    rows[1]["test_loss"] = None  # type: ignore[assignment]
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, "title", {"adder": rows, "conv": rows[:1]})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_rows(tmp_path / "absent.jsonl") == []
