"""One image in another size: as a whole, or a part of it chosen at random."""

import math

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

ASPECTS = (3 / 4, 4 / 3)
"""Width over height of a random part, as in Szegedy et al., 2014."""
ATTEMPTS = 10


def fit(image: Image, height: int, width: int) -> Image:
    """An image (H, W, C) of that size: bilinear until it covers it, then the middle."""
    has_height, has_width, _ = image.shape
    if (has_height, has_width) == (height, width):
        return image
    scale = max(height / has_height, width / has_width)
    new = (max(height, round(has_height * scale)), max(width, round(has_width * scale)))
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return _resample(image, *new)[top : top + height, left : left + width]


def random_resized_crop(
    image: Image, height: int, width: int, smallest: float, rng: np.random.Generator
) -> Image:
    """A part of an image (H, W, C), resized: Szegedy et al.'s augmentation of large images.

    Args:
        image: as it was read.
        height, width: of the result.
        smallest: share of the image's area that a part has at least. Its share is uniform from
            there to 1, the logarithm of its aspect uniform between those of 3:4 and 4:3.
        rng: what chooses.

    Returns:
        (height, width, C). Where no such part fits into the image in ten attempts, the largest
        one in the middle whose aspect is within these limits.
    """
    has_height, has_width, _ = image.shape
    low, high = ASPECTS
    for _ in range(ATTEMPTS):
        area = has_height * has_width * rng.uniform(smallest, 1)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        part_width, part_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if part_width <= has_width and part_height <= has_height:
            left = rng.uniform(0, has_width - part_width)
            top = rng.uniform(0, has_height - part_height)
            break
    else:
        part_width = min(has_width, has_height * high)
        part_height = min(has_height, has_width / low)
        left, top = (has_width - part_width) / 2, (has_height - part_height) / 2
    box = (left, top, min(left + part_width, has_width), min(top + part_height, has_height))
    return _resample(image, height, width, box)


def _resample(
    image: Image, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> Image:
    """The image, or a box (left, top, right, bottom) of it, in that size; channel by channel."""
    from PIL import Image as Pillow

    resized = np.empty((height, width, image.shape[2]), np.uint8)
    for channel in range(image.shape[2]):
        plane = Pillow.fromarray(np.ascontiguousarray(image[..., channel]))
        resized[..., channel] = np.asarray(
            plane.resize((width, height), Pillow.Resampling.BILINEAR, box)
        )
    return resized
