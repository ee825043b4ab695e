"""The weights in the package: what they promise, and what create() makes of them."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from experiments.images.load import load
from jadder import models
from jadder.models import published

LENET = {"image_size": 28, "channels": 1}


def test_each_file_is_listed_and_small() -> None:
    files = {path.stem for path in published.FOLDER.glob("*.safetensors")}
    assert files == set(models.pretrained())
    for name, entry in models.pretrained().items():
        content = (published.FOLDER / f"{name}.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["bytes"] < 2**20
        assert entry["command"].startswith("python -m experiments.")
        about = models.load(published.FOLDER / f"{name}.safetensors").description.about
        for key in ("command", "epochs", "test_accuracy"):
            assert about[key] == entry[key]


@pytest.mark.parametrize("name", models.pretrained())
def test_the_stated_accuracy_is_met(name: str, real_data: Path) -> None:
    entry = models.pretrained()[name]
    data = load(entry["data"], str(real_data))
    model = models.create(entry["model"], family=entry["family"], pretrained=entry["data"])
    model.eval()
    images = (data.test_images / np.float32(255) - np.float32(data.mean)) / np.float32(data.std)
    graphdef, state = nnx.split(model)
    classes = nnx.jit(lambda part: nnx.merge(graphdef, state)(part).argmax(-1))
    parts = np.split(images.astype(np.float32), 20)
    found = np.concatenate([np.asarray(classes(jnp.asarray(part))) for part in parts])
    assert np.mean(found == data.test_labels) == pytest.approx(entry["test_accuracy"], abs=2e-4)


def test_create() -> None:
    model = models.create("lenet5", pretrained="mnist", **LENET)
    assert isinstance(model.conv2.kernel, jadder.AdderKernel)
    assert model.fc1.kernel.dtype == jnp.float32
    assert not model.bn1.use_running_average
    assert float(jnp.abs(model.bn1.mean[...]).max()) > 0
    half = models.create("lenet5", family="conv", pretrained="mnist", dtype=jnp.bfloat16)
    assert half.conv2.dtype == jnp.bfloat16
    own = dataclasses.replace(models.get_family("adder"), implementation="xla")
    model = models.create("lenet5", family=own, pretrained="mnist")
    assert model.conv2.conv_general_dilated.implementation == "xla"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "resnet20",
            {},
            r"no pretrained 'resnet20' of the family 'adder' on 'mnist'; there are .*",
        ),
        ("lenet5", {"family": "euclid"}, "no pretrained 'lenet5' of the family 'euclid'"),
        ("lenet5", {"num_classes": 7}, "num_classes=7 does not agree .*, where it is 10"),
        ("lenet5", {"image_size": 32}, r"image_size=\(32, 32\) .*, where it is \(28, 28\)"),
        ("lenet5", {"norm": "centered_batch"}, "norm='centered_batch' .*, where it is not given"),
        ("lenet6", {}, "unknown model 'lenet6'"),
    ],
)
def test_what_does_not_agree(name: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        models.create(name, pretrained="mnist", **options)


def test_rngs_are_needed_without_weights() -> None:
    with pytest.raises(TypeError, match="rngs, the source of the initial parameters, is missing"):
        models.create("lenet5", **LENET)


def test_a_damaged_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(published.FOLDER, tmp_path / "weights")
    monkeypatch.setattr(published, "FOLDER", tmp_path / "weights")
    path = tmp_path / "weights" / "lenet5-adder-mnist.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match="is damaged: its checksum is not that in weights"):
        models.create("lenet5", pretrained="mnist")
