"""Image classification sets, each as uint8 arrays in memory.

Files are read where they lie; nothing is downloaded. Every way in which a folder can be wrong
(missing, incomplete, truncated, of another kind) is a UserError of one line.
"""

import dataclasses
import gzip
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.errors import UserError

Images = NDArray[np.uint8]
Labels = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images with their labels.

    Attributes:
        name: the data set's name.
        train_images, test_images: uint8 (N, H, W, C).
        train_labels, test_labels: int32 (N,), from 0 to num_classes - 1.
        num_classes: number of classes.
        mean, std: of each channel, on the scale on which 255 is 1.
        crop_padding: by how many pixels augmentation may shift a training image.
        flip: whether augmentation may mirror a training image.
        note: what a reader of the results should know.
    """

    name: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    note: str = ""

    def fingerprint(self) -> str:
        """A checksum of every image and label, to tell this data from other data."""
        crc = 0
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, crc)
        shape = "x".join(str(n) for n in self.train_images.shape)
        return f"{self.name}-{shape}-{crc:08x}"


def load(
    name: str,
    data_dir: str | None = None,
    *,
    image_size: int | None = None,
    limit_train: int | None = None,
) -> Dataset:
    """Reads a data set.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10" or "tfds:NAME[/CONFIG][:VERSION]".
        data_dir: folder with the files, or with a folder of them; not used by digits.
        image_size: images of another size are resized to this one. Digits are 8 x 8 and are
            enlarged to 28 x 28 where none is given, the size that LeNet-5 is made for.
        limit_train: number of training images to keep, from the first.

    Raises:
        UserError: the name is unknown, or the folder does not hold the data set.
    """
    if name.startswith("tfds:"):
        dataset = _load_tfds(name, data_dir, image_size)
    elif name in _LOADERS:
        dataset = _LOADERS[name](Path(data_dir or "data"))
    else:
        known = ", ".join(_LOADERS)
        raise UserError(f"--dataset: {name!r} is not one of {known} and does not begin with tfds:")
    if image_size is None and name == "digits":
        image_size = 28
    if image_size is not None:
        dataset = _resized(dataset, image_size)
    if limit_train is not None:
        if limit_train > len(dataset.train_images):
            raise UserError(
                f"--limit-train {limit_train}: {name} has {len(dataset.train_images)} "
                "training images"
            )
        dataset = dataclasses.replace(
            dataset,
            train_images=dataset.train_images[:limit_train],
            train_labels=dataset.train_labels[:limit_train],
        )
    return dataset


# -- digits ----------------------------------------------------------------------------------------


def _load_digits(data_dir: Path) -> Dataset:
    """The 1,797 digits of scikit-learn; every fifth image (index 4, 9, 14, ...) is for the test."""
    from sklearn.datasets import load_digits

    del data_dir
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    test = np.arange(len(images)) % 5 == 4
    mean, std = _moments(images[~test])
    return Dataset(
        "digits", images[~test], labels[~test], images[test], labels[test], 10, mean, std,
        crop_padding=2, flip=False,
        note="every fifth of scikit-learn's 1,797 images is a test image",
    )  # fmt: skip


# -- MNIST and Fashion-MNIST: IDX files ------------------------------------------------------------

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _load_mnist(data_dir: Path) -> Dataset:
    arrays = _read_idx_folder(data_dir, ("mnist", "MNIST/raw", "MNIST"))
    return Dataset("mnist", *arrays, 10, (0.1307,), (0.3081,), crop_padding=2, flip=False)


def _load_fashion_mnist(data_dir: Path) -> Dataset:
    arrays = _read_idx_folder(
        data_dir, ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST")
    )
    return Dataset("fashion_mnist", *arrays, 10, (0.2860,), (0.3530,), crop_padding=2, flip=True)


def _read_idx_folder(
    data_dir: Path, subfolders: Sequence[str]
) -> tuple[Images, Labels, Images, Labels]:
    folder = _find_folder(data_dir, subfolders)
    paths = []
    for name in _IDX_FILES:
        # Some unpackers replace the hyphen before "idx" with a dot.
        names = (name, f"{name}.gz", name.replace("-idx", ".idx"))
        paths.append(next((folder / n for n in names if (folder / n).is_file()), folder / name))
    _check_complete(folder, paths, "(each may end in .gz)")
    train, train_labels = _read_idx_pair(*paths[:2])
    test, test_labels = _read_idx_pair(*paths[2:])
    return train, train_labels, test, test_labels


def _read_idx_pair(images_path: Path, labels_path: Path) -> tuple[Images, Labels]:
    images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} has {len(images)} images, but {labels_path.name} {len(labels)} labels"
        )
    _check_labels(labels, 10, labels_path)
    return images[..., None], labels.astype(np.int32)


def read_idx(path: Path, *, dims: int) -> Images:
    """Reads an IDX file of unsigned bytes with `dims` dimensions, plain or compressed by gzip."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is truncated or damaged: {error}") from None
    magic = bytes((0, 0, 8, dims))
    if raw[:4] != magic:
        raise UserError(
            f"{path} is not an IDX file of {'images' if dims == 3 else 'labels'}: expected it to "
            f"begin with {magic.hex(' ')}, got {raw[:4].hex(' ') or 'an empty file'}"
        )
    header = 4 + 4 * dims
    if len(raw) < header:
        raise UserError(f"{path} is truncated: expected {header} bytes of header, got {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dims, 4))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        kind = "truncated" if len(raw) < expected else "too long"
        raise UserError(f"{path} is {kind}: expected {expected} bytes, got {len(raw)}")
    if 0 in shape:
        raise UserError(f"{path} is empty: its header gives the shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


# -- CIFAR-10: binary version ----------------------------------------------------------------------

_CIFAR_RECORD = 1 + 3 * 32 * 32


def _load_cifar10(data_dir: Path) -> Dataset:
    folder = _find_folder(data_dir, ("cifar-10-batches-bin", "cifar10"))
    paths = [folder / f"data_batch_{i}.bin" for i in range(1, 6)] + [folder / "test_batch.bin"]
    _check_complete(folder, paths, "of CIFAR-10's binary version")
    sizes = {path.name: path.stat().st_size for path in paths[:5]}
    if len(set(sizes.values())) != 1:
        raise UserError(f"{folder}: expected five training files of one size, got {sizes} bytes")
    parts = [_read_cifar(path) for path in paths]
    images = np.concatenate([part[0] for part in parts[:5]])
    labels = np.concatenate([part[1] for part in parts[:5]])
    return Dataset(
        "cifar10", images, labels, *parts[5], 10,
        (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), crop_padding=4, flip=True,
    )  # fmt: skip


def _read_cifar(path: Path) -> tuple[Images, Labels]:
    size = path.stat().st_size
    if size == 0 or size % _CIFAR_RECORD:
        raise UserError(
            f"{path} is truncated or of another kind: expected a multiple of {_CIFAR_RECORD} "
            f"bytes (30730000 as published), got {size}"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].astype(np.int32)
    _check_labels(labels, 10, path)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


# -- tensorflow-datasets ---------------------------------------------------------------------------


def _load_tfds(name: str, data_dir: str | None, image_size: int | None) -> Dataset:
    """A set that tensorflow-datasets has prepared as array_record; TensorFlow is not imported."""
    import tensorflow_datasets as tfds

    folder = _find_tfds(name, data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
        splits = builder.info.splits
        image_key, label_key = _tfds_keys(name, builder.info, tfds)
        test = next((split for split in ("test", "validation") if split in splits), None)
        if "train" not in splits or test is None:
            raise UserError(
                f"{name} needs the splits train and test (or validation), it has {list(splits)}"
            )
        arrays: list[Any] = []
        for split in ("train", test):
            source = builder.as_data_source(split)
            arrays += _tfds_arrays(name, source, image_key, label_key, image_size)
    except UserError:
        raise
    except NotImplementedError:
        raise UserError(
            f"{folder} is not in the format array_record; prepare it again in another folder: "
            f"{_tfds_command(name, 'DIR')}"
        ) from None
    except Exception as error:  # whatever array_record and protobuf raise on damaged files
        raise UserError(f"{folder} cannot be read ({type(error).__name__}: {error})") from None
    train_images, train_labels, test_images, test_labels = arrays
    classes = builder.info.features[label_key].num_classes
    _check_labels(train_labels, classes, folder)
    _check_labels(test_labels, classes, folder)
    mean, std = _moments(train_images)
    return Dataset(
        name, train_images, train_labels, test_images, test_labels, classes, mean, std,
        crop_padding=train_images.shape[1] // 8,
        # Mirrored characters are other characters.
        flip=not any(word in name for word in ("mnist", "kmnist", "svhn", "cmaterdb", "digit")),
        note=f"test images: the split {test!r}",
    )  # fmt: skip


def _tfds_command(name: str, folder: str) -> str:
    return f"tfds build {name.removeprefix('tfds:')} --file_format=array_record --data_dir={folder}"


def _find_tfds(name: str, data_dir: str | None) -> Path:
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    path, _, version = name.removeprefix("tfds:").partition(":")
    if not path or ".." in Path(path).parts:
        raise UserError(f"--dataset: {name!r} names no data set")
    found = [p.parent for p in (root / path).glob(f"{version or '*'}/dataset_info.json")]
    if not found:
        raise UserError(
            f"{root / path} holds no data set that tensorflow-datasets has prepared; once, where "
            f"TensorFlow is installed, run: {_tfds_command(name, str(root))}"
        )
    return max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])


def _tfds_keys(name: str, info: Any, tfds: Any) -> tuple[str, str]:
    features = info.features
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
    image, label = info.supervised_keys if info.supervised_keys else (images[:1], labels[:1])
    image, label = (key[0] if isinstance(key, list) and key else key for key in (image, label))
    if image not in images or label not in labels:
        raise UserError(
            f"{name} is no image classification set: it has the features "
            f"{', '.join(f'{k} ({type(v).__name__})' for k, v in features.items())}"
        )
    return image, label


def _tfds_arrays(
    name: str, source: Any, image_key: str, label_key: str, image_size: int | None
) -> tuple[Images, Labels]:
    images, labels = [], []
    for example in source:
        image = example[image_key]
        if image.dtype != np.uint8:
            raise UserError(f"{name} has images of {image.dtype}, expected uint8")
        images.append(image if image_size is None else _resize(image[None], image_size)[0])
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"{name} has images of several sizes, {images[0].shape} and {images[-1].shape}: "
                "give --image-size"
            )
        labels.append(example[label_key])
    if not images:
        raise UserError(f"{name} has no images in a split")
    return np.stack(images), np.asarray(labels, np.int32)


