"""VGG-small, the CIFAR network of the binary-network literature and of AdderNet."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family, end_family, get_family
from jadder.models.images import check_images, flatten, image_shape, max_pool
from jadder.models.normalization import BatchNormName, get_batch_norm, rectified


class VGGSmall(nnx.Module):
    """Six 3 x 3 convolutions in three stages, each stage ending in a 2 x 2 max pool, and one
    linear layer: 128 - 128 - M - 256 - 256 - M - 512 - 512 - M - num_classes.

    Batch normalisation follows every product, the last one included, as in AdderNet's ResNets;
    ReLU follows every normalisation but the last.

    Args:
      num_classes: size of the logits.
      image_size: int or (height, width), at least 8.
      channels: channels of the images.
      widths: features of the three stages.
      family: of the products.
      multiply_ends: whether the first and last product multiply whatever the family, as published.
      norm: after each product of the family: 'batch' as published, or 'centered_batch', which takes
        each position's mean over the features away before (``BatchNorm``'s ``center_features``).
      dtype: of the computation; None: that of the parameters and images, promoted.
      param_dtype: of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown family or norm, or images too small to be pooled three times.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = VGGSmall(image_size=8, widths=(4, 4, 4), family="conv", rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        image_size: int | tuple[int, int] = 32,
        channels: int = 3,
        widths: tuple[int, int, int] = (128, 256, 512),
        family: str | Family = "adder",
        multiply_ends: bool = True,
        norm: BatchNormName = "batch",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.image_shape = image_shape(image_size)
        self.channels = channels
        if min(self.image_shape) < 8:
            raise ValueError(f"VGGSmall needs images of at least 8 x 8, got {self.image_shape}")
        height, width = (side // 8 for side in self.image_shape)

        layers = get_family(family)
        ends = end_family(layers, multiply_ends=multiply_ends)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        normalize = functools.partial(get_batch_norm(norm), **types)
        normalize_end = functools.partial(
            get_batch_norm("batch" if multiply_ends else norm), **types
        )
        features = [stage_width for stage_width in widths for _ in range(2)]
        convs = [ends.conv(channels, features[0], (3, 3), padding=1, **types)]
        for n_in, n_out in itertools.pairwise(features):
            convs.append(layers.conv(n_in, n_out, (3, 3), padding=1, **types))
        self.conv = nnx.List(convs)
        self.bn = nnx.List([normalize_end(features[0]), *map(normalize, features[1:])])
        self.fc = ends.linear(height * width * features[-1], num_classes, **types)
        self.fc_bn = normalize_end(num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating.
        """
        check_images(images, self.channels, self.image_shape)
        x = images
        for index, (conv, bn) in enumerate(zip(self.conv, self.bn, strict=True)):
            x = rectified(bn, conv(x))
            if index % 2 == 1:
                x = max_pool(x, 2)
        return self.fc_bn(self.fc(flatten(x)))
