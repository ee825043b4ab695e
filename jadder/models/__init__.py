"""Networks, each for every family of layers: adders, their multiplying twins, Euclid distances."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jadder.models.family import FAMILIES, Family, get_family
from jadder.models.lenet import LeNet5
from jadder.models.normalization import BatchNorm, LayerNorm
from jadder.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
)
from jadder.models.statistics import update_statistics
from jadder.models.swin import Swin
from jadder.models.torch_state import load_torch_state
from jadder.models.vgg import VGGSmall
from jadder.models.vit import AdderViT

__all__ = [
    "FAMILIES",
    "MODELS",
    "AdderViT",
    "BasicBlock",
    "BatchNorm",
    "Bottleneck",
    "Family",
    "LayerNorm",
    "LeNet5",
    "ResNet",
    "Swin",
    "VGGSmall",
    "create",
    "get_family",
    "load_torch_state",
    "names",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "update_statistics",
]

_FOR_ONE_IMAGE_SIZE: Mapping[str, Callable[..., nnx.Module]] = {
    "lenet5": LeNet5,
    "swin": Swin,
    "vgg_small": VGGSmall,
    "vit": AdderViT,
}
_FOR_ANY_IMAGE_SIZE: Mapping[str, Callable[..., nnx.Module]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet34": resnet34,
    "resnet50": resnet50,
}
MODELS: Mapping[str, Callable[..., nnx.Module]] = {**_FOR_ONE_IMAGE_SIZE, **_FOR_ANY_IMAGE_SIZE}
"""Constructors by name, each ``(num_classes, *, channels, family, multiply_ends, rngs, ...)``."""


def names() -> tuple[str, ...]:
    """The names that ``create`` knows.

    Example:
      >>> [name for name in names() if not name.startswith("resnet")]
      ['lenet5', 'swin', 'vgg_small', 'vit']
    """
    return tuple(sorted(MODELS))


def create(
    name: str,
    *,
    family: str | Family = "adder",
    num_classes: int = 10,
    image_size: int | tuple[int, int] = 32,
    channels: int = 3,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """The model of that name, for images (batch, height, width, channels).

    Args:
      name: one of ``names()``.
      family: of the products: 'adder', 'conv', 'euclid' or a ``Family``.
      num_classes: size of the logits.
      image_size: int or (height, width); the ResNets take any size, whatever is given here.
      channels: channels of the images.
      rngs: source of the initial parameters.
      **options: further keyword arguments of the model.

    Raises:
      ValueError: an unknown name or family, or an image size that the model cannot take.
      TypeError: an option that the model does not have.

    Example:
      >>> from flax import nnx
      >>> model = create("lenet5", image_size=28, channels=1, family="conv", rngs=nnx.Rngs(0))
      >>> type(model).__name__
      'LeNet5'
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(names())}")
    if name in _FOR_ONE_IMAGE_SIZE:
        options["image_size"] = image_size
    return MODELS[name](num_classes, channels=channels, family=family, rngs=rngs, **options)
