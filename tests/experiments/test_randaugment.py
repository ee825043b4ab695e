"""experiments.images.randaugment: Pillow's pixels, torchvision's magnitudes, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from experiments.images.randaugment import OPERATIONS, apply_operations, random_augment

few = settings(max_examples=15, deadline=None)
ALL = np.arange(2 * len(OPERATIONS))  # each operation, one way and the other

apply_jitted = jax.jit(apply_operations, static_argnums=3)
augment_jitted = jax.jit(random_augment, static_argnums=(2, 3))


def pillow(image: np.ndarray, name: str, magnitude: int, sign: int) -> np.ndarray:
    """The operation by Pillow, with the magnitudes of torchvision's tables."""

    def strength(highest: float) -> float:
        return sign * np.linspace(0, highest, 31)[magnitude]

    def affine(*matrix: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)

    picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    width, height = picture.size
    bits = 8 - int(np.round(np.arange(31) / (30 / 4))[magnitude])
    result = {
        "Identity": lambda: picture,
        "ShearX": lambda: affine(1, strength(0.3), 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, strength(0.3), 1, 0),
        "TranslateX": lambda: affine(1, 0, -int(strength(150 / 331 * width)), 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, -int(strength(150 / 331 * height))),
        "Rotate": lambda: picture.rotate(strength(30)),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(1 + strength(0.9)),
        "Color": lambda: ImageEnhance.Color(picture).enhance(1 + strength(0.9)),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(1 + strength(0.9)),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(1 + strength(0.9)),
        "Posterize": lambda: ImageOps.posterize(picture, bits),
        "Solarize": lambda: ImageOps.solarize(picture, np.linspace(255, 0, 31)[magnitude]),
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
    }[name]()
    return np.asarray(result).reshape(image.shape)


def image_of(shape: tuple[int, ...], seed: int, low: int, high: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.uint8)


def every_operation(image: np.ndarray, magnitude: int) -> np.ndarray:
    images = jnp.broadcast_to(image, (len(ALL), *image.shape))
    return np.asarray(apply_jitted(images, ALL // 2, ALL % 2, magnitude))


@pytest.mark.parametrize(
    ("magnitude", "shape"),
    [(14, (32, 32, 3)), (9, (9, 14, 3)), (30, (8, 8, 1)), (30, (9, 14, 3)), (0, (2, 1, 3))],
)
@few
@given(st.integers(0, 2**31), st.integers(0, 255), st.integers(0, 255))
def test_operations_are_pillows(
    magnitude: int, shape: tuple[int, ...], seed: int, low: int, high: int
) -> None:
    """Equal, but for the rounding of blends and of AutoContrast: there within one grey level."""
    image = image_of(shape, seed, min(low, high), max(low, high))
    results = every_operation(image, magnitude).astype(int)
    for number, result in zip(ALL, results, strict=True):
        name = OPERATIONS[number // 2]
        expected = pillow(image, name, magnitude, -1 if number % 2 else 1)
        apart = np.abs(result - expected)
        assert apart.max() <= (name in ("Color", "Contrast", "Sharpness", "AutoContrast")), name


def test_few_pixels_are_a_level_apart() -> None:
    image = image_of((64, 64, 3), 0, 0, 255)
    results = every_operation(image, 14)
    for number, result in zip(ALL, results, strict=True):
        expected = pillow(image, OPERATIONS[number // 2], 14, -1 if number % 2 else 1)
        assert np.mean(result != expected) < 1e-3, OPERATIONS[number // 2]


def test_each_operation_is_drawn_either_way() -> None:
    image = image_of((20, 20, 3), 0, 40, 200)
    outcomes = {outcome.tobytes() for outcome in every_operation(image, 14)}
    assert len(outcomes) == 9 * 2 + 5  # the last four and Identity have one way
    copies = jnp.broadcast_to(image, (600, *image.shape))
    drawn = np.asarray(augment_jitted(jax.random.key(0), copies, 1, 14))
    assert {result.tobytes() for result in drawn} == outcomes


def test_two_operations_are_applied_in_turn() -> None:
    image = image_of((20, 20, 3), 0, 40, 200)
    once = every_operation(image, 14)
    twice = {outcome.tobytes() for first in once for outcome in every_operation(first, 14)}
    copies = jnp.broadcast_to(image, (200, *image.shape))
    drawn = {
        result.tobytes() for result in np.asarray(augment_jitted(jax.random.key(0), copies, 2, 14))
    }
    assert drawn <= twice
    assert len(drawn) > 100


@few
@given(st.integers(0, 2**31), st.integers(0, 3))
def test_an_image_depends_on_the_key_its_place_and_itself(seed: int, place: int) -> None:
    key = jax.random.key(seed)
    images = image_of((4, 8, 8, 3), seed, 0, 255)
    others = np.where(np.arange(4)[:, None, None, None] == place, images, 255 - images)
    results = augment_jitted(key, images, 2, 14)
    assert results.shape == images.shape
    assert results.dtype == jnp.uint8
    np.testing.assert_array_equal(results, augment_jitted(key, images, 2, 14))
    np.testing.assert_array_equal(results[place], augment_jitted(key, others, 2, 14)[place])


def test_neither_the_batch_nor_the_width_of_floats_changes_an_image() -> None:
    key, images = jax.random.key(3), image_of((4, 8, 8, 3), 3, 0, 255)
    results = augment_jitted(key, images, 2, 14)
    np.testing.assert_array_equal(results[:2], augment_jitted(key, images[:2], 2, 14))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(results, augment_jitted(key, images, 2, 14))


def test_no_operations_leave_the_images() -> None:
    images = jnp.asarray(image_of((3, 4, 5, 1), 0, 0, 255))
    np.testing.assert_array_equal(random_augment(jax.random.key(0), images, num_ops=0), images)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (np.zeros((2, 4, 4, 2), np.uint8), {}, ValueError, r"got \(2, 4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.uint8), {}, ValueError, r"got \(4, 4, 3\)"),
        (np.zeros((2, 4, 4, 3), np.float32), {}, TypeError, "uint8, got float32"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"magnitude": 31}, ValueError, "0 to 30, got 31"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"num_ops": -1}, ValueError, "num_ops .* got -1"),
    ],
)
def test_bad_arguments(images, options, error, message) -> None:
    with pytest.raises(error, match=message):
        random_augment(jax.random.key(0), images, **options)
