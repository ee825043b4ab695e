"""experiments.integer, and runs that begin where others ended."""

import json
from pathlib import Path

import pytest

from experiments import integer, train
from tests.experiments.smoke import smoke

SMALL = ["--dataset", "digits", "--model", "lenet5", "--image-size", "8", "--limit-train", "64",
         "--batch-size", "32", "--epochs", "1", "--devices", "1"]  # fmt: skip


def test_smoke(tmp_path: Path) -> None:
    result = smoke(integer, tmp_path, "--families", "adder", "--recipe", "inside")
    labels = [run["label"] for run in result["data"]["runs"]]
    assert labels == ["adder", "adder, 2 epochs more", "adder, 3 bits in training"]
    assert set(result["data"]["runs"][0]["integer"]) == {"float", "8", "3"}
    assert set(result["data"]["runs"][2]["integer"]) == {"float", "3"}
    assert result["data"]["runs"][2]["run"]["bits"] == 3
    assert result["data"]["runs"][0]["run"]["kernel_max"] == 2.5


def test_a_run_begins_with_the_parameters_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*SMALL, "--family", "adder", "--out-dir", str(tmp_path)]
    assert train.main([*common, "--name", "first"]) == 0
    # At a rate of next to nothing a second run ends with what it began with.
    still = ["--learning-rate", "1e-30", "--weight-decay", "0", "--start", str(tmp_path / "first")]
    assert train.main([*common, *still, "--name", "second"]) == 0
    first, second = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second")
    )
    assert first["parameters_sha256"] == second["parameters_sha256"]
    assert second["run"]["start_parameters"] == first["parameters_sha256"]
    assert train.main([*common, *still, "--name", "second", "--resume"]) == 0
    capsys.readouterr()
    for options, text in (
        (["--start", str(tmp_path / "nowhere")], "expected the folder of a finished run"),
        (["--start", str(tmp_path / "first"), "--image-size", "12"], "it was trained on"),
        (["--start", str(tmp_path / "first"), "--family", "conv"], "its family is adder, not conv"),
        (["--bits", "9"], "--bits 9: "),
        (["--bits", "0"], "--bits must be positive, got 0"),
        (["--bits", "3", "--family", "conv"], "has no adder products"),
    ):
        assert train.main([*common, "--name", "third", *options]) == 2
        assert text in capsys.readouterr().err


def test_a_run_of_another_network_is_no_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*SMALL, "--family", "conv", "--out-dir", str(tmp_path)]
    assert (
        train.main(
            [
                *common,
                "--model-options",
                "multiply_ends=False",
                "--model",
                "vgg_small",
                "--name",
                "first",
            ]
        )
        == 0
    )
    capsys.readouterr()
    options = ["--start", str(tmp_path / "first"), "--name", "second"]
    assert train.main([*common, *options]) == 2
    assert "it is the run of another network" in capsys.readouterr().err
