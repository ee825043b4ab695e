"""experiments.images.augment: what crops and flips may do to an image, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.images.augment import normalize, random_crop, random_flip

# Few shapes, for each compiles anew.
SHAPES = st.sampled_from([(3, 6, 5, 3), (1, 1, 4, 1), (4, 2, 1, 2)])
few = settings(max_examples=20, deadline=None)


def images_of(shape: tuple[int, ...], seed: int) -> jax.Array:
    # No zeros: what padding brings in can be told from the image.
    return jnp.asarray(np.random.default_rng(seed).integers(1, 256, shape), jnp.uint8)


@few
@given(SHAPES, st.sampled_from([0, 1, 3]), st.integers(0, 2**31))
def test_crop_is_a_window_of_the_padded_image(
    shape: tuple[int, ...], padding: int, seed: int
) -> None:
    images = images_of(shape, seed)
    cropped = random_crop(jax.random.key(seed), images, padding)
    assert cropped.shape == images.shape
    assert cropped.dtype == images.dtype
    _, height, width, _ = shape
    for image, crop in zip(np.asarray(images), np.asarray(cropped), strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        places = range(2 * padding + 1)
        assert any(
            np.array_equal(padded[i : i + height, j : j + width], crop)
            for i in places
            for j in places
        )


def test_crop_reaches_every_place() -> None:
    image = np.zeros((3, 3), np.uint8)
    image[1, 1] = 9
    images = jnp.broadcast_to(jnp.asarray(image)[None, ..., None], (400, 3, 3, 1))
    cropped = np.asarray(random_crop(jax.random.key(0), images, 1))[..., 0]
    places = {tuple(np.argwhere(crop)[0]) for crop in cropped}
    assert places == {(i, j) for i in range(3) for j in range(3)}


@few
@given(SHAPES, st.integers(0, 2**31))
def test_flip_mirrors_or_leaves(shape: tuple[int, ...], seed: int) -> None:
    images = images_of(shape, seed)
    flipped = random_flip(jax.random.key(seed), images)
    assert flipped.shape == images.shape
    assert flipped.dtype == images.dtype
    for image, flip in zip(np.asarray(images), np.asarray(flipped), strict=True):
        assert np.array_equal(flip, image) or np.array_equal(flip, image[:, ::-1])


def test_half_of_the_images_are_flipped() -> None:
    images = jnp.broadcast_to(jnp.asarray([[1], [2]], jnp.uint8)[None], (1000, 1, 2, 1))
    flipped = np.asarray(random_flip(jax.random.key(1), images))
    assert 400 < np.sum(flipped[:, 0, 0, 0] == 2) < 600


@few
@given(st.integers(0, 2**31))
def test_one_key_gives_one_result(seed: int) -> None:
    images, key = images_of((4, 5, 5, 2), seed), jax.random.key(seed)
    for function in (lambda k: random_crop(k, images, 2), lambda k: random_flip(k, images)):
        np.testing.assert_array_equal(function(key), function(key))


def test_normalize() -> None:
    images = jnp.asarray([[[[0, 255]]]], jnp.uint8)
    result = normalize(images, jnp.asarray([0.5, 0.25]), jnp.asarray([0.5, 0.25]))
    np.testing.assert_allclose(result, [[[[-1, 3]]]])
    assert result.dtype == jnp.float32
