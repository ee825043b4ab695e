"""images.load: each format, and each way in which its files can be wrong."""

import functools
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.common.errors import UserError
from experiments.images.load import load, read_idx
from experiments.images.streamed import StreamedImages
from experiments.train import main
from tests.experiments.conftest import idx_bytes

ROOT = Path(__file__).resolve().parents[2]


def test_digits_split_is_fixed() -> None:
    from sklearn.datasets import load_digits

    dataset, again = load("digits", image_size=8), load("digits", image_size=8)
    bunch = load_digits()
    assert dataset.train_images.shape == (1438, 8, 8, 1)
    assert dataset.test_images.shape == (359, 8, 8, 1)
    assert dataset.train_images.dtype == np.uint8
    np.testing.assert_array_equal(dataset.test_labels, bunch.target[4::5])
    np.testing.assert_array_equal(
        dataset.test_images[3, ..., 0], np.round(bunch.images[19] / 16 * 255)
    )
    assert dataset.fingerprint() == again.fingerprint()
    enlarged = load("digits")
    assert enlarged.train_images.shape == (1438, 28, 28, 1)
    np.testing.assert_array_equal(enlarged.train_labels, dataset.train_labels)
    np.testing.assert_allclose(
        enlarged.train_images.mean((1, 2)), dataset.train_images.mean((1, 2)), atol=15
    )


def test_normalized_training_images_have_mean_0_and_deviation_1() -> None:
    dataset = load("digits", image_size=8)  # as they come; enlarging smooths them
    scaled = (dataset.train_images / 255 - dataset.mean) / dataset.std
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-6)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files(
    name: str, mnist_folder: Path, mnist_arrays: dict[str, np.ndarray[Any, Any]]
) -> None:
    dataset = load(name, str(mnist_folder))
    expected = list(mnist_arrays.values())
    np.testing.assert_array_equal(dataset.train_images[..., 0], expected[0])
    np.testing.assert_array_equal(dataset.train_labels, expected[1])
    np.testing.assert_array_equal(dataset.test_images[..., 0], expected[2])
    np.testing.assert_array_equal(dataset.test_labels, expected[3])
    assert dataset.train_images.dtype == np.uint8
    assert dataset.train_images.shape[-1] == 1


def test_cifar10(cifar_folder: Path, cifar_arrays: dict[str, Any]) -> None:
    dataset = load("cifar10", str(cifar_folder))
    parts = list(cifar_arrays.values())
    np.testing.assert_array_equal(dataset.train_images, np.concatenate([p[1] for p in parts[:5]]))
    np.testing.assert_array_equal(dataset.train_labels, np.concatenate([p[0] for p in parts[:5]]))
    np.testing.assert_array_equal(dataset.test_images, parts[5][1])
    np.testing.assert_array_equal(dataset.test_labels, parts[5][0])


def test_parent_folder_will_do(mnist_folder: Path, cifar_folder: Path) -> None:
    assert len(load("mnist", str(mnist_folder.parent)).train_images) == 20
    assert len(load("cifar10", str(cifar_folder.parent)).train_images) == 30


def test_limit_and_resize(cifar_folder: Path) -> None:
    whole = load("cifar10", str(cifar_folder))
    part = load("cifar10", str(cifar_folder), image_size=16, limit_train=9)
    assert part.train_images.shape == (9, 16, 16, 3)
    assert part.test_images.shape == (6, 16, 16, 3)
    np.testing.assert_array_equal(part.train_labels, whole.train_labels[:9])
    assert part.fingerprint() != whole.fingerprint()
    # A resized image keeps its mean colour.
    np.testing.assert_allclose(
        part.train_images.mean((1, 2)), whole.train_images[:9].mean((1, 2)), atol=3
    )


def test_fingerprint_sees_one_pixel(mnist_folder: Path) -> None:
    before = load("mnist", str(mnist_folder)).fingerprint()
    path = mnist_folder / "train-images-idx3-ubyte"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert load("mnist", str(mnist_folder)).fingerprint() != before


# -- files that are wrong --------------------------------------------------------------------------


