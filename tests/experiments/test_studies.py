"""The studies: what they record is right, and each runs at its small size in this process."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jadder
from experiments import (
    gradient_norms,
    hundred_images,
    kernel_scale,
    resnet20,
    resnet_recipe,
    rounding,
    stability,
    twins,
)
from experiments.images.dataset import Dataset
from experiments.studies import command, ranges, study
from experiments.studies.study import Trained
from experiments.training import optimizer
from experiments.training.build import build_model
from experiments.training.config import TrainConfig
from experiments.training.run import Run
from tests.experiments.smoke import smoke
from tests.experiments.stop import StopAfter


def trained(train_accuracy: float | None, classes: int = 10) -> Trained:
    """A run with this result, None for one that diverged."""
    result = None if train_accuracy is None else {"train_accuracy": train_accuracy}
    return Trained("a", TrainConfig(), Path("a"), [], result, classes)


# -- gradient sizes --------------------------------------------------------------------------------


def test_recorded_sizes_are_those_of_a_hand_computed_gradient() -> None:
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    model = jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    kernel = np.asarray(params["kernel"], np.float64)
    rate, decay, eta = 0.5, 0.1, 0.2
    tx = gradient_norms.recording(
        jadder.adder_sgd(rate, weight_decay=decay, eta=eta, mask={"kernel": True}), steps=2
    )

    def loss(params: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(jnp.asarray(x, jnp.float32)) * g)

    state = tx.init(params)
    for _ in range(2):  # the parameters stay, so the second step differs by its momentum only
        _, state = tx.update(jax.grad(loss)(params), state, params)

    # AdderNet's rule: ∂y[m, n]/∂w[k, n] = x[m, k] - w[k, n].
    gradient = np.einsum("mn,mkn->kn", g, x[:, :, None] - kernel)
    size = np.sqrt(np.mean(gradient**2))
    step = eta * gradient / size + decay * kernel
    update = rate * np.sqrt(np.mean(step**2))
    np.testing.assert_allclose(state.record.gradients, [[size], [size]], rtol=1e-5)
    np.testing.assert_allclose(state.record.updates, [[update], [1.9 * update]], rtol=1e-5)


def test_recording_changes_no_update() -> None:
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    plain, kept = optax.adamw(0.1), gradient_norms.recording(optax.adamw(0.1), steps=1)
    expected, _ = plain.update(params, plain.init(params), params)
    updates, _ = kept.update(params, kept.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@given(st.integers(-120, 120), st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=5))
def test_sizes_do_not_underflow(exponent: int, values: list[float]) -> None:
    values = [round(64 * value) / 64 for value in values]
    expected = np.sqrt(np.mean(np.square(values))) * 2.0**exponent
    leaf = jnp.asarray(np.asarray(values, np.float32) * np.float32(2.0**exponent))
    np.testing.assert_allclose(gradient_norms.root_mean_square(leaf), expected, rtol=1e-5)


def test_gradient_norms(tmp_path: Path) -> None:
    result = smoke(gradient_norms, tmp_path)
    runs = {run["label"]: run for run in result["data"]["runs"]}
    assert list(runs) == ["adder, scaled", "adder, not scaled", "conv"]
    scaled, unscaled = (runs[label]["sizes"] for label in list(runs)[:2])
    for sizes in (scaled, unscaled, runs["conv"]["sizes"]):
        for what in ("gradients", "updates"):
            assert list(sizes[what]) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
            assert {len(steps) for steps in sizes[what].values()} == {8}
            assert min(min(steps) for steps in sizes[what].values()) > 0
    # Before the first update both networks are one: the same gradients, to their four digits.
    for layer in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        first = scaled["gradients"][layer][0]
        assert unscaled["gradients"][layer][0] == pytest.approx(first, rel=2e-3)
    # The first step is at the full rate, 0.1: scaled, adder layers move by a fifth of it.
    for layer in ("conv2", "fc1", "fc2"):
        assert scaled["updates"][layer][0] == pytest.approx(0.1 * 0.2, rel=1e-2)
        assert unscaled["updates"][layer][0] < 0.1 * (unscaled["gradients"][layer][0] + 1e-3)


# -- where kernels go ------------------------------------------------------------------------------


def test_looking_keeps_every_part_and_changes_no_update() -> None:
    params = {"w": jnp.array([0.3, -0.3, 5.0])}
    plain, kept = optax.sgd(0.2), kernel_scale.looking(optax.sgd(0.2), steps=5, parts=2)
    state, expected = kept.init(params), plain.init(params)
    grads = {"w": jnp.array([1.0, -1.0, 0.0])}
    path = []
    for _ in range(5):
        updates, state = kept.update(grads, state, params)
        step, expected = plain.update(grads, expected, params)
        np.testing.assert_array_equal(updates["w"], step["w"])
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"]))
    # Steps 0 to 2 are the first part (step · 2 // 5 = 0), in whose second step two signs change.
    np.testing.assert_array_equal(state.record.params["w"], [path[2], path[4]])
    np.testing.assert_allclose(state.record.flips, [[2 / 3], [0]])
    with pytest.raises(ValueError, match="update needs the parameters"):
        kept.update(grads, state)


@given(
    hnp.arrays(np.float32, (40, 3), elements=st.floats(-4, 4, width=16)),
    hnp.arrays(np.float32, (2, 3, 5), elements=st.floats(-5, 5, width=16)),
)
def test_ranges_are_those_of_counting(x: np.ndarray, kernel: np.ndarray) -> None:
    seen = ranges.range_of(jnp.asarray(x), jnp.asarray(kernel))
    beyond = (x[:, None, :, None] > kernel).mean(0)
    assert seen.below == pytest.approx((beyond == 1).mean())
    assert seen.above == pytest.approx((beyond == 0).mean())
    assert seen.bending == pytest.approx(((beyond > 0.01) & (beyond < 0.99)).mean())
    assert seen.bending_well == pytest.approx(((beyond > 0.1) & (beyond < 0.9)).mean(), abs=0.01)
    assert seen.kernel_rms == pytest.approx(np.sqrt(np.mean(kernel**2)), rel=1e-5)
    assert seen.input_max == x.max()


def test_ranges_of_a_model_are_of_its_adder_layers() -> None:
    layers = [
        jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(4, 2, rngs=nnx.Rngs(1)),
    ]
    model = nnx.Sequential(*layers)
    x = jnp.linspace(-1, 2, 12).reshape(4, 3)
    assert ranges.ranges(model, x) == {"layers/0": ranges.range_of(x, layers[0].kernel[...])}
    with pytest.raises(ValueError, match=r"4 channels, got \(3, 4\)"):
        ranges.range_of(jnp.zeros((2, 4)), layers[0].kernel[...])


def test_kernel_scale(tmp_path: Path) -> None:
    result = smoke(kernel_scale, tmp_path, "--looks", "3")
    assert len(result["notes"]) == 3
    for run in result["data"]["runs"]:
        seen = run["seen"]
        assert seen["steps"] == [0, 3, 6, 8]
        for look in seen["looks"]:
            assert list(look) == ["conv2", "fc1", "fc2"]
        assert all(0 < flips["fc1"] < 0.1 for flips in seen["flips"])
        if run["run"]["kernel_max"] is not None:
            continue  # whose kernels of N(0, 1) lose their tails at once
        # Steps of 0.1 · eta leave a kernel of N(0, 1) near 1 after eight of them.
        assert seen["looks"][-1]["fc1"]["kernel_rms"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("content", [b"no archive", None, {"conv1.weight": np.zeros(3)}])
def test_a_foreign_torch_state_is_refused(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "state.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    options = ["--smoke", "--out-dir", str(tmp_path), "--torch-state", str(file)]
    assert kernel_scale.main(options) == 2
    assert f"error: --torch-state {file}: " in capsys.readouterr().err


# -- one change at a time --------------------------------------------------------------------------


def test_averaging_follows_the_parameters_and_changes_no_update() -> None:
    params = {"w": jnp.array([1.0, -2.0])}
    plain, kept = optax.sgd(0.5), resnet_recipe.averaging(optax.sgd(0.5), steps=12)
    state, expected = kept.init(params), plain.init(params)
    average = np.asarray(params["w"])
    for step in range(5):
        grads = {"w": jnp.array([1.0, float(step)])}
        updates, state = kept.update(grads, state, params)
        ours, expected = plain.update(grads, expected, params)
        np.testing.assert_array_equal(updates["w"], ours["w"])
        params = optax.apply_updates(params, updates)
        average = average + (np.asarray(params["w"]) - average) / 3  # a quarter of the steps
    np.testing.assert_allclose(state.record["w"], average, rtol=1e-6)


def test_resnet_recipe_judges_averages_and_learns_from_averaged_twins(tmp_path: Path) -> None:
    names = ("twin", "kernels free", "learning from the twin")
    result = smoke(resnet_recipe, tmp_path, "--changes", *names)
    assert [run["label"] for run in result["data"]["runs"]] == [f"{name} s0" for name in names]
    for run in result["data"]["runs"]:
        assert 0 <= run["average_accuracy"] <= 1
    _, averages = result["tables"]
    for (_, last, mean, gain), run in zip(averages["rows"], result["data"]["runs"], strict=True):
        assert (last, mean) == (run["test_accuracy"], run["average_accuracy"])
        assert gain == pytest.approx(100 * (mean - last))
    options = ["--smoke", "--out-dir", str(tmp_path), "--changes", "learning from the twin"]
    assert resnet_recipe.main(options) == 2


@pytest.mark.parametrize("name", resnet_recipe.CHANGES)
def test_every_change_of_the_resnet_recipe_is_a_network(name: str) -> None:
    config = study.changed(resnet_recipe.TRAINING.full, resnet_recipe.CHANGES[name])
    images = np.zeros((1, 32, 32, 3), np.uint8)
    data = Dataset("none", images, np.zeros(1, np.int32), images, np.zeros(1, np.int32), 10,
                   (0.0,) * 3, (1.0,) * 3, 4, True)  # fmt: skip
    model = nnx.eval_shape(lambda: build_model(config, config.family[0], data))
    mask = jadder.adder_mask(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optimizer.make(config, optimizer.choose(config), lambda step: 0.1, mask)
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


# -- the other studies -----------------------------------------------------------------------------


def test_hundred_images_are_learned_by_heart(tmp_path: Path) -> None:
    # In 20 epochs all but a few are: which ones is a matter of rounding.
    result = smoke(hundred_images, tmp_path, "--epochs", "60")
    (run,) = result["data"]["runs"]
    assert run["run"]["limit_train"] == 100
    assert len(run["epochs"]) == 60
    assert run["train_accuracy_evaluated"] == 1
    assert result["data"]["fitted"] == ["adder s0"]


def test_stability_records_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = smoke(stability, tmp_path)
    runs = result["data"]["runs"]
    assert [run["verdict"] == "diverged" for run in runs] == 2 * [False, True]
    assert [run["run"]["rule"] for run in runs] == ["addernet"] * 2 + ["adder_vit"] * 2
    assert result["tables"][0]["rows"][0][-1] == "diverged"
    record = json.loads((tmp_path / "stability-smoke" / runs[1]["folder"]).joinpath(
        "diverged.json").read_text())  # fmt: skip
    assert record["step"] == 2
    assert "loss" in record["message"]

    # Neither a finished run nor a diverged one is trained again.
    monkeypatch.setattr(Run, "train", lambda *_: pytest.fail("trained again"))
    again = smoke(stability, tmp_path)
    assert again["data"] == result["data"]


def test_verdicts() -> None:
    runs = [trained(None), trained(0.19), trained(0.2), trained(0.9)]
    assert [stability.fate(run) for run in runs] == ["diverged", "did not learn", "", ""]
    assert stability.verdict("v", (3.0, 0.1, 0.01, 1e-4), runs) == (
        "v: diverged at 3; did not learn at 0.1."
    )
    assert stability.verdict("v", (0.1,), runs[3:]) == "v: learned at every rate."
    assert trained(0.02, classes=100).learned
    assert not trained(0.02, classes=99).learned


def test_interrupted_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--smoke", "--out-dir", str(tmp_path), "--devices", "1", "--families", "adder",
               "conv"]  # fmt: skip
    folder = tmp_path / "twins-smoke"
    # A run of 2 steps and 12 test batches an epoch asks 28 times: this one stops in the second.
    with monkeypatch.context() as patch:
        patch.setattr(command, "StopRequest", lambda: StopAfter(28 + 15))
        assert twins.main(options) == 128 + signal.SIGTERM
    said, again = capsys.readouterr().err.splitlines()[-2:]
    assert said == "conv-s0 stopped after 3 of 4 steps and saved; go on with:"
    assert again.startswith("python -m experiments.twins --smoke ")
    assert not (folder / "result.json").exists()
    before = (folder / "adder-s0" / "result.json").stat().st_mtime_ns

    result = smoke(twins, tmp_path, "--families", "adder", "conv")
    assert (folder / "adder-s0" / "result.json").stat().st_mtime_ns == before
    runs = result["data"]["runs"]
    assert [[row["step"] for row in run["epochs"]] for run in runs] == [[2, 4]] * 2
    table = result["tables"][1]
    assert table["columns"] == ["epoch", "adder", "adder, s", "conv", "conv, s"]
    for i, row in enumerate(table["rows"]):
        assert row[1::2] == [run["epochs"][i]["test_accuracy"] for run in runs]
    for i, run in enumerate(runs):
        total = sum(row[2 + 2 * i] for row in table["rows"])
        assert total == pytest.approx(run["epochs"][-1]["seconds"])


def test_what_saves_nothing_is_interrupted_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> Any:
        signal.raise_signal(signal.SIGINT)

    experiment = command.Experiment("never", "about", run, saves=False)
    assert experiment.main(["--out-dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_resnet20(tmp_path: Path) -> None:
    result = smoke(resnet20, tmp_path, "--families", "adder")
    assert [run["label"] for run in result["data"]["runs"]] == ["adder, 1 epochs s0"]
    assert result["tables"][0]["rows"][0][:3] == ["adder, 1 epochs", 1, 0]


@pytest.mark.parametrize(
    "module",
    [gradient_norms, hundred_images, kernel_scale, resnet20, resnet_recipe, stability, twins],
)
def test_full_sizes_are_complete(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = module.TRAINING.config(module.EXPERIMENT.parser().parse_args([]))
    assert config == module.TRAINING.full
    small = module.TRAINING.smoke
    assert small.dataset == "digits"
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert f"python -m experiments.{module.EXPERIMENT.name}" in capsys.readouterr().out


@pytest.mark.parametrize("module", [gradient_norms, kernel_scale, stability])
def test_studies_of_one_seed(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(["--smoke", "--out-dir", str(tmp_path), "--seeds", "0", "1"]) == 2
    assert capsys.readouterr().err == "error: --seeds: this study takes one seed, got 0 1\n"


def test_accuracy_table_leaves_diverged_runs_out_of_the_mean() -> None:
    good = {"test_accuracy": 0.5, "best_test_accuracy": 0.6, "train_accuracy": 0.7,
            "parameters": 3, "seconds_per_epoch": 2.0}  # fmt: skip
    config = TrainConfig(seed=1)
    runs = [
        Trained("a s0", TrainConfig(), Path("a0"), [], good, 10),
        Trained("a s1", config, Path("a1"), [], None, 10),
        Trained("a s2", dataclasses.replace(config, seed=2), Path("a2"), [],
                {**good, "test_accuracy": 0.75}, 10),
    ]  # fmt: skip
    table = study.accuracy_table("t", runs)
    assert table.rows == [["a", 3, 1, 0.625, 0.25, 0.6, 0.7, 3, 2.0]]


# -- rounding --------------------------------------------------------------------------------------


def test_rounding_compares_gradients(tmp_path: Path) -> None:
    result = smoke(rounding, tmp_path, "--implementations", "xla", "reference")
    first, second = result["data"]["runs"]
    assert [run["run"]["implementation"] for run in (first, second)] == ["xla", "reference"]
    for run in (first, second):  # the same function, to the rounding of sums in another order
        (errors,) = run["gradient_errors"].values()
        assert 0 < errors["all"] < 1e-3
        assert 0 < errors["worst"] < 1e-2
    assert result["tables"][1]["rows"] == [
        ["lenet5, reference", *second["gradient_errors"]["reference"].values()]
    ]


def test_rounding_takes_several_implementations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--smoke", "--out-dir", str(tmp_path), "--implementation", "xla"]
    assert rounding.main(options) == 2
    assert "--implementations" in capsys.readouterr().err
