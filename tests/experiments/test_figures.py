"""The scripts that draw and measure: rules, diversity, profile, speed."""

import collections
import dataclasses
import functools
import json
import math
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.timing import interleaved
from experiments import channels, diversity, gradient_rules, profile_step, speed
from experiments.common.errors import UserError
from experiments.common.interrupt import Interrupted
from experiments.images.augment import normalize
from experiments.images.load import load
from experiments.studies.command import Experiment
from experiments.studies.products import products
from experiments.studies.programs import Images, create
from experiments.studies.ranks import Observer, effective_rank
from jadder.models import get_family
from jadder.rules import Clip
from tests.experiments.json_values import numbers
from tests.strategies import clips, seeds

# -- the command lines -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", [gradient_rules, diversity, channels, profile_step, speed])
def test_smoke(script: Any, tmp_path: Path) -> None:
    experiment: Experiment = script.EXPERIMENT
    assert experiment.main(["--smoke", "--out-dir", str(tmp_path)]) == 0
    folder = tmp_path / f"{experiment.name}-smoke"
    result = json.loads((folder / "result.json").read_text())
    assert result["tables"]
    for table in result["tables"]:
        assert table["rows"]
    assert len(list(numbers(result["data"]))) > 10
    assert all(math.isfinite(number) for number in numbers([result["tables"], result["data"]]))
    assert result["pictures"]
    for picture in result["pictures"]:
        assert (folder / picture["file"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", [gradient_rules, diversity, channels, profile_step, speed])
def test_help(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    assert caught.value.code == 0
    assert "--smoke" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "options", "text"),
    [
        (profile_step, "--batch-size 0", "must be positive"),
        (profile_step, "--model resnet21", "--model"),
        (profile_step, "--model vit --image-size 30", "patch_size"),
        (
            profile_step,
            "--model lenet5 --channels 1 --image-size 8 --batch-size 1",
            "at least two values",
        ),
        (speed, "--repeats 0", "--repeats and --memory-limit positive"),
        (diversity, "--data-dir none --images 4", "none does not exist"),
        (channels, "--smoke --images 0", "--images must be positive"),
        (diversity, "--smoke --images 0", "--images must be positive"),
        (diversity, "--smoke --batch-size 65", "65 is more than 64 images"),
    ],
)
def test_errors(
    script: Any, options: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*options.split(), "--out-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert text in error


# -- gradient_rules --------------------------------------------------------------------------------


@settings(max_examples=6)
@given(clips, seeds)
def test_library_gradient_is_the_finite_difference_of_the_potential(
    clip: tuple[float, float], seed: int
) -> None:
    psi, rng = Clip(*clip), np.random.default_rng(seed)
    x, kernel, g = (rng.standard_normal(shape) for shape in ((3, 4), (4, 2), (3, 2)))
    found = gradient_rules.finite_differences(psi, x, kernel, g, step=1e-6)
    # Central differences are ψ's mean over the step, which is short of ψ next to a knee only.
    near = np.abs(np.abs(x[:, :, None] - kernel) - (0 if psi.is_sign else psi.bound / psi.scale))
    if near.min() < 1e-5:
        return
    for operand, expected in found.items():
        got = gradient_rules.library_gradient(psi, operand, x, kernel, g, "xla")
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_table_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradient_rules.check(3, 5, 2, ["xla"])
    assert {(row["rule"], row["operand"]) for row in right} == {
        (rule, operand) for rule in gradient_rules.RULES for operand in ("x", "kernel")
    }
    assert all(row["errors"]["xla"] < 1e-5 < 0.1 < row["largest"] for row in right)
    gradient = gradient_rules.library_gradient
    monkeypatch.setattr(gradient_rules, "library_gradient", lambda *args: 1.01 * gradient(*args))
    wrong = gradient_rules.check(3, 5, 2, ["xla"])
    assert all(row["errors"]["xla"] > 1e-4 for row in wrong)


def test_rules_come_nearer_to_the_sign_as_they_get_steeper() -> None:
    rows = {row["rule"]: row for row in gradient_rules.likeness(16, 32, 8)}
    order = ["full precision", "HT(d)", "HT(4d)", "sign"]
    for measure in ("cosine", "clipped"):
        values = [rows[rule][measure] for rule in order]
        assert values == sorted(values)
    assert rows["sign"]["cosine"] == pytest.approx(1)


# -- channels -------------------------------------------------------------------------------------


def test_channels_that_are_one_and_channels_that_are_not() -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal((4000, 1)) * np.array([1.0, -2.0, 3.0]) + 5
    several = random.standard_normal((4000, 3)) @ np.diag([1.0, 1.0, 1.0]) + 5
    assert channels.correlation(one) == pytest.approx(1)
    assert channels.rank_share(one) == pytest.approx(1 / 3)
    assert channels.correlation(several) < 0.1
    assert channels.rank_share(several) > 0.99


def test_what_is_observed_of_a_resnet() -> None:
    dataset = load("digits", image_size=8, limit_train=8)
    network = channels.build(channels.Start(mean=0.5), (1, 1), 4, dataset, 0)
    kernel = network.layer1[0].conv1.kernel[...]
    assert abs(kernel.mean() - 0.5) < 0.5 < kernel.std()
    seen = channels.observe(network, dataset, 4)
    assert len(seen) == 4
    assert all(0 < one["rank"] <= 1 and 0 <= one["correlation"] <= 1 for one in seen)


# -- diversity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7])
def test_effective_rank_of_known_matrices(n: int) -> None:
    rng = np.random.default_rng(n)
    orthogonal = np.linalg.qr(rng.standard_normal((n, n)))[0]
    one = rng.standard_normal((n, 1)) * rng.standard_normal(n + 2)
    assert effective_rank(np.eye(n)) == pytest.approx(n)
    assert effective_rank(-3 * orthogonal) == pytest.approx(n)
    assert effective_rank(one) == pytest.approx(1)
    # Singular values 2 and 1: entropy -(2/3 log 2/3 + 1/3 log 1/3).
    assert effective_rank(np.diag([2.0, 1, 0])) == pytest.approx(3 / 2 ** (2 / 3))
    assert effective_rank(np.stack([np.eye(3), np.ones((3, 3))])).tolist() == pytest.approx([3, 1])


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 100))
def test_effective_rank_is_between_one_and_the_rank(
    seed: int, rows: int, columns: int, scale: float
) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    rank = effective_rank(matrix)
    assert 1 - 1e-9 <= rank <= min(rows, columns) + 1e-9
    assert effective_rank(scale * matrix.T) == pytest.approx(rank)


