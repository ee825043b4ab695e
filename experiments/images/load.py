"""Image classification sets: the files of the published ones, and those of tensorflow-datasets.

Files are read where they lie; nothing is downloaded. Every way in which a folder can be wrong
(missing, incomplete, truncated, of another kind) is a UserError of one line.
"""

import dataclasses
import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.common.environment import check_memory
from experiments.common.errors import UserError
from experiments.images import folders, prepared
from experiments.images.dataset import Dataset, Images, Labels, check_labels, moments, resized
from experiments.images.streamed import StreamedImages

DIGITS = tuple("0123456789")
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")  # fmt: skip
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                 "truck")  # fmt: skip


def load(
    name: str,
    data_dir: str | None = None,
    *,
    image_size: int | None = None,
    limit_train: int | None = None,
    validation: int = 0,
    image_memory: float = 4.0,
    random_crops: bool = False,
    seed: int = 0,
) -> Dataset:
    """Reads a data set.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10", "tfds:NAME[/CONFIG][:VERSION]" or
            "folder:DIR", as `folders.load` describes it.
        data_dir: folder with the files, or with a folder of them; not used by digits.
        image_size: images of another size are resized to this one. Digits are 8 x 8 and are
            enlarged to 28 x 28 where none is given, the size that LeNet-5 is made for.
        limit_train: number of training images to keep, from the first.
        validation: number of training images, the last ones, that take the place of the test
            images. They are held back before `limit_train` counts the others.
        image_memory: in GiB. A split of tfds: or folder: that is larger is read while it is used.
        random_crops: whether random parts of the training images will be asked for; those of tfds:
            and folder: are then parts of the images as they are, before they are resized.
        seed: chooses the test images of a folder: that does not have them by themselves.

    Raises:
        UserError: the name is unknown, or the folder does not hold the data set.
    """
    if name.startswith("tfds:"):
        dataset = prepared.load(
            name, data_dir, image_size=image_size, image_memory=image_memory * 2**30,
            random_crops=random_crops,
        )  # fmt: skip
    elif name.startswith("folder:"):
        dataset = folders.load(
            name, data_dir, image_size=image_size, image_memory=image_memory * 2**30,
            random_crops=random_crops, seed=seed,
        )  # fmt: skip
    elif name in _LOADERS:
        dataset = _LOADERS[name](Path(data_dir or "data"))
    else:
        known = ", ".join(_LOADERS)
        raise UserError(
            f"--dataset: {name!r} is not one of {known} and does not begin with tfds: or folder:"
        )
    if image_size is None and name == "digits":
        image_size = 28
    if image_size is not None and name in _LOADERS:
        dataset = resized(dataset, image_size)
    _check_test_images(dataset)
    if validation:
        dataset = _held_back(dataset, validation)
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


def _check_test_images(dataset: Dataset) -> None:
    """Refuses test images that no network for the training images takes, or that are those."""
    train, test = dataset.train_images, dataset.test_images
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"{dataset.name} has training images of {train.shape[1:]}, but test images of "
            f"{test.shape[1:]}; --image-size may make them alike"
        )
    if isinstance(train, StreamedImages) or isinstance(test, StreamedImages):
        return
    if np.array_equal(train, test):
        raise UserError(f"{dataset.name} has the same images for training and for the test")


def _held_back(dataset: Dataset, count: int) -> Dataset:
    """The last training images in place of the test images."""
    if count >= len(dataset.train_images):
        raise UserError(
            f"--validation {count}: {dataset.name} has {len(dataset.train_images)} training images"
        )
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:-count],
        train_labels=dataset.train_labels[:-count],
        test_images=dataset.train_images[-count:],
        test_labels=dataset.train_labels[-count:],
        note=f"tested on the last {count} training images",
    )


# -- digits ----------------------------------------------------------------------------------------


