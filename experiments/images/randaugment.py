"""RandAugment (Cubuk et al., 2020), traced into the training step.

The fourteen operations, their order and their magnitudes in 31 steps are those of torchvision's
``RandAugment`` (torchvision/transforms/autoaugment.py) on PIL images, with its defaults: nearest
neighbours, black where nothing comes from. Pixels are those of Pillow's operations.

No library does this inside a JAX program. keras 3.15's ``RandAugment`` takes one choice of
operations for a whole batch and draws their strengths; dm-pix 0.4 and augmax 0.4 have neither it
nor posterize, sharpness, autocontrast and equalize. albumentations 2.0 lacks it, imgaug 0.4 uses
what NumPy 2 no longer has; both are for the host, as Pillow is.

Adder-ViT calls a ``RandAugment(2, 14)`` of its own, from a file that is not in its repository. The
file, class and call are named as in kentaroy47/vision-transformers-cifar10, which has sixteen
operations of other strengths: it translates by 100 / 30 pixels for each step of magnitude, which
at 14 leaves nothing of 32 x 32 pixels. Whether Adder-ViT's did is not known, and not done here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
MAGNITUDES = 31

_Table = np.ndarray[Any, Any]


def random_augment(
    key: jax.Array, images: jax.Array, num_ops: int = 2, magnitude: int = 14
) -> jax.Array:
    """Applies to each image operations drawn from `OPERATIONS`, one after the other.

    What happens to an image depends on the key, its place in the batch and itself only. Shears,
    translations, rotations and changes of brightness, color, contrast and sharpness go either way
    with probability 1/2.

    Args:
        key: random key.
        images: uint8 (N, H, W, C), C 1 or 3.
        num_ops: operations for each image.
        magnitude: their strength, from 0 to 30.

    Returns:
        uint8 (N, H, W, C).

    Raises:
        ValueError: another shape, or numbers out of range.
        TypeError: images that are not uint8.
    """
    if num_ops < 0:
        raise ValueError(f"num_ops must be zero or more, got {num_ops}")

    def draw(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        which, way = jax.random.split(jax.random.fold_in(key, index))
        operations = jax.random.randint(which, (num_ops,), 0, len(OPERATIONS), jnp.int32)
        return operations, jax.random.randint(way, (num_ops,), 0, 2, jnp.int32)

    operations, negative = jax.vmap(draw)(jnp.arange(len(images), dtype=jnp.uint32))
    for number in range(num_ops):
        images = apply_operations(images, operations[:, number], negative[:, number], magnitude)
    return images


def apply_operations(
    images: jax.Array, operations: jax.Array, negative: jax.Array, magnitude: int
) -> jax.Array:
    """Applies one operation to each image.

    Args:
        images: uint8 (N, H, W, C), C 1 or 3.
        operations: (N,), places in `OPERATIONS`.
        negative: (N,), 0 or 1: whether an operation that can go either way goes the other.
        magnitude: of all operations, from 0 to 30.

    Raises:
        ValueError, TypeError: as `random_augment`.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"expected images (N, H, W, 1 or 3), got {images.shape}")
    if images.dtype != jnp.uint8:
        raise TypeError(f"expected images of dtype uint8, got {images.dtype}")
    if not 0 <= magnitude < MAGNITUDES:
        raise ValueError(f"magnitude must be from 0 to {MAGNITUDES - 1}, got {magnitude}")
    tables = _make_tables(magnitude, *images.shape[1:3])

    def apply(image: jax.Array, operation: jax.Array, negative: jax.Array) -> jax.Array:
        row = 2 * operation + negative
        image = _move(image, jnp.asarray(tables.sources)[row])
        image = _map_levels(image, operation, jnp.asarray(tables.levels)[row])
        return _blend(image, operation, jnp.asarray(tables.factors)[row])

    return jax.vmap(apply)(images, operations, negative)


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What operations do whatever the image; row 2 · operation + negative.

    An operation is a move of pixels, then a map of levels, then a blend, of which all but one do
    nothing.
    """

    sources: _Table  # int32 (rows, H · W): from which pixel each one comes; H · W: from none
    levels: _Table  # uint8 (rows, 256): what becomes of each level
    factors: _Table  # float32 (rows,): how much of the image there is in a blend


def _make_tables(magnitude: int, height: int, width: int) -> _Tables:
    strength = magnitude / (MAGNITUDES - 1)
    level = np.arange(256)
    sources, levels, factors = [], [], []
    for name in OPERATIONS:
        for sign in (1, -1):
            matrix = _matrix(name, sign * strength, height, width)
            sources.append(_sources(matrix, height, width))
            factor = np.float32(1 + sign * 0.9 * strength)
            factors.append(factor if name in ("Color", "Contrast", "Sharpness") else 1)
            mapped = level
            if name == "Brightness":
                mapped = np.clip(factor * level.astype(np.float32), 0, 255)
            elif name == "Posterize":
                mapped = level & -(2 ** round(4 * strength))
            elif name == "Solarize":
                mapped = np.where(level < 255 * (1 - strength), level, 255 - level)
            levels.append(mapped)
    return _Tables(
        np.array(sources, np.int32), np.array(levels).astype(np.uint8), np.array(factors, "float32")
    )


def _matrix(name: str, strength: float, height: int, width: int) -> Sequence[float]:
    """(a, b, c, d, e, f): the place (x, y) takes what was at (ax + by + c, dx + ey + f)."""
    shear, shift = 0.3 * strength, 150 / 331 * strength
    if name == "ShearX":
        return (1, shear, 0, 0, 1, 0)
    if name == "ShearY":
        return (1, 0, 0, shear, 1, 0)
    if name == "TranslateX":
        return (1, 0, -int(shift * width), 0, 1, 0)
    if name == "TranslateY":
        return (1, 0, 0, 0, 1, -int(shift * height))
    if name == "Rotate":
        cos, sin = (round(f(math.radians(-30 * strength)), 15) for f in (math.cos, math.sin))
        x, y = width / 2, height / 2
        return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    return (1, 0, 0, 0, 1, 0)


def _sources(matrix: Sequence[float], height: int, width: int) -> _Table:
    """From which pixel each one comes, in the fixed-point arithmetic of Pillow."""
    a, b, c, d, e, f = matrix
    columns, rows = np.arange(width), np.arange(height)[:, None]

    def place(x: float, y: float, origin: float) -> _Table:
        start, by_x, by_y = (
            math.floor(65536 * v + 0.5) for v in (origin + x * 0.5 + y * 0.5, x, y)
        )
        return (start + by_x * columns + by_y * rows) >> 16

    column, row = place(a, b, c), place(d, e, f)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return np.where(inside, row * width + column, height * width).reshape(-1)


def _move(image: jax.Array, sources: jax.Array) -> jax.Array:
    pixels = image.reshape(-1, image.shape[-1])
    pixels = jnp.concatenate([pixels, jnp.zeros_like(pixels[:1])])
    return pixels[sources].reshape(image.shape)


def _map_levels(image: jax.Array, operation: jax.Array, levels: jax.Array) -> jax.Array:
    """Maps levels by a table, which AutoContrast and Equalize make from the image's channels."""

    def channel(x: jax.Array) -> jax.Array:
        table = jnp.where(operation == OPERATIONS.index("AutoContrast"), _stretch(x), levels)
        table = jnp.where(operation == OPERATIONS.index("Equalize"), _equalize(x), table)
        return table[x]

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)


