"""What every model does with its images and feature maps."""

import jax.numpy as jnp
from flax import nnx
from jax import Array


def image_shape(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of ``image_size``, where an int means a square.

    Raises:
      ValueError: a size that is not one or two positive ints.
    """
    shape = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(shape) != 2 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"image_size must be a positive int or a pair of them, got {image_size!r}")
    return shape


def check_images(images: Array, channels: int, shape: tuple[int, int] | None = None) -> None:
    """Checks a batch of images against what a model was built for.

    Raises:
      ValueError: ``images`` is not (batch, height, width, channels), or its height and width are
        not ``shape``, where one is given.
      TypeError: ``images`` is not of a floating dtype.
    """
    height, width = shape or ("height", "width")
    expected = f"(batch, {height}, {width}, {channels})"
    wrong_size = shape is not None and images.shape[1:3] != shape
    if images.ndim != 4 or images.shape[-1] != channels or wrong_size:
        raise ValueError(f"expected images of shape {expected}, got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"expected images of a floating dtype, scaled, got {images.dtype}")


def flatten(x: Array) -> Array:
    """(batch, height, width, channels) to (batch, features), channel by channel.

    That is PyTorch's order, so that its kernels load without reordering.
    """
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


def max_pool(x: Array, window: int, *, padding: int = 0) -> Array:
    """The maximum of every ``window`` by ``window`` pixels with stride 2, padding left out."""
    pooled: Array = nnx.max_pool(
        x, (window, window), strides=(2, 2), padding=((padding, padding), (padding, padding))
    )
    return pooled