def _load_digits(data_dir: Path) -> Dataset:
    """The 1,797 digits of scikit-learn; every fifth image (index 4, 9, 14, ...) is for the test."""
    from sklearn.datasets import load_digits

    del data_dir
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    test = np.arange(len(images)) % 5 == 4
    mean, std = moments(images[~test])
    return Dataset(
        "digits", images[~test], labels[~test], images[test], labels[test], 10, mean, std,
        crop_padding=2, flip=False,
        note="every fifth of scikit-learn's 1,797 images is a test image",
        class_names=DIGITS,
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
    return Dataset(
        "mnist", *arrays, 10, (0.1307,), (0.3081,), crop_padding=2, flip=False, class_names=DIGITS
    )


def _load_fashion_mnist(data_dir: Path) -> Dataset:
    arrays = _read_idx_folder(
        data_dir, ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST")
    )
    return Dataset(
        "fashion_mnist", *arrays, 10, (0.2860,), (0.3530,), crop_padding=2, flip=True,
        class_names=CLOTHES,
    )  # fmt: skip


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
    check_labels(labels, 10, labels_path)
    return images[..., None], labels.astype(np.int32)


def read_idx(path: Path, *, dims: int) -> Images:
    """Reads an IDX file of unsigned bytes with `dims` dimensions, plain or compressed by gzip."""
    header = 4 + 4 * dims
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            raw = file.read(header)
            shape = _idx_shape(path, raw, dims)
            expected = header + math.prod(shape)
            check_memory(expected, f"{path}: images of the shape {shape}")
            # One byte more shows a file that is too long, or that never ends once unpacked.
            raw += file.read(expected - header + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from None
    size = len(raw) if packed else path.stat().st_size
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise UserError(f"{path} is {kind}: expected {expected} bytes, got {size}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx_shape(path: Path, header: bytes, dims: int) -> tuple[int, ...]:
    magic = bytes((0, 0, 8, dims))
    if header[:4] != magic:
        raise UserError(
            f"{path} is not an IDX file of {'images' if dims == 3 else 'labels'}: expected it to "
            f"begin with {magic.hex(' ')}, got {header[:4].hex(' ') or 'an empty file'}"
        )
    expected = 4 + 4 * dims
    if len(header) < expected:
        raise UserError(
            f"{path} is truncated: expected {expected} bytes of header, got {len(header)}"
        )
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4", dims, 4))
    if 0 in shape:
        raise UserError(f"{path} is empty: its header gives the shape {shape}")
    return shape


# -- CIFAR-10: binary version ----------------------------------------------------------------------

_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_IMAGES = 10_000
"""In each file, as published."""


def _load_cifar10(data_dir: Path) -> Dataset:
    folder = _find_folder(data_dir, ("cifar-10-batches-bin", "cifar10"))
    paths = [folder / f"data_batch_{i}.bin" for i in range(1, 6)] + [folder / "test_batch.bin"]
    _check_complete(folder, paths, "of CIFAR-10's binary version")
    sizes = {path.name: path.stat().st_size for path in paths}
    if len({sizes[path.name] for path in paths[:5]}) != 1:
        raise UserError(f"{folder}: expected five training files of one size, got {sizes} bytes")
    parts = [_read_cifar(path) for path in paths]
    counts = {path.name: len(labels) for path, (_, labels) in zip(paths, parts, strict=True)}
    if len(set(counts.values())) != 1:
        raise UserError(
            f"{folder}: expected six files of as many images, {_CIFAR_IMAGES} as published, got "
            f"{counts}"
        )
    first: dict[int, str] = {}
    for path, (images, _) in zip(paths, parts, strict=True):
        other = first.setdefault(zlib.crc32(images.data), path.name)
        if other != path.name:
            raise UserError(f"{folder}: {other} and {path.name} hold the same images")
    images = np.concatenate([part[0] for part in parts[:5]])
    labels = np.concatenate([part[1] for part in parts[:5]])
    each = len(parts[5][0])
    note = "" if each == _CIFAR_IMAGES else f"{each} images of the {_CIFAR_IMAGES} in each file"
    return Dataset(
        "cifar10", images, labels, *parts[5], 10,
        (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), crop_padding=4, flip=True, note=note,
        class_names=CIFAR_CLASSES,
    )  # fmt: skip


def _read_cifar(path: Path) -> tuple[Images, Labels]:
    size = path.stat().st_size
    if size == 0 or size % _CIFAR_RECORD:
        raise UserError(
            f"{path} is truncated or of another kind: expected a multiple of {_CIFAR_RECORD} "
            f"bytes (30730000 as published), got {size}"
        )
    check_memory(2 * size, str(path))
    records = np.fromfile(path, np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].astype(np.int32)
    check_labels(labels, 10, path)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


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


_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "fashion_mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}
