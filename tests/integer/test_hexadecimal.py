"""What a reader of the exported hexadecimal files computes is what the program computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Requantization,
    Rescale,
    Reshape,
    Residual,
    SumPool,
    export_hex,
)
from tests.integer import oracle
from tests.integer.programs import images, programs
from tests.integer.resnet20 import resnet20


def read_words(folder: Path, described: Any) -> Any:
    """As ``$readmemh`` reads them, two's complement resolved by the number of digits."""
    bits = 4 * described["digits"]
    signed = described["dtype"].startswith("int")
    words = []
    for line in (folder / described["file"]).read_text().splitlines():
        assert len(line) == described["digits"]
        word = int(line, 16)
        words.append(word - (1 << bits) if signed and word >> (bits - 1) else word)
    array = np.array(words, described["dtype"]).reshape(described["shape"])
    if array.ndim == 1:
        assert described["values"] == array.tolist()
    return array


def read(folder: Path) -> tuple[IntegerProgram, list[Any]]:
    """A program, field by field as FORMAT.md says, and its golden vectors."""
    header = json.loads((folder / "program.json").read_text())
    assert (header["format"], header["version"]) == ("jadder integer program", 1)
    operations = [read_operation(folder, each) for each in header["operations"]]
    program = IntegerProgram(
        read_activation(header["input"]), tuple(operations), header["float_input"]
    )
    return program, [read_words(folder, each) for each in header["golden"]]


def read_activation(each: Any) -> Activation:
    return Activation(
        tuple(each["shape"]), tuple(each["scale"]), tuple(each["zero_point"]),
        each["dtype"], each["maximum"],
    )  # fmt: skip


def read_operation(folder: Path, each: Any) -> Any:
    output = read_activation(each["output"])
    if each["kind"] == "Reshape":
        return Reshape(each["input"], output)
    window = {
        "strides": tuple(each.get("strides", ())),
        "padding": tuple(map(tuple, each.get("padding", ()))),
    }
    if each["kind"] == "MaxPool":
        return MaxPool(each["input"], tuple(each["window"]), output, **window)
    epilogue = each["requantization"]
    residuals = [Residual(r["value"], r["multiplier"], r["left_shift"])
                 for r in epilogue["residuals"]]  # fmt: skip
    requantization = Requantization(
        read_words(folder, epilogue["multiplier"]), read_words(folder, epilogue["bias"]),
        epilogue["shift"], epilogue["low"], epilogue["high"], tuple(residuals),
    )  # fmt: skip
    if each["kind"] == "Rescale":
        return Rescale(each["input"], requantization, output)
    if each["kind"] == "SumPool":
        return SumPool(each["input"], tuple(each["window"]), requantization, output, **window)
    assert each["kind"] == "Convolution"
    return Convolution(
        each["input"], each["product"], read_words(folder, each["kernel"]), requantization, output,
        kernel_dilation=tuple(each["kernel_dilation"]), center=each["center"],
        feature_group_count=each["feature_group_count"], **window,
    )  # fmt: skip


@settings(max_examples=20)
@given(program=programs(), seed=st.integers(0, 2**32))
def test_a_reader_gets_the_same_integers(
    tmp_path_factory: pytest.TempPathFactory, program: IntegerProgram, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("hex")
    export_hex(program, folder)
    again, golden = read(folder)
    assert golden == []
    x = images(program, 2, seed)
    for ours, expected in zip(
        oracle.every_value(again, x), oracle.every_value(program, x), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_golden_vectors_of_a_resnet20(tmp_path: Path) -> None:
    program = resnet20()
    x = images(program, 1, 0)
    export_hex(program, tmp_path, x)
    again, golden = read(tmp_path)
    assert len(golden) == len(program.values)
    for ours, expected in zip(golden, oracle.every_value(again, x), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_same_program_gives_the_same_files(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "new" / "second"
    export_hex(resnet20(), first)
    export_hex(resnet20(), second)
    names = sorted(each.name for each in first.iterdir())
    assert names == sorted(each.name for each in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    program = resnet20()
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(FileExistsError, match="an empty folder expected, or none"):
            export_hex(program, folder)
    with pytest.raises(TypeError, match="uint8"):
        export_hex(program, tmp_path / "new", np.zeros((1, 32, 32, 3)))
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]
