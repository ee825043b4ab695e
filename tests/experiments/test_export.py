"""experiments.export: from a finished run to a folder of C, on the command line."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import export
from experiments.images.load import load
from experiments.training.config import TrainConfig
from experiments.training.run import Run
from tests.experiments.stop import StopAfter

CONFIG = TrainConfig(
    model="lenet5", family=("adder",), image_size=8, epochs=1, batch_size=32, limit_train=96,
    devices=1, augment="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("runs")
    dataset = load("digits", image_size=8, limit_train=CONFIG.limit_train)
    config = TrainConfig(**{**vars(CONFIG), "out_dir": str(place)})
    run = Run(config, "adder", dataset, "the command")
    run.train(StopAfter())
    return run.folder


def test_a_run_becomes_c_whose_check_passes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    options = [str(folder), "--out", str(out), "--name", "digits", "--vectors", "5"]
    assert export.main(options) == 0
    accuracy = json.loads((folder / "result.json").read_text())["test_accuracy"]
    printed = capsys.readouterr().out
    assert f"{accuracy:.2%} in floats" in printed
    assert (out / "digits.h").is_file()
    if shutil.which("make") and shutil.which("cc"):
        done = subprocess.run(
            ["make", "check"], cwd=out, capture_output=True, text=True, check=True
        )
        assert "digits: 5 vectors, 0 of 50 outputs differ" in done.stdout
    assert export.main(options) == 2
    assert "must be an empty folder or a new one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vectors", "0"], "--vectors must be positive, got 0"),
        (["--target", "z80"], "invalid choice: 'z80'"),
        (["--name", "a-b"], "must be a lower-case C name"),
        (["--bits", "1"], "bits must be an integer from 2 to 8, got 1"),
        (["--bits", "0"], "bits must be an integer from 2 to 8, got 0"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert export.main([str(folder), "--out", str(tmp_path / "c"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_a_folder_that_is_no_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(tmp_path), "--out", str(tmp_path / "c")]) == 2
    assert "expected the folder of a finished run" in capsys.readouterr().err


def test_the_targets_are_those_of_the_library() -> None:
    from jadder.integer.c.targets import TARGETS

    assert tuple(TARGETS) == export.TARGETS
