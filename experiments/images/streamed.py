"""Images that are read and decoded when they are asked for, where all of them are too many."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

Read = Callable[[Sequence[int]], Sequence[NDArray[np.uint8]]]


class StreamedImages:
    """Images in a source with random access, indexed as one array uint8 (N, H, W, C) is.

    An array of indices gives an array of images, decoded by as many threads as there are cores. A
    slice gives the streamed images of that part. JAX runs a step while Python prepares the next
    one's batch, so that reading costs time only where it is the slower of the two.

    Args:
        read: the images, of shape (H, W, C) each, that indices stand for. Called by several
            threads at a time.
        indices: which of the source's images these are, in their order.
        shape: (H, W, C).

    Example:
        >>> pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
        >>> images = StreamedImages(lambda indices: pixels[indices], range(5), (1, 1, 1))
        >>> images[1:].shape, images[1:][np.array([3, 0])].ravel().tolist()
        ((4, 1, 1, 1), [4, 1])
    """

    def __init__(self, read: Read, indices: Sequence[int], shape: tuple[int, int, int]):
        self._read, self._indices = read, indices
        self.shape = (len(indices), *shape)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StreamedImages(self._read, self._indices[index], self.shape[1:])
        wanted = [self._indices[int(i)] for i in index]
        images = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        if not wanted:
            return images
        threads = min(os.cpu_count() or 1, len(wanted))
        parts = np.array_split(np.arange(len(wanted)), threads)

        def fill(part: NDArray[Any]) -> None:
            for i, image in zip(part, self._read([wanted[i] for i in part]), strict=True):
                images[i] = image

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, parts))
        return images
