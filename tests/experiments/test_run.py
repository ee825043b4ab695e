"""training.run in this process: exact resumption, determinism, what a run leaves behind."""

import copy as shallow
import dataclasses
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jadder.models
from experiments.common.errors import UserError
from experiments.common.interrupt import Interrupted
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.training import steps
from experiments.training.checkpoint import checksum
from experiments.training.clock import Clock
from experiments.training.config import AUGMENTATIONS, TrainConfig
from experiments.training.folder import (
    check_folder,
    check_folders,
    is_used,
    owned,
    saved_steps,
)
from experiments.training.longer import continued
from experiments.training.optimizer import warmup_cosine
from experiments.training.run import Run, epoch_order
from tests.experiments.stop import StopAfter

# 7 steps an epoch; the last 4 images of an epoch are left out, and the last test batch is short.
CONFIG = TrainConfig(
    model="lenet5", family=("adder",), image_size=8, epochs=3, batch_size=16, limit_train=116,
    checkpoint_every=1e9,
)  # fmt: skip
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler() -> Iterator[None]:
    """Compiling takes most of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    small = load("digits", image_size=8, limit_train=CONFIG.limit_train)
    return dataclasses.replace(
        small, test_images=small.test_images[:42], test_labels=small.test_labels[:42]
    )


def start(out_dir: Path, dataset: Dataset, **changes: Any) -> Run:
    config = dataclasses.replace(CONFIG, out_dir=str(out_dir), **changes)
    return Run(config, config.family[0], dataset, "the command")


def rows_of(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Run:
    """A run that nobody interrupted."""
    run = start(tmp_path_factory.mktemp("whole"), dataset)
    run.train(StopAfter())
    return run


def test_interrupted_run_ends_with_the_same_bits(
    whole: Run, dataset: Dataset, tmp_path: Path
) -> None:
    # Each epoch asks 7 times while it trains and 3 times while it evaluates. So these stop after
    # the first step; within an epoch, while it is evaluated, and after the last step of the second.
    for count, step in ((1, 1), (3, 4), (4, 7), (10, 14)):
        with pytest.raises(Interrupted, match=f"stopped after {step} of 21 steps") as caught:
            start(tmp_path, dataset, resume=step > 1).train(StopAfter(count))
        assert caught.value.signum == signal.SIGTERM
    run = start(tmp_path, dataset, resume=True)
    assert run.finished() is None
    result = run.train(StopAfter())
    expected = whole.finished()
    assert expected is not None
    assert result["parameters_sha256"] == expected["parameters_sha256"]
    assert rows_of(run) == rows_of(whole)
    assert [row["epoch"] for row in rows_of(run)] == [1, 2, 3]
    # Nothing that the state keeps may differ either: statistics, momentum, counts.
    for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(whole.state), strict=True):
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        a, b = (jax.random.key_data(x) if is_key else x for x in (a, b))
        np.testing.assert_array_equal(a, b)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "doubled": lambda path: path.write_bytes(path.read_bytes() * 2),
    "nonsense": lambda path: path.write_bytes(b"[" * 100_000),
}


@pytest.fixture(scope="module")
def copied(whole: Run) -> Callable[[Path], Run]:
    """The finished run, in a copy of its folder."""

    def copy(place: Path) -> Run:
        shutil.copytree(whole.folder, place)
        run = shallow.copy(whole)
        run.folder = place
        return run

    return copy


@pytest.mark.parametrize("how", DAMAGE)
def test_rows_come_from_the_checkpoint(
    how: str, whole: Run, copied: Callable[[Path], Run], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = copied(tmp_path / "run")
    DAMAGE[how](run.folder / "metrics.jsonl")
    assert run.finished() == whole.finished()
    assert rows_of(run) == rows_of(whole)
    assert "metrics.jsonl is written anew, with the rows of the checkpoint" in (
        capsys.readouterr().err
    )
    # A run that has not ended keeps the rows of its last checkpoint.
    (run.folder / "result.json").unlink()
    shutil.rmtree(run.folder / "checkpoints" / "21")
    DAMAGE[how](run.folder / "metrics.jsonl")
    assert run.finished() is None
    assert [row["epoch"] for row in run.rows] == [1, 2]
    # Without checkpoints there is nothing to compare with.
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "metrics.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"has rows of finished epochs .*, but no checkpoint"):
        check_folder(run.folder)


def test_rows_of_a_finished_run_without_checkpoints(
    copied: Callable[[Path], Run], tmp_path: Path
) -> None:
    run = copied(tmp_path / "run")
    shutil.rmtree(run.folder / "checkpoints")
    assert run.finished() is not None
    DAMAGE["doubled"](run.folder / "metrics.jsonl")
    with pytest.raises(UserError, match="lacks rows that no checkpoint has, or has others"):
        run.finished()


def test_earlier_checkpoints_have_no_rows(copied: Callable[[Path], Run], tmp_path: Path) -> None:
    run = copied(tmp_path / "run")
    (run.folder / "result.json").unlink()
    path = run.folder / "checkpoints/21/meta/metadata"
    meta = json.loads(path.read_text())
    del meta["progress"]["rows"]
    path.write_text(json.dumps(meta))
    assert [row["epoch"] for row in run.saved_rows()] == [1, 2, 3]
    DAMAGE["cut"](run.folder / "metrics.jsonl")
    with pytest.raises(UserError, match="does not hold the rows of the 3 epochs"):
        run.saved_rows()


def test_a_result_names_its_run(copied: Callable[[Path], Run], tmp_path: Path) -> None:
    run = copied(tmp_path / "run")
    path = run.folder / "result.json"
    result = json.loads(path.read_text())
    for change, text in (
        ({"run": {**result["run"], "learning_rate": 0.2}}, "its learning_rate is 0.2, not 0.1"),
        ({"run": None}, "its 'run' is None, expected dict"),
        ({"test_accuracy": "high"}, "its 'test_accuracy' is 'high', expected float"),
    ):
        path.write_text(json.dumps({**result, **change}))
        with pytest.raises(UserError, match=r"result\.json is (of another run|damaged)") as caught:
            run.finished()
        assert text in str(caught.value)


def test_remains_of_killed_runs_are_removed(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for path in ("checkpoints/7.orbax-checkpoint-tmp/state", "checkpoints/14.orbax-checkpoint-tmp"):
        (folder / path).mkdir(parents=True)
    for name in (".lock", ".config.json.77.tmp"):
        (folder / name).touch()
    assert not is_used(folder)
    with owned(folder):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == []
        assert {path.name for path in folder.iterdir()} == {".lock", "checkpoints"}
    shutil.copytree(whole.folder, folder, dirs_exist_ok=True)
    (folder / "checkpoints/22.orbax-checkpoint-tmp").mkdir()
    with owned(folder):
        pass
    assert contents(folder) == {
        name.replace(str(whole.folder), str(folder)): content
        for name, content in contents(whole.folder).items()
    }
    assert saved_steps(folder) == [14, 21]


def test_full_disk(
    whole: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, nothing lost, and the run goes on where it was."""
    # A slow run draws its curves meanwhile, and the disk may be full then.
    monkeypatch.setattr(Clock, "draw_due", lambda self: False)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=350k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        run = start(disk, dataset, name="run")
        with pytest.raises(
            UserError, match=r"checkpoints/\d+ cannot be saved.*disk is full"
        ) as end:
            run.train(StopAfter())
        assert end.value.status == 1
        assert "\n" not in str(end.value)
        assert not list(disk.rglob("*.orbax-checkpoint-tmp*"))
        steps = saved_steps(run.folder)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = start(disk, dataset, name="run", resume=True)
        assert len(again.saved_rows()) == (steps[-1] // 7 if steps else 0)
        result, expected = again.train(StopAfter()), whole.finished()
        assert expected is not None
        assert result["parameters_sha256"] == expected["parameters_sha256"]
        assert rows_of(again) == rows_of(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_result_and_files(whole: Run) -> None:
    result, rows = whole.finished(), rows_of(whole)
    assert result is not None
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "result.json",
                     "model.safetensors"}  # fmt: skip
    assert result["test_accuracy"] == rows[-1]["test_accuracy"]
    assert result["best_test_accuracy"] == max(row["test_accuracy"] for row in rows)
    assert result["steps"] == rows[-1]["step"] == 21
    assert result["command"] == "the command"
    assert result["peak_rss_bytes"] > 2**20
    assert result["versions"]["jax"]
    # Every test image counts, also those of the short last batch.
    assert result["test_accuracy"] * 42 == pytest.approx(round(result["test_accuracy"] * 42))
    steps = sorted(int(path.name) for path in (whole.folder / "checkpoints").iterdir())
    assert steps == [14, 21]


def test_augmentations_are_different_and_repeatable(dataset: Dataset, tmp_path: Path) -> None:
    def after_one_step(name: str, augment: str) -> str:
        run = start(tmp_path / name, dataset, augment=augment)
        state, _ = run.train_steps[0](run.state, *run._batch(np.arange(16, dtype=np.int32), 0))
        return checksum(state["params"])

    ends = {augment: after_one_step(augment, augment) for augment in AUGMENTATIONS}
    assert len(set(ends.values())) == 3
    assert after_one_step("again", "randaugment") == ends["randaugment"]


def test_evaluation_agrees_with_the_model(whole: Run, dataset: Dataset) -> None:
    from flax import nnx

    model = nnx.merge(whole.graphdef, whole.state["params"], whole.state["model"])
    model.eval()
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)
    logits = model((dataset.test_images.astype(np.float32) / 255 - mean) / std)
    accuracy = np.mean(np.argmax(np.asarray(logits), -1) == dataset.test_labels)
    assert accuracy == pytest.approx(rows_of(whole)[-1]["test_accuracy"])


