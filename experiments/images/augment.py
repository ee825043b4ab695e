"""Random crops, flips and normalisation, traced into the training step."""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Shifts each image by up to `padding` pixels; zeros come in at the edges.

    Args:
        key: random key.
        images: (N, H, W, C), any dtype.
        padding: zeros added on each side before a window of (H, W) is cut out.

    Returns:
        (N, H, W, C) of the same dtype; window n starts at a place drawn uniformly from the
        (2 * padding + 1)^2 that there are.
    """
    if padding == 0:
        return images
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * padding + 1)

    def window(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(window)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2; images (N, H, W, C)."""
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """uint8 (N, H, W, C) to (images / 255 - mean) / std in the dtype of mean and std (C,)."""
    return (images.astype(mean.dtype) / 255.0 - mean) / std