def error_of(name: str, folder: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, str(folder), **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_missing_folder(name: str, tmp_path: Path) -> None:
    assert f"{tmp_path}/none does not exist" in error_of(name, tmp_path / "none")


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert "is a file, expected a folder" in error_of("mnist", tmp_path / "x")


def test_half_of_the_files(mnist_folder: Path, cifar_folder: Path) -> None:
    (mnist_folder / "train-images-idx3-ubyte").unlink()
    (mnist_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    text = error_of("mnist", mnist_folder)
    assert "lacks 2 of 4 files" in text
    assert "train-images-idx3-ubyte, t10k-labels-idx1-ubyte" in text
    (cifar_folder / "data_batch_3.bin").unlink()
    assert "lacks 1 of 6 files" in error_of("cifar10", cifar_folder)
    assert "data_batch_3.bin" in error_of("cifar10", cifar_folder)


def test_truncated_idx(mnist_folder: Path) -> None:
    path = mnist_folder / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert f"is truncated: expected {len(whole)} bytes, got {len(whole) - 5}" in error_of(
        "mnist", mnist_folder
    )
    path.write_bytes(whole[:10])
    assert "truncated: expected 16 bytes of header, got 10" in error_of("mnist", mnist_folder)
    path.write_bytes(whole + b"x")
    assert f"is too long: expected {len(whole)} bytes" in error_of("mnist", mnist_folder)
    path.write_bytes(b"")
    assert "an empty file" in error_of("mnist", mnist_folder)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_gzip(damage: str, mnist_folder: Path) -> None:
    path = mnist_folder / "train-labels-idx1-ubyte.gz"
    raw = bytearray(path.read_bytes())
    if damage == "changed":
        raw[-6] ^= 0xFF
    path.write_bytes(raw[:-9] if damage == "cut" else raw)
    assert "train-labels-idx1-ubyte.gz is truncated or damaged" in error_of("mnist", mnist_folder)


def test_idx_of_another_kind(mnist_folder: Path) -> None:
    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"
    raw = (mnist_folder / images).read_bytes()
    (mnist_folder / images).write_bytes(gzip.decompress((mnist_folder / labels).read_bytes()))
    text = error_of("mnist", mnist_folder)
    assert "expected it to begin with 00 00 08 03, got 00 00 08 01" in text
    (mnist_folder / images).write_bytes(b"\x89PNG" + raw)
    assert "is not an IDX file of images" in error_of("mnist", mnist_folder)


def test_images_and_labels_disagree(mnist_folder: Path) -> None:
    header = bytes((0, 0, 8, 1)) + np.asarray([3], ">u4").tobytes()
    (mnist_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + b"\0\1\2"))
    assert "has 20 images, but train-labels-idx1-ubyte.gz 3 labels" in error_of(
        "mnist", mnist_folder
    )


def test_labels_out_of_range(mnist_folder: Path, cifar_folder: Path) -> None:
    header = bytes((0, 0, 8, 1)) + np.asarray([20], ">u4").tobytes()
    path = mnist_folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(header + bytes([11] * 20)))
    assert "labels from 11 to 11, expected 0 to 9" in error_of("mnist", mnist_folder)
    raw = bytearray((cifar_folder / "test_batch.bin").read_bytes())
    raw[0] = 200
    (cifar_folder / "test_batch.bin").write_bytes(raw)
    assert "to 200, expected 0 to 9" in error_of("cifar10", cifar_folder)


def test_truncated_cifar10(cifar_folder: Path) -> None:
    path = cifar_folder / "data_batch_2.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3073])
    assert "expected five training files of one size" in error_of("cifar10", cifar_folder)
    path.write_bytes(whole)
    path = cifar_folder / "test_batch.bin"
    path.write_bytes(whole[:-100])
    text = error_of("cifar10", cifar_folder)
    assert "expected a multiple of 3073 bytes" in text
    assert f"got {len(whole) - 100}" in text


def test_cifar10_with_images_missing(cifar_folder: Path) -> None:
    path = cifar_folder / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3073])
    text = error_of("cifar10", cifar_folder)
    assert "expected six files of as many images, 10000 as published" in text
    assert "'test_batch.bin': 5" in text
    # Of six equal files that are smaller than the published ones, the result says so.
    path.write_bytes(whole)
    assert load("cifar10", str(cifar_folder)).note == "6 images of the 10000 in each file"