def test_a_run_leaves_its_model(
    whole: Run, dataset: Dataset, copied: Callable[[Path], Run], tmp_path: Path
) -> None:
    model, description = jadder.models.load(whole.folder / "model.safetensors")
    logits = model(description.normalize(dataset.test_images))
    accuracy = np.mean(np.argmax(np.asarray(logits), -1) == dataset.test_labels)
    result = whole.finished()
    assert result is not None
    assert accuracy == pytest.approx(result["test_accuracy"])
    assert description.about["test_accuracy"] == result["test_accuracy"]
    assert description.about["data"] == "digits"
    assert description.class_names == tuple("0123456789")
    assert checksum(steps.split(model)[1]) == result["parameters_sha256"]
    # A run that ended before there were such files gets one.
    run = copied(tmp_path / "run")
    expected = (run.folder / "model.safetensors").read_bytes()
    (run.folder / "model.safetensors").unlink()
    run.leave_model(result)
    assert (run.folder / "model.safetensors").read_bytes() == expected


def test_a_run_can_start_from_a_model_file(whole: Run, dataset: Dataset, tmp_path: Path) -> None:
    file = whole.folder / "model.safetensors"
    other = dataclasses.replace(dataset, test_images=dataset.test_images[:, ::-1])
    run = start(tmp_path, other, start=str(file))
    assert checksum(run.state["params"]) == checksum(whole.state["params"])
    assert checksum(run.state["model"]) == checksum(whole.state["model"])
    assert run.fingerprint["start_parameters"] == checksum(whole.state["params"])
    for changes, text in (
        ({"model_options": ("multiply_ends=False",)}, "its options is "),
        ({"family": ("conv",)}, "its family is adder, not conv"),
    ):
        with pytest.raises(UserError, match=f"run of another network: {text}"):
            start(tmp_path, dataset, start=str(file), **changes)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"--start .* holds no model of jadder") as caught:
        start(tmp_path, dataset, start=str(file))
    assert "\n" not in str(caught.value)