def test_what_is_observed_is_what_the_network_computes() -> None:
    dataset = load("digits", image_size=8, limit_train=8)
    # Digits have patches of one grey, which a layer norm blows up to noise.
    noise = np.random.default_rng(0).integers(0, 256, dataset.test_images.shape, np.uint8)
    dataset = dataclasses.replace(dataset, test_images=noise)
    config = diversity.TRAINING.smoke
    network: Any = diversity.build(config, "adder, plain, identity", "auto", dataset)
    logits, maps, tokens = Observer(network, dataset, 3)(network, 1)
    network.eval()
    mean, std = (jnp.asarray(moment) for moment in (dataset.mean, dataset.std))
    images = normalize(jnp.asarray(dataset.test_images[1:4]), mean, std)
    np.testing.assert_allclose(logits, network(images), rtol=1e-3, atol=1e-3)
    assert [m.shape for m in maps] == [(3, 2, 16, 16)]
    np.testing.assert_allclose(maps[0].sum(-1), 1, rtol=1e-5)
    head = network.head(network.encoder_norm(tokens[-1]).mean(1))
    np.testing.assert_allclose(logits, head, rtol=1e-3, atol=1e-3)


def test_ranks_do_not_depend_on_running_statistics() -> None:
    dataset = load("digits", image_size=8, limit_train=8)
    network: Any = diversity.build(diversity.TRAINING.smoke, "adder, plain", "auto", dataset)
    observer = Observer(network, dataset, 8)
    before, logits = observer.ranks(network), observer(network)[0]
    statistics = nnx.state(network, nnx.BatchStat)
    assert jax.tree.leaves(statistics)
    nnx.update(network, jax.tree.map(lambda leaf: 2 * leaf + 3, statistics))
    assert observer.ranks(network) == before
    assert np.abs(observer(network)[0] - logits).max() > 1e-3


def test_scales_are_no_difference_at_the_start() -> None:
    dataset = load("digits", image_size=8, limit_train=8)
    config = diversity.TRAINING.smoke
    labels = ("adder, E and F", "adder, plain")
    plain, scaled = (diversity.build(config, name, "auto", dataset) for name in labels)
    image = jnp.ones((1, 8, 8, 1))
    np.testing.assert_array_equal(plain(image), scaled(image))  # type: ignore[operator]


def test_interrupted_diversity_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--smoke", "--out-dir", str(tmp_path)]
    done: list[str] = []

    def train(network: Any, config: Any, dataset: Any, place: Any, label: str) -> tuple[Any, float]:
        if label in done:
            raise Interrupted(f"the networks before {label!r} are done", signal.SIGTERM)
        done.append(label)
        return network, 0.5

    monkeypatch.setattr(diversity, "train", train)
    pair = [*options, "--variants", "adder, plain", "multiplying"]
    done.append("multiplying")
    assert diversity.main(pair) == 128 + signal.SIGTERM
    assert "'multiplying' are done and saved; go on with:" in capsys.readouterr().err
    done.clear()
    assert diversity.main(pair) == 0
    assert done == ["multiplying"]
    # Another run is not mixed with this one's networks.
    assert diversity.main([*pair, "--images", "5"]) == 2
    assert "is of another run" in capsys.readouterr().err


