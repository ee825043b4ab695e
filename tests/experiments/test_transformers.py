"""The scripts that train transformers, at their small size, and what they choose from."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jadder.models
from experiments import imagenet, simple_vit, swin, vit_recipe
from experiments.images.load import load
from experiments.studies.study import Trained
from experiments.training.config import TrainConfig
from tests.experiments.smoke import smoke


@pytest.mark.parametrize("module", [simple_vit, swin, vit_recipe])
def test_smoke(module: Any, tmp_path: Path) -> None:
    result = smoke(module, tmp_path)
    for run in result["data"]["runs"]:
        assert not run["diverged"]
        assert run["epochs"][-1]["test_accuracy"] is not None
    assert result["tables"][0]["rows"]


def test_imagenet_reads_its_stand_in_while_it_trains(tmp_path: Path) -> None:
    result = smoke(imagenet, tmp_path)
    (run,) = result["data"]["runs"]
    assert run["run"]["dataset"] == "tfds:stand_in"
    assert run["epochs"][0]["step"] == 3
    stand_in = load("tfds:stand_in", str(tmp_path / "imagenet-smoke/data"), image_size=16)
    assert stand_in.train_images.shape == (48, 16, 16, 3)
    assert stand_in.test_images.shape == (16, 16, 16, 3)
    # The classes differ in which side is brighter, and the images in size.
    left, right = (
        stand_in.train_images[:, :, part].mean((1, 2, 3)) for part in (slice(8), slice(8, 16))
    )
    np.testing.assert_array_equal(stand_in.train_labels, right < left)


def searched(name: str, rate: float, accuracy: float | None) -> Trained:
    result = None if accuracy is None else {"test_accuracy": accuracy, "train_accuracy": accuracy}
    return Trained(f"search {name} {rate:g}", TrainConfig(), Path(), [], result, 10)


def test_each_variant_gets_the_rate_that_was_best_for_it() -> None:
    found = [
        searched("a", 1e-3, 0.5), searched("a", 1e-2, 0.6), searched("a", 1e-1, None),
        searched("b", 1e-3, 0.5), searched("b", 1e-2, 0.5), searched("c", 1e-3, None),
        searched("c", 1e-2, None),
    ]  # fmt: skip
    assert simple_vit.best_rates(found) == {"a": 1e-2, "b": 1e-3, "c": 1e-3}
    table = simple_vit.search_table(found)
    assert table.texts() == [
        ["a", "50.00%", "60.00%", ""], ["b", "50.00%", "50.00%", ""], ["c", "", "", ""]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        *(("vit", changes) for changes in simple_vit.VARIANTS.values()),
        *(("vit", changes) for changes in vit_recipe.CHANGES.values()),
        *(("swin", changes) for changes in swin.NETWORKS.values()),
    ],
)
def test_every_variant_is_a_network(model: str, changes: dict[str, Any]) -> None:
    config = TrainConfig(**{"family": ("adder",), **changes})
    (family,) = config.family

    def build() -> Any:
        options = config.model_arguments()
        network = jadder.models.create(model, family=family, rngs=nnx.Rngs(0), **options)
        return nnx.state(network, nnx.Param)

    assert jax.tree.leaves(jax.eval_shape(build))