def _stretch(x: jax.Array) -> jax.Array:
    """The table that takes the darkest level of x (H, W) to 0 and the lightest to 255."""
    level, low, high = jnp.arange(256), x.min().astype(jnp.int32), x.max().astype(jnp.int32)
    stretched = jnp.clip((level - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, level).astype(jnp.uint8)


def _equalize(x: jax.Array) -> jax.Array:
    """The table that makes all levels of x (H, W) about as frequent."""
    counts = jnp.zeros(256, jnp.int32).at[x.reshape(-1)].add(1)
    step = (x.size - jnp.sum(x == x.max())) // 255
    below = jnp.cumsum(counts) - counts
    equal = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, equal, jnp.arange(256)).astype(jnp.uint8)


def _blend(image: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
    """Factor times the image and the rest of a grey, an even or a smooth one, rounded down."""
    x = image.astype(jnp.int32)
    grey = x
    if x.shape[-1] == 3:
        grey = (x @ jnp.array([19595, 38470, 7471]) + 0x8000)[..., None] >> 16
    even = (2 * grey[..., 0].sum() + grey[..., 0].size) // (2 * grey[..., 0].size)
    other = jnp.where(operation == OPERATIONS.index("Contrast"), even, grey)
    other = jnp.where(operation == OPERATIONS.index("Sharpness"), _smooth(x), other)
    blended = other + factor * (x - other).astype(jnp.float32)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def _smooth(x: jax.Array) -> jax.Array:
    """The rounded mean of 3 x 3 pixels, the middle one five times; the border stays."""
    high, wide = (max(side - 2, 0) for side in x.shape[:2])
    around = sum(x[i : i + high, j : j + wide] for i in range(3) for j in range(3))
    inner = (2 * (around + 4 * x[1 : 1 + high, 1 : 1 + wide]) + 13) // 26
    return x.at[1 : 1 + high, 1 : 1 + wide].set(inner)