# -- profile ---------------------------------------------------------------------------------------

NETWORKS = {
    "lenet5": (Images(2, 8, 1), {}),
    "resnet20": (Images(2, 8, 3), {}),
    "vit": (Images(2, 8, 3), {"depth": 2, "features": 8, "num_heads": 2}),
    "vit, adder scores": (Images(2, 8, 3), {"depth": 1, "features": 8, "scores": "adder"}),
}


def abstract(name: str, family: str) -> tuple[nnx.Module, jax.ShapeDtypeStruct]:
    """A network without numbers, and its images."""
    images, options = NETWORKS[name]
    registered = name.partition(",")[0]
    model = nnx.eval_shape(lambda: create(registered, get_family(family), images, **options))
    return model, jax.ShapeDtypeStruct(images.shape, jnp.float32)


@pytest.mark.parametrize("family", ["adder", "conv", "euclid"])
@pytest.mark.parametrize("name", NETWORKS)
def test_profile_covers_every_product(name: str, family: str) -> None:
    model, images = abstract(name, family)
    found = products(model, images)
    alone: collections.Counter[str] = collections.Counter()
    for product in found:
        alone += count(jax.make_jaxpr(product.function)(product.lhs, product.rhs).jaxpr)
    graphdef, state = nnx.split(model)

    def forward(state: Any, images: jax.Array) -> Any:
        network: Any = nnx.merge(graphdef, state)
        network.train()
        return network(images)

    assert alone == count(jax.make_jaxpr(forward)(state, images).jaxpr)
    # A Euclid product is several of XLA's.
    assert family == "euclid" or sum(alone.values()) == len(found)


def count(jaxpr: Any) -> "collections.Counter[str]":
    """The products in a program, as XLA's primitives or functions with rules of their own."""
    counts: collections.Counter[str] = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated") or name.startswith("custom_vjp_call"):
            counts[name] += 1
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    counts += count(inner)
    return counts


def test_first_layer_has_no_gradient_for_the_images() -> None:
    first, *others = products(*abstract("lenet5", "adder"))
    assert not first.lhs_gradient
    assert first.rhs_gradient
    assert set(first.passes()) == {"forward", "∂w"}
    assert all(set(product.passes()) == {"forward", "∂x", "∂w"} for product in others)


def test_parts_and_rest_are_the_step() -> None:
    layers = [{"ms": {"forward": 1.0, "∂x": None, "∂w": 2.0, "update": 9.0}}] * 2
    found = {"layers": layers, "whole": {"update": 3.0, "step": 10.0}}
    parts = profile_step.totals(found)
    assert parts == {"forward": 2.0, "∂x": 0.0, "∂w": 4.0, "update": 3.0, "rest": 1.0}


@pytest.mark.parametrize(("slow", "rounds"), [(float("inf"), 5), (0.0, 3)])
def test_rounds_take_turns(slow: float, rounds: int) -> None:
    calls: list[str] = []
    functions = {name: functools.partial(calls.append, name) for name in "ab"}
    times = interleaved(functions, 5, slow)
    assert calls == ["a", "b"] * (1 + rounds)  # once before, to warm up
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": rounds, "b": rounds}


# -- speed -----------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.floats(0.1, 10), st.floats(0, 50), st.floats(1, 500))
def test_largest_batch_keeps_to_the_limit(
    batch: int, each: float, fixed: float, limit: float
) -> None:
    def compiled(batch: int) -> tuple[float, int]:
        return fixed + each * batch, batch

    whole, _ = compiled(batch)
    if compiled(speed.FEWEST)[0] > limit:
        with pytest.raises(UserError, match="images need"):
            speed.largest(compiled, whole, batch, limit)
    elif whole > limit:
        got, call = speed.largest(compiled, whole, batch, limit)
        assert got == call < batch
        assert compiled(got)[0] <= limit


def test_ours_and_theirs_stand_in_one_table() -> None:
    rows = [
        {"network": "n", "form": form, "program": program, "times": times, "memory": 2.0}
        for form, times in ((speed.BASE, 1.0), ("jadder", 0.5))
        for program in ("inference", "training")
    ]
    texts = speed.relative_table(rows).texts()
    assert texts[1][1:5] == ["Adder", "out of memory", "x6.2", "out of memory"]
    assert texts[-1] == ["n", "jadder", "0.50", "0.50", "2.00", "2.00"]