@pytest.mark.parametrize("other", ["data_batch_4.bin", "test_batch.bin"])
def test_cifar10_with_a_file_twice(other: str, cifar_folder: Path) -> None:
    (cifar_folder / other).write_bytes((cifar_folder / "data_batch_2.bin").read_bytes())
    assert f"data_batch_2.bin and {other} hold the same images" in error_of("cifar10", cifar_folder)


def test_mnist_with_the_training_images_twice(mnist_folder: Path) -> None:
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte.gz"):
        (mnist_folder / f"t10k-{kind}").write_bytes((mnist_folder / f"train-{kind}").read_bytes())
    assert "mnist has the same images for training and for the test" in error_of(
        "mnist", mnist_folder
    )


def test_test_images_of_another_shape(
    mnist_folder: Path, mnist_arrays: dict[str, np.ndarray[Any, Any]]
) -> None:
    wide = np.pad(mnist_arrays["t10k-images-idx3-ubyte"], ((0, 0), (2, 2), (2, 2)))
    (mnist_folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(wide))
    text = error_of("mnist", mnist_folder)
    assert "training images of (28, 28, 1), but test images of (32, 32, 1)" in text
    assert load("mnist", str(mnist_folder), image_size=28).test_images.shape == (7, 28, 28, 1)