# -- shared ----------------------------------------------------------------------------------------


def _find_folder(data_dir: Path, subfolders: Sequence[str]) -> Path:
    data_dir = data_dir.expanduser()
    if not data_dir.exists():
        raise UserError(f"data folder {data_dir} does not exist; --data-dir says where the data is")
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is a file, expected a folder with the data")
    return next((data_dir / s for s in subfolders if (data_dir / s).is_dir()), data_dir)


def _check_complete(folder: Path, paths: Sequence[Path], remark: str) -> None:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(paths)} files {remark}: {', '.join(missing)}"
        )


def _check_labels(labels: NDArray[Any], classes: int, where: Path) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"{where} has labels from {low} to {high}, expected 0 to {classes - 1}")


def _moments(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        weights = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., 0].size
        mean = float(weights @ values)
        means.append(mean)
        stds.append(max(math.sqrt(float(weights @ (values - mean) ** 2)), 1 / 255))
    return tuple(means), tuple(stds)


def _resized(dataset: Dataset, size: int) -> Dataset:
    if dataset.train_images.shape[1:3] == dataset.test_images.shape[1:3] == (size, size):
        return dataset
    train, test = _resize(dataset.train_images, size), _resize(dataset.test_images, size)
    mean, std = _moments(train)
    return dataclasses.replace(dataset, train_images=train, test_images=test, mean=mean, std=std)


def _resize(images: Images, size: int) -> Images:
    """Bilinear, the shorter side to `size`, then the middle square."""
    from PIL import Image

    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    resized = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        for c in range(images.shape[3]):
            channel = Image.fromarray(image[..., c]).resize(new, Image.Resampling.BILINEAR)
            resized[i, ..., c] = np.asarray(channel)[top : top + size, left : left + size]
    return resized


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion_mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}
