"""experiments.training.metrics: rows survive an interruption once, in order, and are valid JSON."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.training.curves import draw
from experiments.training.metrics import NUMBERS, MetricsFile, are_complete, read_rows


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
    known = [row(epoch) for epoch in range(1, kept + 1)]
    second = MetricsFile(path, known)
    assert second.rows == known
    second.append(row(kept + 1))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, kept + 2))


def whole_row(epoch: int) -> dict[str, float]:
    return {**dict.fromkeys(NUMBERS, 0.5), "epoch": epoch, "step": 7 * epoch}


@given(st.integers(0, 4), st.data())
def test_rows_are_complete_or_not(count: int, data: st.DataObject) -> None:
    rows: list[Any] = [whole_row(epoch) for epoch in range(1, count + 1)]
    assert are_complete(rows, steps_per_epoch=7)
    if count:
        i = data.draw(st.integers(0, count - 1))
        key = data.draw(st.sampled_from(["epoch", "step", *NUMBERS]))
        value = data.draw(st.sampled_from(["1", [], float("nan"), True, 10**400, {}]))
        assert not are_complete([*rows[:i], {**rows[i], key: value}, *rows[i + 1 :]],
                                steps_per_epoch=7)  # fmt: skip
        assert not are_complete([*rows, rows[i]], steps_per_epoch=7)
        assert not are_complete([*rows[:i], data.draw(st.sampled_from([None, 3, "x", []]))],
                                steps_per_epoch=7)  # fmt: skip
        assert not are_complete(rows, steps_per_epoch=8)
        assert are_complete([{**rows[0], "test_loss": None}], steps_per_epoch=7)
    assert not are_complete({"rows": rows}, steps_per_epoch=7)


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
