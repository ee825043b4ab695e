"""training.annealing: a run whose products change in stages."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jadder
import jadder.models
from experiments.common.errors import UserError
from experiments.common.interrupt import Interrupted
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.training.annealing import (
    STAGES,
    products,
    stage_of,
    stages,
)
from experiments.training.config import ANNEALINGS, TrainConfig
from experiments.training.run import Run
from tests.experiments.stop import StopAfter

CONFIG = TrainConfig(
    model="vit", family=("adder",), image_size=8, epochs=1, batch_size=16, limit_train=64,
    model_options=("features=8", "depth=1", "num_heads=2", "mlp_features=8", "norm=layer"),
    checkpoint_every=1e9, devices=1, augment="none",
)  # fmt: skip

LENGTHS = {
    "none": [12],
    "rule": [3, 3, 3, 3],
    "distance": [3, 3, 3, 3],
    "distance_half": [2, 2, 2, 6],
    "exact": [6, 3, 3],
    "distance_exact": [2, 2, 2, 3, 3],
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load("digits", image_size=8, limit_train=CONFIG.limit_train)


def vit(**options: Any) -> nnx.Module:
    return jadder.models.create(
        "vit", image_size=8, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0), **options
    )


def products_of(graphdef: nnx.GraphDef[Any], model: nnx.Module) -> list[Any]:
    _, state = nnx.split(model)
    return [product for _, _, product in products(nnx.merge(graphdef, state))]


@given(st.integers(1, 50), st.sampled_from(list(ANNEALINGS)))
def test_stages_are_in_order_and_end_with_the_last(total: int, anneal: str) -> None:
    found = [stage_of(step, total, anneal) for step in range(total)]
    assert found == sorted(found)
    # In twelfths of the run, to a step.
    lengths = np.bincount(found, minlength=len(LENGTHS[anneal]))
    assert np.abs(lengths - total * np.asarray(LENGTHS[anneal]) / 12).max() <= 1


def test_slopes_double_until_they_are_the_rules_own() -> None:
    model = vit(scores="adder")
    before = nnx.graphdef(model)
    graphdefs = stages(model, "rule")
    assert nnx.graphdef(model) == graphdefs[-1] == before
    for graphdef, slope in zip(graphdefs, (0.5, 1.0, 2.0, 4.0), strict=True):
        found = products_of(graphdef, model)
        assert len(found) == 7  # query, key, value, scores, out and the MLP's two
        assert {product.rule.x for product in found} == {(slope, 1.0)}
        # Kernels keep their rule; scores have no kernel.
        assert {product.rule.kernel for product in found} == {(1.0, np.inf), (slope, 1.0)}


def test_gradients_become_exact() -> None:
    model = vit(scores="adder")
    before = nnx.graphdef(model)
    graphdefs = stages(model, "exact")
    assert nnx.graphdef(model) == graphdefs[0] == before
    for graphdef, slope in zip(graphdefs[1:], (8.0, 16.0), strict=True):
        found = products_of(graphdef, model)  # their own rule of inputs is HT(4d)
        assert {product.rule.x for product in found} == {(slope, 1.0)}
        assert {product.rule.kernel for product in found} == {(slope / 4, 1.0), (slope, 1.0)}
    own = dataclasses.replace(jadder.models.get_family("adder"), rule=jadder.SIGN)
    found = products_of(stages(vit(family=own), "exact")[-1], vit(family=own))
    assert {product.rule for product in found} == {jadder.SIGN}


def test_without_annealing_there_is_one_stage() -> None:
    model = vit()
    assert stages(model, "none") == [nnx.graphdef(model)]


@pytest.mark.parametrize("anneal", [one for one in ANNEALINGS if one != "none"])
def test_a_network_that_multiplies_cannot_be_annealed(anneal: str) -> None:
    with pytest.raises(UserError, match=f"--anneal {anneal}: the network has no adder products"):
        stages(vit(family="conv"), anneal)


def test_the_sign_has_no_slope() -> None:
    family = dataclasses.replace(jadder.models.get_family("adder"), rule=jadder.SIGN)
    with pytest.raises(UserError, match="needs a rule with a slope"):
        stages(vit(family=family), "rule")


def test_each_annealing_is_known() -> None:
    assert set(STAGES) == set(ANNEALINGS) == set(LENGTHS)


def test_distances_then_exact_gradients() -> None:
    model = vit()
    before = nnx.graphdef(model)
    graphdefs = stages(model, "distance_exact")
    assert nnx.graphdef(model) == before
    assert graphdefs[:3] == stages(model, "distance_half")[:3]
    assert graphdefs[3:] == stages(model, "exact")[1:]


def start(folder: Path, dataset: Dataset, **changes: Any) -> Run:
    config = dataclasses.replace(CONFIG, out_dir=str(folder), **changes)
    return Run(config, "adder", dataset, "the command")


@pytest.mark.usefixtures("quick_compiler")
def test_annealed_run_goes_on_within_a_stage(dataset: Dataset, tmp_path: Path) -> None:
    # Four steps, one to a stage.
    whole = start(tmp_path / "whole", dataset, anneal="distance").train(StopAfter())
    with pytest.raises(Interrupted, match="after 2 of 4 steps"):
        start(tmp_path, dataset, anneal="distance").train(StopAfter(2))
    rest = start(tmp_path, dataset, anneal="distance", resume=True).train(StopAfter())
    assert rest["parameters_sha256"] == whole["parameters_sha256"]
    assert whole["run"]["anneal"] == "distance"


@pytest.mark.usefixtures("quick_compiler")
def test_a_network_is_evaluated_with_the_products_of_its_stage(
    dataset: Dataset, tmp_path: Path
) -> None:
    run = start(tmp_path, dataset, anneal="distance")
    images, labels = dataset.test_images[:32], dataset.test_labels[:32]
    losses = []
    for step in (1, 2, 4):
        run.state["step"] = run.devices.replicate(np.int32(step))
        losses.append(run.evaluate(images, labels)[0])
    assert len(set(losses)) == 3
    plain = start(tmp_path / "plain", dataset)
    assert losses[-1] == plain.evaluate(images, labels)[0]