def test_idx_that_says_more_than_there_is(mnist_folder: Path) -> None:
    path = mnist_folder / "train-images-idx3-ubyte"
    header = bytes((0, 0, 8, 3)) + np.asarray([2**32 - 1] * 3, ">u4").tobytes()
    path.write_bytes(header)
    assert "GiB" in error_of("mnist", mnist_folder)
    # What never ends, once it is unpacked, is not unpacked to its end.
    labels = bytes((0, 0, 8, 1)) + np.asarray([20], ">u4").tobytes() + bytes(2**24)
    (mnist_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    with pytest.raises(UserError, match="too long: expected 28 bytes, got 29"):
        read_idx(mnist_folder / "train-labels-idx1-ubyte.gz", dims=1)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_is_missing(make: Any, mnist_folder: Path) -> None:
    path = mnist_folder / "train-images-idx3-ubyte"
    path.unlink()
    make(path)
    assert "lacks 1 of 4 files" in error_of("mnist", mnist_folder)


def test_images_larger_than_the_memory() -> None:
    with pytest.raises(UserError, match=r"1797 images of --image-size 1000000 would take .* GiB"):
        load("digits", image_size=1_000_000)


def test_unknown_name_and_too_large_limit(mnist_folder: Path) -> None:
    assert "'svhn' is not one of digits, mnist" in error_of("svhn", mnist_folder)
    assert "mnist has 20 training images" in error_of("mnist", mnist_folder, limit_train=21)


def test_empty_idx(tmp_path: Path) -> None:
    path = tmp_path / "x-idx3-ubyte"
    path.write_bytes(bytes((0, 0, 8, 3)) + np.asarray([0, 28, 28], ">u4").tobytes())
    with pytest.raises(UserError, match=r"is empty: its header gives the shape \(0, 28, 28\)"):
        read_idx(path, dims=3)


def test_validation_images_are_the_last_training_images(mnist_folder: Path) -> None:
    whole = load("mnist", str(mnist_folder))
    held = load("mnist", str(mnist_folder), validation=6, limit_train=10)
    np.testing.assert_array_equal(held.train_images, whole.train_images[:10])
    np.testing.assert_array_equal(held.test_images, whole.train_images[14:])
    np.testing.assert_array_equal(held.test_labels, whole.train_labels[14:])
    with pytest.raises(UserError, match="--validation 20: mnist has 20 training images"):
        load("mnist", str(mnist_folder), validation=20)


# -- tensorflow-datasets ---------------------------------------------------------------------------


def png(image: np.ndarray[Any, Any]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="png")
    return content.getvalue()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets prepared by tensorflow-datasets: tiny/1.0.0, uneven/1.0.0, pairs/1.0.0."""
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tfds")
    feature = tfds.features

    class Base(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc, name-defined]
        VERSION = tfds.core.Version("1.0.0")
        url_infos: dict[str, Any] = {}  # noqa: RUF012 - not looked for beside this module
        shape: tuple[int | None, ...] = (8, 8, 3)

        def _info(self) -> Any:
            features = {
                "image": feature.Image(shape=self.shape),
                "label": feature.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=feature.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples(20), "test": self._generate_examples(7)}

        def _generate_examples(self, count: int = 0) -> Any:
            for i in range(count):
                side = 8 if self.shape[0] else 8 + i
                # The features encode arrays with TensorFlow, but take encoded images as they are.
                yield i, {"image": png(np.full((side, 8, 3), i, np.uint8)), "label": i % 3}

    class Tiny(Base):
        pass

    class Uneven(Base):
        shape = (None, None, 3)

    class Pairs(Base):
        def _info(self) -> Any:
            features = feature.FeaturesDict({"a": feature.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _generate_examples(self, count: int = 0) -> Any:
            yield from ((i, {"a": i}) for i in range(count))

    for cls in (Tiny, Uneven, Pairs):
        cls(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder: Path) -> None:
    dataset = load("tfds:tiny", str(tfds_folder))
    assert dataset.train_images.shape == (20, 8, 8, 3)
    assert dataset.train_images.dtype == np.uint8
    assert dataset.test_images.shape == (7, 8, 8, 3)
    assert dataset.num_classes == 3
    # Image i has the value i everywhere and the label i % 3, in whatever order they were written.
    values = dataset.train_images[:, 0, 0, 0]
    assert sorted(values) == list(range(20))
    np.testing.assert_array_equal(dataset.train_labels, values % 3)
    assert (
        load("tfds:tiny:1.0.0", str(tfds_folder)).fingerprint().endswith(dataset.fingerprint()[-8:])
    )


def test_tfds_is_the_installed_one_and_does_not_import_tensorflow(
    tfds_folder: Path, tmp_path: Path
) -> None:
    """Not what has its name where the command is run, which `python -m` and -c look at first."""
    fake = tmp_path / "tensorflow_datasets"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from experiments.images.load import load; "
        f"d = load('tfds:tiny', {str(tfds_folder)!r}); "
        "print(len(d.test_images), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["7", "False"]


def test_tfds_images_of_several_sizes(tfds_folder: Path) -> None:
    assert "several sizes" in error_of("tfds:uneven", tfds_folder)
    assert "--image-size" in error_of("tfds:uneven", tfds_folder)
    dataset = load("tfds:uneven", str(tfds_folder), image_size=8)
    assert dataset.train_images.shape == (20, 8, 8, 3)


@pytest.mark.parametrize(("name", "size"), [("tiny", None), ("uneven", 6)])
def test_streamed_images_are_those_in_memory(
    tfds_folder: Path, name: str, size: int | None
) -> None:
    read_set = functools.partial(
        load, f"tfds:{name}", str(tfds_folder), image_size=size, limit_train=9
    )
    kept, read = read_set(), read_set(image_memory=0)
    assert isinstance(read.train_images, StreamedImages)
    assert read.train_images.shape == kept.train_images.shape
    index = np.array([8, 0, 0, 5])
    np.testing.assert_array_equal(read.train_images[index], kept.train_images[index])
    np.testing.assert_array_equal(read.test_images[np.arange(7)], kept.test_images)
    np.testing.assert_array_equal(read.train_labels, kept.train_labels)
    # Of few images all are taken.
    assert (read.mean, read.std) == (kept.mean, kept.std)


@pytest.mark.usefixtures("quick_compiler")
def test_training_on_streamed_images_is_training_on_images_in_memory(
    tfds_folder: Path, tmp_path: Path
) -> None:
    options = ["--dataset", "tfds:tiny", "--data-dir", str(tfds_folder), "--family", "conv"]
    options += ["--model", "vit", "--image-size", "8", "--batch-size", "8", "--epochs", "1"]
    options += ["--model-options", "depth=1", "features=16", "--out-dir", str(tmp_path)]
    for name, memory in (("kept", "1"), ("read", "0")):
        assert main([*options, "--name", name, "--image-memory", memory]) == 0
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("kept", "read")]
    assert results[0]["parameters_sha256"] == results[1]["parameters_sha256"]


EVIL = "data.tiny.code.Feature"


@pytest.mark.parametrize("form", ["proto", "nested", "legacy"])
def test_tfds_imports_nothing_from_the_data(
    form: str, tfds_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """features.json names modules; Python would find one below the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` does
    target = tmp_path / "data" / "tiny" / "1.0.0"
    shutil.copytree(tfds_folder / "tiny" / "1.0.0", target)
    (target.parent / "code.py").write_text("from pathlib import Path; Path('ran').touch()")
    features = json.loads((target / "features.json").read_text())
    image = features["featuresDict"]["features"]["image"]
    if form == "proto":
        image["pythonClassName"] = EVIL
    elif form == "nested":
        features["featuresDict"]["features"]["more"] = {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "sequence": {"feature": {**image, "python_class_name": EVIL}},
        }
        features["featuresDict"]["features"]["more"]["sequence"]["feature"].pop("pythonClassName")
    else:
        features = {
            "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            "content": {"image": {"type": EVIL, "content": {}}},
        }
    (target / "features.json").write_text(json.dumps(features))
    text = error_of("tfds:tiny", tmp_path / "data")
    assert f"has a feature of the type '{EVIL}', which is none of tensorflow-datasets' own" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b"{}"])
def test_tfds_with_damaged_features(content: bytes, tfds_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny" / "1.0.0"
    shutil.copytree(tfds_folder / "tiny" / "1.0.0", target)
    (target / "features.json").write_bytes(content)
    assert str(target) in error_of("tfds:tiny", tmp_path)


def test_tfds_with_a_file_that_never_begins(tfds_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny" / "1.0.0"
    shutil.copytree(tfds_folder / "tiny" / "1.0.0", target)
    os.mkfifo(target / "label.more.txt")
    assert "label.more.txt is no ordinary file" in error_of("tfds:tiny", tmp_path)


def test_tfds_that_is_not_there(tfds_folder: Path) -> None:
    text = error_of("tfds:absent", tfds_folder)
    assert "tfds build absent --file_format=array_record" in text
    assert "tfds build" in error_of("tfds:tiny:2.0.0", tfds_folder)
    for name in ("tfds:", "tfds:../tiny", "tfds:tiny:/1.0.0", "tfds:tiny:**"):
        assert f"{name!r} names no data set" in error_of(name, tfds_folder)


def test_tfds_of_another_kind(tfds_folder: Path) -> None:
    assert "no image classification set: it has the features a (" in error_of(
        "tfds:pairs", tfds_folder
    )


def test_tfds_in_another_format(tfds_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny" / "1.0.0"
    target.mkdir(parents=True)
    for path in (tfds_folder / "tiny" / "1.0.0").iterdir():
        target.joinpath(path.name.replace("array_record", "tfrecord")).write_bytes(
            path.read_bytes().replace(b"array_record", b"tfrecord")
        )
    assert "is not in the format array_record" in error_of("tfds:tiny", tmp_path)


def test_tfds_with_a_damaged_file(tfds_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny" / "1.0.0"
    target.mkdir(parents=True)
    for path in (tfds_folder / "tiny" / "1.0.0").iterdir():
        content = path.read_bytes()
        target.joinpath(path.name).write_bytes(content[:50] if "train" in path.name else content)
    assert "cannot be read" in error_of("tfds:tiny", tmp_path)


# -- the published files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train", "test", "first"),
    [
        ("mnist", 60000, 10000, ([5, 0, 4], [7, 2, 1])),
        ("fashion_mnist", 60000, 10000, ([9, 0, 0], [9, 2, 1])),
        ("cifar10", 50000, 10000, ([6, 9, 9], [3, 8, 8])),
    ],
)
def test_published_files(
    name: str, train: int, test: int, first: tuple[list[int], list[int]], real_data: Path
) -> None:
    dataset = load(name, str(real_data))
    assert (len(dataset.train_images), len(dataset.test_images)) == (train, test)
    assert (list(dataset.train_labels[:3]), list(dataset.test_labels[:3])) == first
    # The constants are the means of the training images, to the digits in which they are quoted.
    means = dataset.train_images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(dataset.mean, means, atol=1e-3)