def test_a_finished_run_can_be_made_longer(
    whole: Run, dataset: Dataset, copied: Callable[[Path], Run], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copied(tmp_path / "run")
    before = contents(tmp_path)
    options: dict[str, Any] = {"name": "run", "resume": True}
    for changes, text in (
        ({"epochs": 5, "resume": False}, "its epochs is 3, not 5"),
        ({"epochs": 2}, "its epochs is 3, not 2"),
        ({"epochs": 5, "eta": 0.3}, "its eta is 0.2, not 0.3"),
    ):
        with pytest.raises(UserError, match=text):
            start(tmp_path, dataset, **options | changes)
    assert contents(tmp_path) == before
    run = start(tmp_path, dataset, **options, epochs=5)
    assert run.finished() is None
    assert [row["epoch"] for row in run.rows] == [1, 2, 3]
    with pytest.raises(Interrupted, match="stopped after 24 of 35 steps"):
        run.train(StopAfter(3))
    assert "from 3 to 5 epochs: it keeps its rows, and the learning rate goes on from " in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "result.json").exists()
    # Half-way it is a run of five epochs, of no other number.
    with pytest.raises(UserError, match=r"its epochs is 5, not 7; once it has ended"):
        start(tmp_path, dataset, **options, epochs=7)
    run = start(tmp_path, dataset, **options, epochs=5)
    result = run.train(StopAfter())
    assert "made longer" not in capsys.readouterr().err
    rows = rows_of(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[:3] == rows_of(whole)
    schedule = warmup_cosine(0.1, total_steps=35, steps_per_epoch=7, warmup_epochs=1.0)
    for row in rows[3:]:
        assert row["learning_rate"] == pytest.approx(float(schedule(row["step"] - 1)))
    assert result["note"].endswith("made longer after 3 epochs")
    assert result["run"]["earlier_epochs"] == [3]
    recorded = json.loads((run.folder / "config.json").read_text())
    assert recorded["earlier_commands"] == ["the command"]
    about = jadder.models.load(run.folder / "model.safetensors").description.about
    assert (about["epochs"], about["test_accuracy"]) == (5, result["test_accuracy"])
    # To the same bits without an interruption, and no run of five epochs from the start.
    copied(tmp_path / "again")
    again = start(tmp_path, dataset, **options | {"name": "again"}, epochs=5)
    assert again.train(StopAfter())["parameters_sha256"] == result["parameters_sha256"]
    assert start(tmp_path, dataset, **options, epochs=5).finished() == result


def test_what_cannot_be_made_longer(
    interrupted: Path, dataset: Dataset, copied: Callable[[Path], Run], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"its epochs is 3, not 9; once it has ended with"):
        start(interrupted, dataset, name="run", resume=True, epochs=9)
    run = copied(tmp_path / "run")
    annealed = {**run.fingerprint, "anneal": "rule"}
    for name in ("config.json", "result.json"):
        said = json.loads((run.folder / name).read_text())
        (run.folder / name).write_text(json.dumps({**said, "run": annealed}))
    with pytest.raises(UserError, match=r"its stages of --anneal rule are over"):
        continued(run.folder, {**annealed, "epochs": 5}, resume=True)
    assert continued(run.folder, annealed, resume=True) == annealed


def test_seed_decides_the_initial_parameters(dataset: Dataset, tmp_path: Path) -> None:
    sums = [checksum(start(tmp_path, dataset, seed=s).state["params"]) for s in (0, 0, 1)]
    assert sums[0] == sums[1] != sums[2]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    """The folder of runs with one of them, "run", that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted):
        start(folder, dataset, name="run").train(StopAfter(1))
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rate": 0.2}, "its learning_rate is 0.1, not 0.2"),
        ({"family": ("conv",)}, "its family is 'adder', not 'conv'"),
        ({"model": "resnet20"}, "its model is 'lenet5', not 'resnet20'"),
    ],
)
def test_another_configuration_is_refused(
    changes: dict[str, Any], text: str, interrupted: Path, dataset: Dataset
) -> None:
    before = contents(interrupted)
    with pytest.raises(UserError, match=text):
        start(interrupted, dataset, name="run", resume=True, **changes)
    assert contents(interrupted) == before


def test_other_data_is_refused(interrupted: Path, dataset: Dataset) -> None:
    images = dataset.test_images.copy()
    images[0, 0, 0] ^= 1
    other = dataclasses.replace(dataset, test_images=images)
    with pytest.raises(UserError, match="run is of another run: its data is 'digits-116x8x8x1-"):
        start(interrupted, other, name="run", resume=True)


def test_checkpoint_of_another_run_is_refused(
    interrupted: Path, dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(interrupted / "run" / "checkpoints", tmp_path / "b" / "checkpoints")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="checkpoints/1 is of another run: its seed is 0, not 1"):
        start(tmp_path, dataset, name="b", seed=1, resume=True).train(StopAfter())
    assert contents(tmp_path) == before


def test_damaged_checkpoint(interrupted: Path, dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(interrupted / "run", tmp_path / "run")
    files = [p for p in (tmp_path / "run/checkpoints/1/state").rglob("*") if p.parent.name == "d"]
    for path in files:
        path.write_bytes(path.read_bytes()[:10])
    assert files
    with pytest.raises(UserError, match="checkpoints/1 cannot be read") as caught:
        start(tmp_path, dataset, name="run", resume=True).train(StopAfter())
    assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_earlier_runs_are_not_written_over(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, out_dir=str(tmp_path), name="run")
    again = dataclasses.replace(config, resume=True)
    check_folders(config)
    with pytest.raises(UserError, match="nothing to resume"):
        check_folders(again)
    (tmp_path / "run").mkdir()
    check_folders(config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds a run already"):
        check_folders(config)
    with pytest.raises(UserError, match=r"lacks config\.json"):
        check_folders(again)


def test_batch_larger_than_the_data(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch-size 200 is more than the 116 training images"):
        start(tmp_path, dataset, batch_size=200)


def test_diverging_run_says_so(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss of .* is nan at step 7") as caught:
        start(tmp_path, dataset, learning_rate=1e30, warmup_epochs=0.0).train(StopAfter())
    assert caught.value.status == 1


def test_epoch_order_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(50))
    assert len({order.tobytes() for order in orders}) == 4
    np.testing.assert_array_equal(orders[3], epoch_order(1, 1, 50))
