"""Images that are read and decoded when they are asked for, where all of them are too many."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.images.resize import fit, random_resized_crop

Read = Callable[[Sequence[int]], Sequence[NDArray[np.uint8]]]


class Crops(NamedTuple):
    """Random parts of images: which ones, only the seed, the epoch and an image's number decide.

    Attributes:
        smallest: share of an image's area that a part has at least.
        seed, epoch: see above.
    """

    smallest: float
    seed: int
    epoch: int


class StreamedImages:
    """Images in a source with random access, indexed as one array uint8 (N, H, W, C) is.

    An array of indices gives an array of images, decoded by as many threads as there are cores. A
    slice gives the streamed images of that part. JAX runs a step while Python prepares the next
    one's batch, so that reading costs time only where it is the slower of the two.

    Args:
        read: the images, of any height and width, that indices stand for. Called by several
            threads at a time.
        indices: which of the source's images these are, in their order.
        shape: (H, W, C) of the images given.
        resize: whether images of another size are fitted into it; otherwise all must have it.
        crops: what parts of the images are given instead, resized.

    Example:
        >>> pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
        >>> images = StreamedImages(lambda indices: pixels[indices], range(5), (1, 1, 1))
        >>> images[1:].shape, images[1:][np.array([3, 0])].ravel().tolist()
        ((4, 1, 1, 1), [4, 1])
    """

    def __init__(
        self,
        read: Read,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        *,
        resize: bool = False,
        crops: Crops | None = None,
    ):
        self._read, self._indices = read, indices
        self._resize, self._crops = resize, crops
        self.shape = (len(indices), *shape)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._like(self._indices[index], self._crops)
        wanted = [self._indices[int(i)] for i in index]
        images = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        if not wanted:
            return images
        threads = min(os.cpu_count() or 1, len(wanted))
        parts = np.array_split(np.arange(len(wanted)), threads)

        def fill(part: NDArray[Any]) -> None:
            numbers = [wanted[i] for i in part]
            for i, number, image in zip(part, numbers, self._read(numbers), strict=True):
                images[i] = self._given(image, number)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, parts))
        return images

    def cropped(self, crops: Crops) -> "StreamedImages":
        """Random parts of the same images."""
        return self._like(self._indices, crops)

    def _like(self, indices: Sequence[int], crops: Crops | None) -> "StreamedImages":
        shape = self.shape[1:]
        return StreamedImages(self._read, indices, shape, resize=self._resize, crops=crops)

    def _given(self, image: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
        height, width = self.shape[1:3]
        if self._crops is not None:
            smallest, seed, epoch = self._crops
            rng = np.random.default_rng((seed, epoch, number))
            return random_resized_crop(image, height, width, smallest, rng)
        return fit(image, height, width) if self._resize else image


def cropped(images: NDArray[np.uint8] | StreamedImages, crops: Crops) -> StreamedImages:
    """Random parts of images, in memory or streamed."""
    if isinstance(images, StreamedImages):
        return images.cropped(crops)
    height, width, channels = images.shape[1:]
    shape = (height, width, channels)
    return StreamedImages(
        lambda indices: [images[index] for index in indices],
        range(len(images)),
        shape,
        crops=crops,
    )
