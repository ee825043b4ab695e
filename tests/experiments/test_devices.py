"""experiments.train on several devices and in several processes: the numbers are those of one."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jadder
from experiments.common.errors import UserError
from experiments.common.interrupt import Interrupted
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import parse
from experiments.training.run import Run
from tests.experiments.stop import StopAfter

# 2 steps an epoch, in which 4 of the 20 images are left over; the last test batch has 3 images.
OPTIONS = "--dataset mnist --model lenet5 --family adder --batch-size 8 --epochs 2 --name run"
IMAGES = {"train": 20, "t10k": 11}
TOLERANCE = {"float32": 1e-3, "float64": 1e-9}
"""Between two numbers of devices, of each array's largest element after 4 steps."""

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., "subprocess.Popen[str]"]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Lets JAX have float64 where `dtype` is that; orbax's threads have to see it too."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler() -> Iterator[None]:
    """Compiling takes most of the time here; the programs are tiny."""
    if jax.local_device_count() != 8:
        pytest.skip("needs the eight devices that tests/conftest.py makes of a CPU")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's files with a few images of 8 x 8."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("mnist")
    for split, count in IMAGES.items():
        images, labels = rng.integers(0, 256, (count, 8, 8)), np.arange(count) % 10
        for array, name in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
            header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">u4").tobytes()
            (folder / f"{split}-{name}").write_bytes(header + array.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def dataset(data_dir: Path) -> Dataset:
    return load("mnist", str(data_dir))


def start(out_dir: Path, dataset: Dataset, **changes: Any) -> Run:
    config = dataclasses.replace(parse(shlex.split(OPTIONS)), out_dir=str(out_dir), **changes)
    return Run(config, "adder", dataset, "the command")


def numbers(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def rows_of(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def assert_same(run: Run, state: Any, expected: Run) -> None:
    """The whole state and all metrics: parameters, momentum, statistics, losses."""
    tolerance = TOLERANCE[run.config.dtype]
    a, b = numbers(state), numbers(expected.state)
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype
        other = b[name].astype(np.float64)
        scale = max(1e-3, float(np.abs(other).max()))
        error = float(np.abs(array - other).max())
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"
    for row, same in zip(rows_of(run), rows_of(expected), strict=True):
        assert row == pytest.approx(same, rel=tolerance)


Whole = Callable[[str], Run]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Whole:
    """Runs of each dtype that nobody interrupted, on one device."""
    runs: dict[str, Run] = {}

    def get(dtype: str) -> Run:
        if dtype not in runs:
            with precision(dtype):
                folder = tmp_path_factory.mktemp(dtype)
                runs[dtype] = start(folder, dataset, dtype=dtype, devices=1)
                runs[dtype].train(StopAfter())
        return runs[dtype]

    return get


def test_devices_share_batches(whole: Whole, dataset: Dataset, tmp_path: Path) -> None:
    run = start(tmp_path, dataset)
    result = run.train(StopAfter())
    count = jax.local_device_count()
    assert len(result["hardware"]["devices"]) == count > 1
    for leaf in jax.tree.leaves(run.state):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == count
    assert_same(run, run.state, whole("float32"))


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_a_step_gathers_nothing(implementation: str, dataset: Dataset, tmp_path: Path) -> None:
    """Products of a device's own images, and sums over all devices: gradients and statistics."""
    found = jadder.implementations()[implementation]
    if not found.available:
        pytest.skip(found.about)
    run = start(tmp_path, dataset, implementation=implementation)
    batch = run._batch(np.arange(8, dtype=np.int32), 0)
    program = run.train_steps[0].lower(run.state, *batch).compile().as_text()
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|ragged-all-to-all|collective-[a-z]+"
    assert set(re.findall(rf" ({names})(?:-start)?\(", program)) == {"all-reduce"}


def test_stop_on_eight_devices_and_go_on_with_one(
    whole: Whole, dataset: Dataset, tmp_path: Path
) -> None:
    expected = whole("float64")
    with precision("float64"):
        # Within the second epoch: the first one asks twice, and twice while it is evaluated.
        with pytest.raises(Interrupted, match="stopped after 3 of 4 steps"):
            start(tmp_path, dataset, dtype="float64", devices=8).train(StopAfter(5))
        run = start(tmp_path, dataset, dtype="float64", devices=1, resume=True)
        run.train(StopAfter())
        assert_same(run, run.state, expected)


def test_stop_on_one_device_and_go_on_with_two(
    whole: Whole, dataset: Dataset, tmp_path: Path
) -> None:
    expected = whole("float64")
    # As if it had been killed before its last epoch was saved.
    shutil.copytree(expected.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    (tmp_path / "run/result.json").unlink()
    with precision("float64"):
        run = start(tmp_path, dataset, dtype="float64", devices=2, resume=True)
        run.train(StopAfter())
        assert_same(run, run.state, expected)


def test_bfloat16_keeps_its_state_in_float32(
    whole: Whole, dataset: Dataset, tmp_path: Path
) -> None:
    run = start(tmp_path, dataset, dtype="bfloat16", devices=1)
    program = run.train_steps[0].lower(run.state, *run._batch(np.arange(8, dtype=np.int32), 0))
    assert "bf16" in program.as_text()
    result = run.train(StopAfter())
    assert result["run"]["dtype"] == "bfloat16"
    expected = numbers(whole("float32").state)
    for name, array in numbers(run.state).items():
        assert array.dtype == expected[name].dtype != jnp.bfloat16
    # The same run but for rounding: the same first epoch, nearly.
    row, other = rows_of(run)[0], rows_of(whole("float32"))[0]
    assert row["train_loss"] != other["train_loss"]
    assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.05)


# -- processes -------------------------------------------------------------------------------------


def two_processes() -> list[list[str]]:
    """The options with which two processes find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ["--coordinator-address", address, "--num-processes", "2", "--process-id"]
    return [[*common, "0"], [*common, "1"]]


def start_two(train: Start, data_dir: Path, *more: object) -> list["subprocess.Popen[str]"]:
    """Two processes with two devices each."""
    options = [*OPTIONS.split(), "--data-dir", data_dir, "--dtype", "float64", "--devices", 2]
    return [train(*options, *more, *others) for others in two_processes()]


def finish(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=240)
            ends.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ends


@pytest.fixture
def _cpu_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("compares with processes that have only the CPU: needs JAX_PLATFORMS=cpu")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def saved(run: Run) -> Any:
    """The state in a run's last checkpoint."""
    with Checkpoints(run.folder / "checkpoints", run.fingerprint) as checkpoints:
        restored = checkpoints.restore(run.state)
    assert restored is not None
    return restored[0]


@pytest.mark.usefixtures("_cpu_with_float64")
def test_two_processes(
    whole: Whole, dataset: Dataset, data_dir: Path, train: Start, tmp_path: Path
) -> None:
    (status, out, err), (other_status, other_out, other_err) = finish(start_two(train, data_dir))
    assert (status, other_status) == (0, 0), err + other_err
    # Only the first process reports; Gloo's threads write to stdout too, in pieces.
    assert "picture: runs/run/curves.png" in out
    assert "curves.png" not in other_out
    assert "epoch" in out + err
    assert "epoch" not in other_out + other_err
    names = {path.name for path in (tmp_path / "runs/run").iterdir()}
    kept = {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "model.safetensors"}
    assert names == kept | {"result.json"}
    expected = whole("float64")
    with precision("float64"):
        run = start(tmp_path / "runs", dataset, dtype="float64", resume=True, devices=1)
        assert_same(run, saved(run), expected)
    result = run.finished()
    assert result is not None
    assert (result["hardware"]["processes"], len(result["hardware"]["devices"])) == (2, 4)


@pytest.mark.usefixtures("_cpu_with_float64")
def test_signal_to_one_process_stops_both(
    dataset: Dataset, data_dir: Path, train: Start, tmp_path: Path
) -> None:
    processes = start_two(train, data_dir, "--epochs", 5000)
    metrics = tmp_path / "runs/run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 1):
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    (status, _, err), (other_status, _, other_err) = finish(processes)
    assert (status, other_status) == (143, 143), err + other_err
    assert "Traceback" not in err + other_err
    step = int(err.split("stopped after ")[1].split()[0])
    assert str(step) in {path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()}
    # One process goes on from there, with the next step or, between two epochs, the evaluation.
    with precision("float64"):
        run = start(tmp_path / "runs", dataset, dtype="float64", resume=True, epochs=5000)
        with pytest.raises(Interrupted, match=f"stopped after ({step}|{step + 1}) of 10000 steps"):
            run.train(StopAfter(1))


AGREEMENT = """
import functools, pathlib, sys
from experiments.training import processes
from experiments.training.config import parse
from experiments.common.errors import UserError

def attempt(function, *args):
    try:
        say(function(*args))
    except UserError as error:
        say("error:", error)

def fail(index):
    with processes.together():
        if me == index:
            raise UserError("mine")

# Gloo's threads write to stdout, in pieces, and JAX to stderr.
say = functools.partial(print, file=open("said-by-" + sys.argv[-1], "w"), flush=True)
processes.connect(parse(sys.argv[1:]))
me = 0 if processes.is_first() else 1
attempt(fail, None)
attempt(fail, 1)
attempt(processes.check_same, "options", "alike")
attempt(processes.check_same, "options", me)
votes = processes.Votes()
say({votes(None, False) for _ in range(20)})
say([votes(15 if me else None, not me) for _ in range(200)].index((15, True)))
attempt(processes.make_shared, pathlib.Path("made/by/one"))
say(pathlib.Path("made/by/one").is_dir())
"""


def test_processes_agree_and_fail_together(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGREEMENT, *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for options in two_processes()
    ]
    for status, _, err in finish(processes):
        assert status == 0, err
    said = [(tmp_path / f"said-by-{index}").read_text().splitlines() for index in (0, 1)]
    (_, other, *first), (_, own, *second) = said
    assert own == "error: mine"
    assert other == "error: process 1 failed; it has said why"
    assert first == second
    assert first[0] == "None"
    assert first[1] == "error: options of process 1 differ from those of process 0"
    assert first[2] == "{(None, False)}"
    assert first[4:] == ["None", "True"]


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 9}, "--batch-size 9 is not a multiple of the 8 devices"),
        ({"devices": 9}, "--devices 9: this process has 8"),
        ({"dtype": "float64"}, "--dtype float64 needs the environment variable JAX_ENABLE_X64=1"),
    ],
)
def test_what_the_devices_cannot_do(
    changes: dict[str, Any], text: str, dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        start(tmp_path, dataset, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--devices 0", "--devices must be positive, got 0"),
        ("--coordinator-address host", "--coordinator-address must be HOST:PORT, got 'host'"),
        ("--num-processes 2 --process-id 2", "--process-id must be below --num-processes 2, got 2"),
        ("--process-id -1", "--process-id must be zero or more, got -1"),
        ("--dtype float16", "invalid choice: 'float16'"),
    ],
)
def test_wrong_options(options: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(options.split())
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "many"),
    [("", False), ("--devices 2", False), ("--distributed", True), ("--process-id 0", True)],
)
def test_when_other_processes_are_looked_for(options: str, many: bool) -> None:
    assert parse(options.split()).many_processes is many
