"""Image files, and what a network says of them."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import predict, publish
from experiments.common.errors import UserError
from experiments.images.files import about_image, read_image
from experiments.images.load import load
from experiments.training.config import TrainConfig
from experiments.training.folder import owned
from experiments.training.model_file import open_model
from experiments.training.run import Run
from jadder import models
from tests.experiments.stop import StopAfter

NAMES = ("cat", "dog", "emu", "frog")


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def saved(folder: Path, channels: int, size: int | None = 8) -> Path:
    def create() -> nnx.Module:
        name = "resnet8" if size is None else "lenet5"
        options: dict[str, Any] = {"width": 4} if size is None else {}
        return models.create(
            name, family="conv", num_classes=4, image_size=size, channels=channels,
            rngs=nnx.Rngs(0), **options,
        )  # fmt: skip

    model: Any = nnx.eval_shape(create)
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32))
    path = folder / f"model-{channels}-{size}.safetensors"
    models.save(model, path, class_names=NAMES, mean=0.4, std=0.3)
    return path


def pixels(channels: int, height: int = 8, width: int = 8) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(channels)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def write(path: Path, array: np.ndarray[Any, Any], **options: Any) -> Path:
    Image.fromarray(array.squeeze()).save(path, **options)
    return path


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, None)])
def test_a_line_for_each_image(
    channels: int, size: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path, channels, size)
    images = [pixels(channels), pixels(channels)[::-1]]
    paths = [str(write(tmp_path / f"{i}.png", image)) for i, image in enumerate(images)]
    if size is None:  # which takes images of any size
        paths.append(str(write(tmp_path / "wide.png", pixels(channels, 8, 12))))
    assert predict.main([str(model), *paths, "--top", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(paths)
    network, description = models.load(model)
    logits = network((jnp.asarray(np.stack(images), jnp.float32) / 255 - 0.4) / 0.3)
    assert description.class_names == NAMES
    for path, text, row in zip(paths, lines, np.asarray(jax.nn.softmax(logits)), strict=False):
        order = np.argsort(-row, kind="stable")
        assert text == f"{path}: " + ", ".join(f"{NAMES[i]} {row[i]:.2%}" for i in order)


def test_wrong_files_have_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved(tmp_path, 3)
    good = write(tmp_path / "good.jpg", pixels(3, 20, 30))
    (tmp_path / "text.jpg").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = write(tmp_path / "cut.png", noise)
    cut.write_bytes(cut.read_bytes()[:4000])
    os.mkfifo(tmp_path / "pipe.png")
    wrong = ["text.jpg", "cut.png", "pipe.png", "nothing.png", "."]
    paths = [str(tmp_path / name) for name in wrong]
    assert predict.main([str(model), *paths, str(good)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: ")
    assert out.count("\n") == 1
    lines = err.splitlines()
    assert len(lines) == len(wrong)
    for path, line in zip(paths, lines, strict=True):
        assert line.startswith(f"error: {path.removesuffix('/.')}")
    assert "is no image file that Pillow knows" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "No such file or directory"),
        (["empty"], "expected a model file or the folder of a finished run"),
        (["text"], "text holds no model of jadder"),
        (["bare"], "does not say the mean and deviation"),
        (["bare", "--top", "0"], "--top must be positive"),
    ],
)
def test_wrong_models(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text").write_text("a text")
    network = models.load(saved(tmp_path, 1)).model
    models.save(network, "bare")
    assert predict.main([arguments[0], "image.png", *arguments[1:]]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1


def test_formats(tmp_path: Path) -> None:
    grey, colour = pixels(1), pixels(3)
    path = write(tmp_path / "a.png", grey)
    assert about_image(path) == ((8, 8), False)
    np.testing.assert_array_equal(read_image(path, 1), grey)
    np.testing.assert_array_equal(read_image(path, 3), np.repeat(grey, 3, -1))
    path = write(tmp_path / "16.png", grey.astype(np.uint16) * 257)
    assert not about_image(path)[1]
    np.testing.assert_array_equal(read_image(path, 1), grey)
    path = write(tmp_path / "b.png", colour)
    assert about_image(path) == ((8, 8), True)
    np.testing.assert_array_equal(read_image(path, 3), colour)
    # Transparent pixels are white, whatever colour they would have.
    alpha = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None, :, None].repeat(8, 0)
    path = write(tmp_path / "c.png", np.concatenate([colour, alpha], -1))
    np.testing.assert_array_equal(read_image(path, 3), np.where(alpha, colour, 255))
    # A photograph that was taken with the camera on its side.
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "d.png", pixels(3, 4, 6), exif=exif)
    assert about_image(path)[0] == (6, 4)
    np.testing.assert_array_equal(read_image(path, 3), np.rot90(pixels(3, 4, 6), -1))
    palette = Image.fromarray(colour).quantize(16)
    palette.save(tmp_path / "e.gif")
    assert about_image(tmp_path / "e.gif")[1]
    Image.fromarray(grey.squeeze()).save(tmp_path / "f.gif")
    assert not about_image(tmp_path / "f.gif")[1]
    Image.fromarray(np.full((2, 2), -0.5, np.float32)).save(tmp_path / "g.tiff")
    with pytest.raises(UserError, match=r"g\.tiff cannot be read: its values go from -0\.5"):
        read_image(tmp_path / "g.tiff", 1)


def test_a_run_without_a_model_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(
        model="lenet5", family=("conv",), image_size=8, epochs=1, batch_size=32, limit_train=64,
        out_dir=str(tmp_path), name="run",
    )  # fmt: skip
    dataset = load("digits", image_size=8, limit_train=64)
    with owned(tmp_path / "run"):
        Run(config, "conv", dataset, "the command").train(StopAfter())
    file = tmp_path / "run" / "model.safetensors"
    written = models.load(file)
    file.unlink()
    model, description = open_model(tmp_path / "run")
    assert description == written.description
    images = description.normalize(dataset.test_images[:5])
    np.testing.assert_array_equal(model(images), written.model(images))
    image = write(tmp_path / "five.png", dataset.test_images[0])
    assert predict.main([str(tmp_path / "run"), str(image)]) == 0
    assert capsys.readouterr().out.startswith(f"{image}: ")
    _publish(tmp_path / "run", tmp_path / "weights", capsys, monkeypatch)


def _publish(
    run: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's network becomes weights; the accuracy beside them is the file's own."""
    weights.mkdir()
    for name, text in (("../mine", "NAME must be"), ("", "NAME must be")):
        assert publish.main([str(run), name or "%", "--out", str(weights)]) == 2
        assert text in capsys.readouterr().err
    assert publish.main([str(run), "mine", "--out", str(weights), "--loss", "0.05"]) == 0
    file = weights / "lenet5-conv-mine.safetensors"
    assert capsys.readouterr().out.startswith(f"{file}: ")
    entry = json.loads((weights / "weights.json").read_text())["lenet5-conv-mine"]
    assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    model, description = models.load(file)
    digits = load("digits", image_size=8, limit_train=64)
    found = model(description.normalize(digits.test_images)).argmax(-1)
    assert entry["test_accuracy"] == pytest.approx(float((found == digits.test_labels).mean()))
    monkeypatch.setattr(publish, "accuracy", lambda *others: 2.0)
    assert publish.main([str(run), "mine", "--out", str(weights)]) == 2
    assert "the test accuracy is 200.00%, not" in capsys.readouterr().err
