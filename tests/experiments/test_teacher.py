"""training.teacher and training.distillation: learning from the logits of a finished run."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import vit_recipe
from experiments.common.errors import UserError
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.training.config import TrainConfig
from experiments.training.distillation import Teacher
from experiments.training.run import Run
from experiments.training.teacher import load_teacher
from tests.experiments.smoke import smoke
from tests.experiments.stop import StopAfter

CONFIG = TrainConfig(
    model="vit", family=("conv",), image_size=8, epochs=1, batch_size=16, limit_train=64,
    model_options=("features=8", "depth=1", "num_heads=2", "mlp_features=8", "norm=batch"),
    devices=1, augment="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("digits", image_size=8, limit_train=CONFIG.limit_train)


def start(folder: Path, dataset: Dataset, **changes: Any) -> Run:
    config = dataclasses.replace(CONFIG, out_dir=str(folder), **changes)
    return Run(config, config.family[0], dataset, "the command")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Run:
    """The teacher's run, which has ended."""
    run = start(tmp_path_factory.mktemp("teacher"), dataset)
    run.train(StopAfter())
    return run


def log_softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0.5, 8), st.integers(0, 2**32 - 1))
def test_the_loss_is_the_formula(weight: float, temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(size=(2, 4, 3)) * 3
    teacher = Teacher(None, ({}, {}), weight, temperature)  # type: ignore[arg-type]
    p, q = log_softmax(theirs / temperature), log_softmax(ours / temperature)
    apart = (np.exp(p) * (p - q)).sum(-1).mean()
    expected = (1 - weight) * 1.5 + weight * temperature**2 * apart
    as32 = (np.float32(1.5), ours.astype(np.float32), theirs.astype(np.float32))
    np.testing.assert_allclose(teacher.mix(*as32), expected, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_the_teacher_is_the_trained_network(taught: Run, dataset: Dataset) -> None:
    config = dataclasses.replace(CONFIG, teacher=str(taught.folder))
    teacher = load_teacher(config, dataset)
    assert teacher is not None
    mean, std = np.asarray(dataset.mean, np.float32), np.asarray(dataset.std, np.float32)
    x = (dataset.test_images.astype(np.float32) / 255 - mean) / std
    right = np.argmax(np.asarray(teacher.logits(teacher.state, jax.numpy.asarray(x))), -1)
    result = taught.finished()
    assert result is not None
    assert np.mean(right == dataset.test_labels) == pytest.approx(result["test_accuracy"])


@pytest.mark.usefixtures("quick_compiler")
def test_a_run_learns_from_its_teacher(taught: Run, dataset: Dataset, tmp_path: Path) -> None:
    def trained(name: str, **changes: Any) -> Any:
        run = start(tmp_path / name, dataset, family=("adder",), **changes)
        return run.train(StopAfter()), jax.tree.leaves(run.state["params"])

    alone, plain = trained("alone")
    result, ours = trained("half", teacher=str(taught.folder))
    _, unmoved = trained("none", teacher=str(taught.folder), distill_weight=0.0)
    assert alone["run"]["teacher"] is None
    assert result["run"]["teacher"] == taught.finished()["parameters_sha256"]  # type: ignore[index]
    for a, b in zip(plain, unmoved, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert any(not np.allclose(a, b, atol=1e-3) for a, b in zip(plain, ours, strict=True))


def test_the_teachers_own_logits_have_no_gradient(taught: Run, dataset: Dataset) -> None:
    config = dataclasses.replace(CONFIG, teacher=str(taught.folder), distill_weight=1.0)
    teacher = load_teacher(config, dataset)
    assert teacher is not None
    soft = teacher.logits(teacher.state, jax.numpy.ones((2, 8, 8, 1)))

    def gradient(logits: jax.Array) -> jax.Array:
        return jax.grad(lambda z: teacher.mix(jax.numpy.ones(()), z, soft))(logits)

    np.testing.assert_allclose(gradient(soft), np.zeros(soft.shape), atol=1e-6)
    assert np.abs(gradient(soft + jax.numpy.arange(10))).max() > 1e-2


def test_what_is_no_teacher(taught: Run, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folder of a finished run"):
        start(tmp_path, dataset, teacher=str(tmp_path))
    other = dataclasses.replace(dataset, train_images=dataset.train_images[::-1])
    with pytest.raises(UserError, match=r"was trained on digits-64x8x8x1-\w+, not on digits-64"):
        start(tmp_path, other, teacher=str(taught.folder))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (None, "holds a list, expected an object"),
        ({"run": [1]}, "its 'run' is [1], expected dict"),
        ({"family": None}, "lacks 'family'"),
        ({"family": "cnov"}, "its 'family' is 'cnov'"),
        ({"rule": "cubic"}, "its 'rule' is 'cubic'"),
        ({"epochs": "1"}, "its 'epochs' is '1', expected int"),
        ({"epochs": -1}, "--epochs must be positive, got -1"),
        ({"model": "alexnet"}, "--model: 'alexnet' is not one of auto"),
        ({"model_options": ["features=8"]}, "expected dict"),
        ({"model_options": {"features": [[]], "depth": 1}}, "--teacher"),
        ({"data": 7}, "its 'data' is 7, expected str"),
    ],
)
def test_damaged_teachers(
    changes: dict[str, Any] | None, text: str, taught: Run, dataset: Dataset, tmp_path: Path
) -> None:
    shutil.copytree(taught.folder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    if changes is None:
        record = []
    elif "run" in changes:
        record = changes
    else:
        record["run"] = {**record["run"], **changes}
        record["run"] = {key: value for key, value in record["run"].items() if value is not None}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError) as caught:
        load_teacher(dataclasses.replace(CONFIG, teacher=str(tmp_path / "run")), dataset)
    assert f"--teacher {tmp_path / 'run'}" in str(caught.value)
    assert text in str(caught.value)


def test_a_run_that_begins_with_itself(taught: Run, dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(taught.folder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    record["run"] |= {"start": str(tmp_path / "run"), "bits": 4}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="begins with itself"):
        load_teacher(dataclasses.replace(CONFIG, teacher=str(tmp_path / "run")), dataset)


def test_a_teacher_without_checkpoints(taught: Run, dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(taught.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="has no checkpoint"):
        load_teacher(dataclasses.replace(CONFIG, teacher=str(tmp_path / "run")), dataset)
    assert sorted(tmp_path.rglob("*")) == before


def test_vit_recipe_teaches_with_a_run_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("learning from the twin", "multiplying twin, batch norm")
    result = smoke(vit_recipe, tmp_path, "--changes", *names)
    twin, pupil = result["data"]["runs"]
    assert (twin["label"], pupil["label"]) == ("multiplying twin, batch norm s0", f"{names[0]} s0")
    assert twin["run"]["family"] == "conv"
    assert vit_recipe.main(["--smoke", "--out-dir", str(tmp_path), "--changes", names[0]]) == 2
    assert f"{names[0]!r} needs {names[1]!r} beside it" in capsys.readouterr().err
