"""`python -m experiments.train` as a user meets it: signals, exit statuses, errors."""

import json
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.train import main
from experiments.training.run import Run

OPTIONS = shlex.split(
    "--family adder --model lenet5 --image-size 8 --limit-train 320 --batch-size 32 "
    "--epochs 16 --name run --checkpoint-every 0.5"
)
TIMES = ("seconds", "images_per_second")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler() -> Iterator[None]:
    """Compiling takes most of the time here, in this process and in its children."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit status and stderr."""
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def wait_for_rows(process: "subprocess.Popen[str]", metrics: Path, count: int) -> None:
    """Waits until `count` epochs are done and some more of the next one may be."""
    for _ in range(8000):
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            time.sleep(random.uniform(0, 0.2))
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.03)
    raise AssertionError(f"{metrics} has not got {count} rows")


def outcome(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The checksum of a finished run's parameters, and its metrics without the times."""
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return result["parameters_sha256"], rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What the run comes to that nobody interrupts."""
    if jax.default_backend() != "cpu":
        pytest.skip("compares runs in two processes bit by bit: needs JAX_PLATFORMS=cpu")
    folder = tmp_path_factory.mktemp("whole")
    assert main([*OPTIONS, "--out-dir", str(folder)]) == 0
    return outcome(folder / "run")


def test_killed_run_goes_on_with_the_same_bits(
    whole: tuple[str, list[dict[str, Any]]],
    train: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "runs/run"
    process = train(*OPTIONS)
    wait_for_rows(process, folder / "metrics.jsonl", random.randint(1, 6))
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    assert main([*OPTIONS, "--resume"]) == 0
    assert outcome(folder) == whole
    assert "picture: runs/run/curves.png" in capsys.readouterr().out

    # A finished run says so and is left alone.
    before = snapshot(folder)
    assert main([*OPTIONS, "--resume"]) == 0
    assert "runs/run is finished already: test accuracy" in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_stopped_run_saves_and_says_how_to_resume(
    signum: signal.Signals,
    expected: int,
    whole: tuple[str, list[dict[str, Any]]],
    train: Start,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs/run"
    process = train(*OPTIONS)
    wait_for_rows(process, folder / "metrics.jsonl", 1)
    process.send_signal(signum)
    status, err = finish(process)
    assert status == expected, err
    assert "Traceback" not in err
    assert not (folder / "result.json").exists()
    said, command = err.splitlines()[-2:]
    words = shlex.split(command)
    assert words == ["python", "-m", "experiments.train", *OPTIONS, "--resume"]
    # It has saved the very step that it names.
    step = int(said.split("stopped after ")[1].split()[0])
    assert str(step) in {path.name for path in (folder / "checkpoints").iterdir()}
    if signum == signal.SIGTERM:
        assert main(words[3:]) == 0
        assert outcome(folder) == whole


def test_both_families_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit-train", "128", "--image-size", "8", "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["family", "adder", "conv", "picture:"]
    assert Path(lines[-1].split(": ")[1]).read_bytes().startswith(b"\x89PNG")


# -- errors: one line, exit status 2, nothing written ----------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--epochs -1", "--epochs must be positive, got -1"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--model alexnet", "--model: 'alexnet' is not one of auto, "),
        ("--dataset svhn", "--dataset: 'svhn' is not one of digits, "),
        ("--dataset mnist --data-dir none", "data folder none does not exist"),
        ("--dataset cifar10 --data-dir .", "lacks 6 of 6 files"),
        ("--batch-size 5000", "--batch-size 5000 is more than the 1438 training images"),
        ("--resume", "nothing to resume"),
        ("--name kept", "kept-adder holds a run already"),
        ("--implementation abacus", "abacus"),
        ("--family conv --name kept-adder --resume", "is of another run"),
        ("--out-dir file", "file"),
        ("--batch-size 1 --limit-train 4 --devices 1", "needs at least two values per feature"),
        ("--model-options width=8", "unexpected keyword argument 'width'"),
        ("--model resnet20 --model-options width=0", "--model resnet20"),
        ("--model resnet20 --model-options width=1000000", "its parameters would take"),
        ("--image-size 1000000", "images of --image-size 1000000 would take"),
        ("--epochs 1000000000", "steps, expected below 2**31"),
    ],
)
def test_errors(
    options: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "runs/kept-adder").mkdir(parents=True)
    (tmp_path / "runs/kept-adder/config.json").write_text('{"run": {"family": "adder"}}')
    before = snapshot(tmp_path)
    assert main(options.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert text in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (f"--epochs {'9' * 320}", "--epochs must be below 2**31, got 999"),
        (f"--epochs {'9' * 5000}", "invalid int value: '999"),
        ("--learning-rate nan", "--learning-rate must be positive, got nan"),
        ("--learning-rate inf", "--learning-rate must be positive, got inf"),
        ("--learning-rate -0.1", "--learning-rate must be positive, got -0.1"),
        ("--learning-rate 1e300", "--learning-rate must be at most 1e+38"),
        ("--eta 0", "--eta must be positive, got 0"),
        ("--momentum -1", "--momentum must be zero or more"),
        ("--devices 99999999999999999999", "--devices must be below 2**31"),
        ("--image-size 0", "--image-size must be positive"),
        ("--model-options depth=-1", "depth must be a name, a finite number that is not negative"),
        ("--model-options depth=1e999", "depth must be a name, a finite number"),
        ("--model-options depth=1j", "depth must be a name, a finite number"),
        (f"--model-options norm={'-' * 50000}", "norm has 50000 characters, expected at most 200"),
        (f"--model-options norm={'-' * 190}1", "norm must be"),
    ],
)
def test_numbers_that_cannot_be(
    options: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 1100
    assert text in err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_before_training_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "__init__", prepare)
    assert main(["--family", "conv"]) == 130
    assert capsys.readouterr().err == "interrupted before training began\n"
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("tqdm", "orbax") else find(name)
    )
    assert main([]) == 2
    assert "needs tqdm, orbax-checkpoint: pip install 'jadder[train]'" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "about a minute" in out
    assert "--learning-rate" in out
    assert "examples:" in out
