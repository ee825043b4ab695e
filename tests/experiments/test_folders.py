"""Images of one's own, in a folder for each class."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import predict
from experiments.common.errors import UserError
from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.images.resize import ASPECTS, fit, random_resized_crop
from experiments.images.streamed import Crops, StreamedImages, cropped
from experiments.training.config import TrainConfig

CLASSES = ("left", "right", "up")


def picture(label: int, number: int, size: tuple[int, int] | None = None) -> Any:
    """Noise, bright on the side that the class says."""
    rng = np.random.default_rng((label, number))
    height, width = size or rng.integers(20, 40, 2)
    pixels = rng.integers(0, 90, (height, width, 3))
    side = (slice(None), slice(0, width // 2)) if label == 0 else (
        (slice(None), slice(width // 2, None)) if label == 1 else slice(0, height // 2)
    )  # fmt: skip
    pixels[side] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def write_classes(folder: Path, count: int, *, first: int = 0, **options: Any) -> Path:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            ending = ("jpg", "PNG")[number % 2]
            picture(label, number, **options).save(folder / name / f"{number}.{ending}")
    return folder


def read(folder: Path, **options: Any) -> Dataset:
    return load(f"folder:{folder}", **{"image_size": 8, **options})


def test_train_and_test(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 6)
    write_classes(tmp_path / "test", 2, first=6)
    (tmp_path / "train" / "left" / ".DS_Store").touch()
    (tmp_path / "train" / ".cache").mkdir()
    dataset = read(tmp_path)
    assert dataset.class_names == CLASSES
    assert dataset.train_images.shape == (18, 8, 8, 3)
    assert dataset.test_images.shape == (6, 8, 8, 3)
    assert sorted(dataset.train_labels) == [0] * 6 + [1] * 6 + [2] * 6
    # Each image has its own label: the bright side tells.
    for images, labels in ((dataset.train_images, dataset.train_labels),
                           (dataset.test_images, dataset.test_labels)):  # fmt: skip
        for image, label in zip(images, labels, strict=True):
            halves = [image[:, :3], image[:, 5:], image[:3]]
            assert np.argmax([half.mean() for half in halves]) == label
    scaled = (dataset.train_images / 255 - dataset.mean) / dataset.std
    np.testing.assert_allclose(scaled.mean((0, 1, 2)), 0, atol=1e-6)
    assert dataset.flip
    again = load("folder:elsewhere", str(tmp_path), image_size=8)
    np.testing.assert_array_equal(again.train_images, dataset.train_images)


def test_one_folder_is_split_by_the_seed(tmp_path: Path) -> None:
    write_classes(tmp_path, 10, size=(8, 8))
    dataset = read(tmp_path, image_size=None)
    assert dataset.train_images.shape == (24, 8, 8, 3)
    np.testing.assert_array_equal(np.bincount(dataset.test_labels), [2, 2, 2])
    every = {image.tobytes() for image in (*dataset.train_images, *dataset.test_images)}
    assert len(every) == 30
    same, other = read(tmp_path), read(tmp_path, seed=1)
    np.testing.assert_array_equal(same.test_images, dataset.test_images)
    assert not np.array_equal(other.test_images, dataset.test_images)
    # The first images are of all classes, as --limit-train takes the first.
    assert len(set(dataset.train_labels[:10])) == 3


def test_grey_images_have_one_channel_and_are_not_mirrored(tmp_path: Path) -> None:
    write_classes(tmp_path, 2)
    for path in list(tmp_path.rglob("*.*")):
        Image.open(path).convert("L").save(path)
    dataset = read(tmp_path)
    assert dataset.train_images.shape[-1] == 1
    assert not dataset.flip


def test_large_folders_are_read_batch_by_batch(tmp_path: Path) -> None:
    write_classes(tmp_path, 5)
    whole, streamed = read(tmp_path), read(tmp_path, image_memory=0.0)
    assert isinstance(streamed.train_images, StreamedImages)
    chosen = np.array([3, 0, 11])
    np.testing.assert_array_equal(streamed.train_images[chosen], whole.train_images[chosen])
    assert streamed.mean == whole.mean
    # Random parts are parts of the images as they are, in whichever order they are asked for.
    dataset = read(tmp_path, random_crops=True)
    assert isinstance(dataset.train_images, StreamedImages)
    assert isinstance(dataset.test_images, np.ndarray)
    first, second = (cropped(dataset.train_images, Crops(0.2, 0, epoch)) for epoch in (0, 1))
    assert first.shape == dataset.train_images.shape
    parts = first[chosen]
    np.testing.assert_array_equal(first[chosen[::-1]], parts[::-1])
    assert not np.array_equal(parts, second[chosen])
    assert not np.array_equal(parts, whole.train_images[chosen])
    path = next(tmp_path.rglob("*.PNG"))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=f"{re.escape(str(path))} cannot be read"):
        [part[np.arange(len(part))] for part in (streamed.train_images, streamed.test_images)]


def test_random_parts() -> None:
    rows, columns = np.mgrid[:60, :90].astype(np.uint8)
    image = np.stack([rows, columns], -1)
    shares, aspects = [], []
    for seed in range(300):
        part = random_resized_crop(image, 32, 32, 0.1, np.random.default_rng(seed)).astype(float)
        height, width = (np.ptp(part[..., 0]), np.ptp(part[..., 1])) / np.float64(31 / 32)
        shares.append(height * width / 5400)
        aspects.append(width / height)
    assert 0.08 < min(shares) < 0.16
    assert 0.7 < max(shares) < 1.02
    assert 0.35 < np.mean(shares) < 0.55  # the largest ones often do not fit
    assert ASPECTS[0] * 0.85 < min(aspects) < max(aspects) < ASPECTS[1] * 1.15
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.05)
    # Of an image too long for any such part, the middle.
    long = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (3, 200, 1))
    part = random_resized_crop(long, 4, 4, 0.9, np.random.default_rng(0))
    assert 97 < part.min() <= part.max() < 103
    assert fit(long, 3, 3).shape == (3, 3, 1)
    np.testing.assert_array_equal(
        cropped(image[None], Crops(1.0, 0, 0))[np.array([0])].shape, (1, 60, 90, 2)
    )


# -- Folders that are none -------------------------------------------------------------------------


def without_test(folder: Path) -> None:
    write_classes(folder / "train", 2)


def without_train(folder: Path) -> None:
    write_classes(folder / "test", 2)


def unknown_class(folder: Path) -> None:
    write_classes(folder / "train", 2)
    write_classes(folder / "test", 2)
    (folder / "test" / "down").mkdir()


def missing_class(folder: Path) -> None:
    write_classes(folder / "train", 2)
    write_classes(folder / "test", 2)
    (folder / "test" / "up").rename(folder / "test" / ".up")


def no_test_images(folder: Path) -> None:
    write_classes(folder / "train", 2)
    for name in CLASSES:
        (folder / "test" / name).mkdir(parents=True)


def loose_images(folder: Path) -> None:
    folder.mkdir()
    picture(0, 0).save(folder / "a.jpg")


def one_class(folder: Path) -> None:
    (folder / "cats").mkdir(parents=True)
    picture(0, 0).save(folder / "cats" / "a.jpg")


def empty_class(folder: Path) -> None:
    write_classes(folder, 2)
    (folder / "empty").mkdir()


def one_image(folder: Path) -> None:
    write_classes(folder, 2)
    (folder / "up" / "0.jpg").unlink()


def folder_in_a_class(folder: Path) -> None:
    write_classes(folder, 2)
    (folder / "up" / "more").mkdir()


def other_file(folder: Path) -> None:
    write_classes(folder, 2)
    (folder / "up" / "notes.txt").touch()


def unreadable(folder: Path) -> None:
    write_classes(folder, 6)
    for number in range(0, 6, 2):
        (folder / "up" / f"{number}.jpg").write_bytes(b"none")
    (folder / "left" / "0.jpg").write_bytes(b"")


def cut(folder: Path) -> None:
    write_classes(folder, 2)
    path = folder / "up" / "1.PNG"
    path.write_bytes(path.read_bytes()[:-500])


def pipe(folder: Path) -> None:
    write_classes(folder, 2)
    os.mkfifo(folder / "up" / "pipe.png")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: None, "pets does not exist"),
    "file": (lambda folder: folder.write_text(""), "is a file, expected a folder of folders"),
    "empty": (lambda folder: folder.mkdir(), "has no folders of images"),
    "loose images": (loose_images, "has images, but no folder for each class"),
    "one class": (one_class, "has one class, cats, expected two or more"),
    "empty class": (empty_class, "pets/empty has no images"),
    "one image": (one_image, "pets/up has one image, expected two or more"),
    "without test": (without_test, "has a folder train, but no folder test"),
    "without train": (without_train, "has a folder test, but no folder train"),
    "unknown class": (unknown_class, "test/down is of a class that .*/train does not have"),
    "missing class": (missing_class, "test has no folder up, a class of"),
    "no test images": (no_test_images, "pets/test has no images"),
    "folder in a class": (folder_in_a_class, "up/more is a folder in the folder of a class"),
    "other file": (other_file, r"notes\.txt is no image file by its name"),
    "unreadable": (unreadable, r"(\w\.jpg cannot be read.*){3}; and 1 more of 18 files"),
    "cut": (cut, r"up/1\.PNG cannot be read"),
    "pipe": (pipe, r"pipe\.png is no ordinary file"),
    "several sizes": (lambda folder: write_classes(folder, 3), r"of \d sizes, .*--image-size"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_one_line_for_each_kind_of_wrong_folder(how: str, tmp_path: Path) -> None:
    make, text = WRONG[how]
    folder = tmp_path / "pets"
    make(folder)
    with pytest.raises(UserError, match=text) as caught:
        read(folder, image_size=None if how == "several sizes" else 8)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2


def test_no_name() -> None:
    with pytest.raises(UserError, match="'folder:' names no folder"):
        load("folder:")


def test_a_run_is_named_after_the_folder() -> None:
    config = TrainConfig(dataset="folder:/somewhere/my pets/", model="lenet5")
    assert config.run_name("adder") == "my_pets-lenet5-adder-s0"


def test_train_and_predict(
    train: Callable[..., "subprocess.Popen[str]"], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Three hundred pictures, with random parts and smoothed labels, from the command line."""
    write_classes(tmp_path / "pets", 100)
    process = train(
        "--dataset", "folder:pets", "--image-size", 12, "--model", "lenet5", "--family", "conv",
        "--epochs", 4, "--batch-size", 16, "--random-crop", 0.5, "--label-smoothing", 0.1,
        "--augment", "none",
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run = tmp_path / "runs" / "pets-lenet5-conv-s0"
    result = json.loads((run / "result.json").read_text())
    assert result["test_accuracy"] > 0.9
    assert (result["run"]["random_crop"], result["run"]["label_smoothing"]) == (0.5, 0.1)
    assert "chosen by the seed 0" in result["note"]
    for label, name in enumerate(CLASSES):
        picture(label, 1000, size=(50, 40)).save(tmp_path / f"{name}.webp")
        assert predict.main([str(run), str(tmp_path / f"{name}.webp")]) == 0
        assert f"{name}.webp: {name} " in capsys.readouterr().out
