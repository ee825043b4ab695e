"""ResNets for CIFAR (He et al., 2015; 8, 20 and 32 layers) and ImageNet (18, 34 and 50 layers).

The layout, down to the attributes' names, is that of the AdderNet repository: the stem and the
classifier multiply, every other product is the family's, the 1 x 1 shortcuts included, and batch
normalisation follows every product, also the classifier.
"""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family, end_family, get_family
from jadder.models.images import check_images, max_pool
from jadder.models.normalization import BatchNormName, get_batch_norm, rectified


def _shortcut(
    in_features: int,
    out_features: int,
    strides: int,
    family: Family,
    norm: BatchNormName,
    **types: Any,
) -> nnx.List[Any] | None:
    """A 1 x 1 product with its normalisation, or None where the identity fits."""
    if strides == 1 and in_features == out_features:
        return None
    product = family.conv(in_features, out_features, (1, 1), strides, padding=0, **types)
    return nnx.List([product, get_batch_norm(norm)(out_features, **types)])


def _through(layers: nnx.List[Any] | None, x: Array) -> Array:
    for layer in layers or ():
        x = layer(x)
    return x


class BasicBlock(nnx.Module):
    """Two 3 x 3 products; the first one strides.

    Args:
      in_features: channels of the input.
      features: channels of both products.
      strides: of the first product and of the shortcut.
      family: of all products.
      norm: after each of them, as in ``ResNet``.
      **types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.
    """

    expansion = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int,
        family: Family,
        norm: BatchNormName = "batch",
        **types: Any,
    ) -> None:
        normalize = functools.partial(get_batch_norm(norm), **types)
        self.conv1 = family.conv(in_features, features, (3, 3), strides, padding=1, **types)
        self.bn1 = normalize(features)
        self.conv2 = family.conv(features, features, (3, 3), padding=1, **types)
        self.bn2 = normalize(features)
        self.downsample = nnx.data(_shortcut(in_features, features, strides, family, norm, **types))

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, in_features) to (batch, height / strides, ..., features)."""
        y = rectified(self.bn1, self.conv1(x))
        return rectified(self.bn2, self.conv2(y), _through(self.downsample, x))


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 products; the second one strides, the last has 4 times the features.

    Args:
      in_features: channels of the input.
      features: channels of the first two products.
      strides: of the second product and of the shortcut.
      family: of all products.
      norm: after each of them, as in ``ResNet``.
      **types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.
    """

    expansion = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int,
        family: Family,
        norm: BatchNormName = "batch",
        **types: Any,
    ) -> None:
        normalize = functools.partial(get_batch_norm(norm), **types)
        out_features = self.expansion * features
        self.conv1 = family.conv(in_features, features, (1, 1), padding=0, **types)
        self.bn1 = normalize(features)
        self.conv2 = family.conv(features, features, (3, 3), strides, padding=1, **types)
        self.bn2 = normalize(features)
        self.conv3 = family.conv(features, out_features, (1, 1), padding=0, **types)
        self.bn3 = normalize(out_features)
        self.downsample = nnx.data(
            _shortcut(in_features, out_features, strides, family, norm, **types)
        )

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, in_features) to (batch, height / strides, ..., 4 · features)."""
        y = rectified(self.bn1, self.conv1(x))
        y = rectified(self.bn2, self.conv2(y))
        return rectified(self.bn3, self.conv3(y), _through(self.downsample, x))


class ResNet(nnx.Module):
    """A residual network of any depth; ``resnet20`` and the others are the published ones.

    Args:
      stage_sizes: blocks of each stage. Stage i has ``2**i · width`` features (times the block's
        expansion), and every stage but the first halves height and width.
      block: ``BasicBlock`` or ``Bottleneck``.
      num_classes: size of the logits.
      stem: 'cifar' is a 3 x 3 product, 'imagenet' a 7 x 7 one with stride 2 and a 3 x 3 max pool
        with stride 2.
      width: features of the stem and of the first stage.
      channels: channels of the images, whose height and width are free.
      family: of the products.
      multiply_ends: whether the stem and the classifier multiply whatever the family, as published.
      norm: after each product of the family: 'batch' as published, or 'centered_batch', which takes
        each position's mean over the features away before (``BatchNorm``'s ``center_features``).
      head_bias: whether the classifier has a bias, before the normalisation.
      dtype: of the computation; None: that of the parameters and images, promoted.
      param_dtype: of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown family, stem or norm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = ResNet((1,), BasicBlock, width=4, family="conv", rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        stage_sizes: tuple[int, ...],
        block: type[BasicBlock] | type[Bottleneck],
        num_classes: int = 10,
        *,
        stem: Literal["cifar", "imagenet"] = "cifar",
        width: int = 16,
        channels: int = 3,
        family: str | Family = "adder",
        multiply_ends: bool = True,
        norm: BatchNormName = "batch",
        head_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        layers = get_family(family)
        ends = end_family(layers, multiply_ends=multiply_ends)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        normalize_end = functools.partial(
            get_batch_norm("batch" if multiply_ends else norm), **types
        )
        self.channels = channels
        self.stem = stem
        self.num_stages = len(stage_sizes)

        window, strides = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = ends.conv(
            channels, width, (window, window), strides, padding=window // 2, **types
        )
        self.bn1 = normalize_end(width)
        in_features = width
        for stage, size in enumerate(stage_sizes):
            features = width * 2**stage
            blocks = []
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_features, features, strides, layers, norm, **types))
                in_features = features * block.expansion
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = ends.linear(in_features, num_classes, use_bias=head_bias, **types)
        self.bn2 = normalize_end(num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
          ValueError: images of another rank or number of channels.
          TypeError: images that are not floating.
        """
        check_images(images, self.channels)
        x = rectified(self.bn1, self.conv1(images))
        if self.stem == "imagenet":
            x = max_pool(x, 3, padding=1)
        for stage in range(self.num_stages):
            x = _through(getattr(self, f"layer{stage + 1}"), x)
        return self.bn2(self.fc(x.mean((1, 2))))


def resnet8(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-8, MLPerf Tiny's network for CIFAR-10 (12.5 million multiplications for an image).

    Each of the three stages is one block. Like the other ResNets here, and unlike MLPerf Tiny's
    own, it has a normalisation after its shortcuts and its classifier, and no biases.
    ``options`` are the keyword arguments of ``ResNet``.
    """
    return ResNet((1, 1, 1), BasicBlock, num_classes, **options)


def resnet20(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-20 for CIFAR; ``options`` are the keyword arguments of ``ResNet``."""
    return ResNet((3, 3, 3), BasicBlock, num_classes, **options)


def resnet32(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-32 for CIFAR; ``options`` are the keyword arguments of ``ResNet``."""
    return ResNet((5, 5, 5), BasicBlock, num_classes, **options)


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18 for ImageNet; ``options`` are the keyword arguments of ``ResNet``."""
    return _imagenet_resnet((2, 2, 2, 2), BasicBlock, num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34 for ImageNet; ``options`` are the keyword arguments of ``ResNet``."""
    return _imagenet_resnet((3, 4, 6, 3), BasicBlock, num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50 for ImageNet; ``options`` are the keyword arguments of ``ResNet``."""
    return _imagenet_resnet((3, 4, 6, 3), Bottleneck, num_classes, **options)


def _imagenet_resnet(
    stage_sizes: tuple[int, ...],
    block: type[BasicBlock] | type[Bottleneck],
    num_classes: int,
    **options: Any,
) -> ResNet:
    published: dict[str, Any] = {"stem": "imagenet", "width": 64, "head_bias": True}
    return ResNet(stage_sizes, block, num_classes, **(published | options))
