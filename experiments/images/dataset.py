"""What a data set of images is, and what is done to all of them alike."""

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.common.environment import check_memory
from experiments.common.errors import UserError
from experiments.images.resize import fit
from experiments.images.streamed import StreamedImages

Images = NDArray[np.uint8]
Labels = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images with their labels.

    Attributes:
        name: the data set's name.
        train_images, test_images: uint8 (N, H, W, C), in memory or read when they are asked for.
        train_labels, test_labels: int32 (N,), from 0 to num_classes - 1.
        num_classes: number of classes.
        mean, std: of each channel, on the scale on which 255 is 1.
        crop_padding: by how many pixels augmentation may shift a training image.
        flip: whether augmentation may mirror a training image.
        note: what a reader of the results should know.
        class_names: of the classes, in the order of their numbers.
    """

    name: str
    train_images: Images | StreamedImages
    train_labels: Labels
    test_images: Images | StreamedImages
    test_labels: Labels
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    note: str = ""
    class_names: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A checksum of all labels and all images in memory, to tell this data from other data."""
        crc = 0
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            if isinstance(array, StreamedImages):
                continue
            crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, crc)
        shape = "x".join(str(n) for n in self.train_images.shape)
        return f"{self.name}-{shape}-{crc:08x}"


def check_labels(labels: NDArray[Any], classes: int, where: Path) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"{where} has labels from {low} to {high}, expected 0 to {classes - 1}")


def moments(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from exact counts of the 256 values."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        weights = _counts(images[..., channel]) / images[..., 0].size
        mean = float(weights @ values)
        means.append(mean)
        stds.append(max(math.sqrt(float(weights @ (values - mean) ** 2)), 1 / 255))
    return tuple(means), tuple(stds)


def _counts(values: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each of the 256 values occurs; some images at a time, as bincount widens them."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(values), 1024):
        counts += np.bincount(values[start : start + 1024].ravel(), minlength=256)
    return counts


def resize(images: Images, size: int) -> Images:
    """Each as `fit` makes it a square."""
    if images.shape[1:3] == (size, size):
        return images
    resized = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        resized[i] = fit(image, size, size)
    return resized


def some(images: Images | StreamedImages, count: int = 2048) -> Images:
    """All images in memory, or some, evenly spaced."""
    if not isinstance(images, StreamedImages):
        return images
    chosen: Images = images[np.unique(np.linspace(0, len(images) - 1, count).astype(int))]
    return chosen


def resized(dataset: Dataset, size: int) -> Dataset:
    """The same images, which are in memory, with sides of `size`."""
    train, test = dataset.train_images, dataset.test_images
    if isinstance(train, StreamedImages) or isinstance(test, StreamedImages):
        raise TypeError("streamed images are resized when they are read")
    if train.shape[1:3] == test.shape[1:3] == (size, size):
        return dataset
    count = len(train) + len(test)
    check_memory(count * size**2 * train.shape[-1], f"{count} images of --image-size {size}")
    train, test = resize(train, size), resize(test, size)
    mean, std = moments(train)
    return dataclasses.replace(dataset, train_images=train, test_images=test, mean=mean, std=std)
