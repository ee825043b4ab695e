"""LeNet-5-BN (LeCun et al., 1998; batch normalisation as AdderNet's experiments on MNIST)."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family, end_family, get_family
from jadder.models.images import check_images, flatten, image_shape, max_pool
from jadder.models.normalization import BatchNormName, get_batch_norm, rectified

_SMALLEST_FOR_VALID = 12


class LeNet5(nnx.Module):
    """LeNet-5 with max pooling, ReLU, and batch normalisation after every product.

    28 x 28 images pass through conv 5x5, 6 (SAME) - pool - conv 5x5, 16 (VALID) - pool - 400 -
    120 - 84 - num_classes: LeCun's network on 32 x 32 without the border of zeros. Where VALID
    would leave nothing to pool (a side below 12), the second convolution is SAME too, so that
    8 x 8 digits have their LeNet.

    Args:
      num_classes: size of the logits.
      image_size: int or (height, width), at least 4.
      channels: channels of the images.
      family: of the products.
      multiply_ends: whether the first and last product multiply whatever the family, as published.
      norm: after each product of the family: 'batch' as published, or 'centered_batch', which takes
        each position's mean over the features away before (``BatchNorm``'s ``center_features``).
      dtype: of the computation; None: that of the parameters and images, promoted.
      param_dtype: of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown family or norm, or images too small to be pooled twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = LeNet5(family="conv", rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        image_size: int | tuple[int, int] = 28,
        channels: int = 1,
        family: str | Family = "adder",
        multiply_ends: bool = True,
        norm: BatchNormName = "batch",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.image_shape = image_shape(image_size)
        self.channels = channels
        if min(self.image_shape) < 4:
            raise ValueError(f"LeNet5 needs images of at least 4 x 4, got {self.image_shape}")
        valid = min(self.image_shape) >= _SMALLEST_FOR_VALID
        height, width = ((side // 2 - (4 if valid else 0)) // 2 for side in self.image_shape)

        layers = get_family(family)
        ends = end_family(layers, multiply_ends=multiply_ends)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        normalize = functools.partial(get_batch_norm(norm), **types)
        normalize_end = functools.partial(
            get_batch_norm("batch" if multiply_ends else norm), **types
        )
        self.conv1 = ends.conv(channels, 6, (5, 5), padding="SAME", **types)
        self.bn1 = normalize_end(6)
        self.conv2 = layers.conv(6, 16, (5, 5), padding="VALID" if valid else "SAME", **types)
        self.bn2 = normalize(16)
        self.fc1 = layers.linear(height * width * 16, 120, **types)
        self.bn3 = normalize(120)
        self.fc2 = layers.linear(120, 84, **types)
        self.bn4 = normalize(84)
        self.fc3 = ends.linear(84, num_classes, **types)
        self.bn5 = normalize_end(num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating.
        """
        check_images(images, self.channels, self.image_shape)
        x = max_pool(rectified(self.bn1, self.conv1(images)), 2)
        x = max_pool(rectified(self.bn2, self.conv2(x)), 2)
        x = rectified(self.bn3, self.fc1(flatten(x)))
        x = rectified(self.bn4, self.fc2(x))
        return self.bn5(self.fc3(x))
