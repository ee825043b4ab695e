"""Image files as arrays: what Pillow reads, one way for training and for prediction."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import UserError, one_line
from experiments.common.files import read_bytes
from experiments.images.dataset import Images

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes without colour."""


def read_image(path: Path, channels: int) -> Images:
    """The pixels of a file, uint8 (H, W, channels), upright and over white where transparent.

    Args:
        path: of an image file of any format that Pillow reads; of an animation the first picture.
        channels: 1 for grey or 3 for colour, to which the image is converted.

    Raises:
        UserError: the file cannot be read, is no image, or is damaged.
    """
    content = read_bytes(path)
    try:
        image = _opened(content)
        image.load()
        return _pixels(image, channels)
    except Exception as error:  # Pillow's readers raise what they like on damaged files
        raise _unreadable(path, error) from None


def about_image(path: Path) -> tuple[tuple[int, int], bool]:
    """The (height, width) of an image file, upright, and whether it has colour; from its header.

    Raises:
        UserError: the file cannot be read or is no image.
    """
    if not path.is_file():
        raise UserError(f"{path} is no ordinary file")
    try:
        from PIL import ExifTags, Image

        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            colour = image.mode not in GREY and not (image.mode == "P" and _is_grey(image))
    except Exception as error:
        raise _unreadable(path, error) from None
    return ((width, height) if sideways else (height, width)), colour


def _opened(content: bytes) -> Any:
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(content)))


def _is_grey(image: Any) -> bool:
    palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _pixels(image: Any, channels: int) -> Images:
    from PIL import Image

    mode = {1: "L", 3: "RGB"}[channels]
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_of_16_bits(np.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    pixels = np.array(image.convert(mode))
    return pixels if channels == 3 else pixels[..., None]


def _of_16_bits(values: Any) -> Images:
    """Bytes of values from 0 to 65,535."""
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535 or values.dtype.kind == "f":
        raise ValueError(f"its values go from {low} to {high}, expected whole ones to 65535")
    scaled: Images = np.round(values / 257).astype(np.uint8)
    return scaled


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    said = str(error)
    if "cannot identify image file" in said:
        said = "it is no image file that Pillow knows"
    return UserError(f"{path} cannot be read: {one_line(said) or type(error).__name__}")
