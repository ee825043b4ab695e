"""Models by name, and what one is made of: plain values, from which it can be made again."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jadder.models.family import FAMILIES, Family, get_family
from jadder.models.images import image_shape
from jadder.models.lenet import LeNet5
from jadder.models.resnet import resnet8, resnet18, resnet20, resnet32, resnet34, resnet50
from jadder.models.swin import Swin
from jadder.models.vgg import VGGSmall
from jadder.models.vit import AdderViT
from jadder.products import MixedProduct, adder_products
from jadder.rules import GradientRule

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
"""Constructors by name: ``(num_classes, *, channels, family, multiply_ends, rngs, ...)``."""

_DTYPES = ("dtype", "param_dtype")
_OWN_MODES = ("use_running_average", "deterministic")
"""What ``train()`` and ``eval()`` set."""

Plain = str | int | float | bool | None | tuple["Plain", ...]
"""What options are made of: JSON has all of it, and it can be hashed."""


def names() -> tuple[str, ...]:
    """The names that ``create`` knows.

    Example:
      >>> [name for name in names() if not name.startswith("resnet")]
      ['lenet5', 'swin', 'vgg_small', 'vit']
    """
    return tuple(sorted(MODELS))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a model of `create` was made of; the model has it as its attribute ``architecture``.

    Attributes:
      model: one of ``names()``.
      family: name of its family of layers.
      num_classes: size of the logits.
      image_size: (height, width) that it was made for; None: a ResNet that was told none.
      channels: channels of the images.
      options: further arguments of its constructor, in order of their names.
      rule: gradient rule of its adder products; None: each class's own.
    """

    model: str
    family: str
    num_classes: int
    image_size: tuple[int, int] | None
    channels: int
    options: tuple[tuple[str, Plain], ...] = ()
    rule: GradientRule | None = None


def build(architecture: Architecture, rngs: nnx.Rngs, family: Family | None = None) -> Any:
    """The model of an architecture.

    Args:
      architecture: what it is made of.
      rngs: source of the initial parameters.
      family: the family of that name as the caller has it; None: as the package has it.

    Raises:
      ValueError: an unknown name or family, or an image size that the model cannot take.
      TypeError: an option that the model does not have.
    """
    if architecture.model not in MODELS:
        raise ValueError(
            f"unknown model {architecture.model!r}; the models are {', '.join(names())}"
        )
    if family is None:
        family = dataclasses.replace(get_family(architecture.family), rule=architecture.rule)
    options: dict[str, Any] = dict(architecture.options)
    options |= {name: jnp.dtype(options[name]) for name in _DTYPES if options.get(name) is not None}
    if architecture.model in _FOR_ONE_IMAGE_SIZE:
        options["image_size"] = architecture.image_size
    model: Any = MODELS[architecture.model](
        architecture.num_classes,
        channels=architecture.channels,
        family=family,
        rngs=rngs,
        **options,
    )
    known = FAMILIES.get(family.name)
    by_name = known == dataclasses.replace(family, rule=None, implementation=None)
    if by_name and _is_plain(tuple(dict(architecture.options).values())):
        model.architecture = architecture
    return model


def architecture_of(model: nnx.Module) -> Architecture:
    """What a model was made of, if it still is what ``create`` made.

    Parameters may have any values, and implementations of the products may have changed.

    Raises:
      ValueError: another model, or one that was changed; the first difference.
    """
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        raise ValueError(
            f"a model of jadder.models.create, of a family by name, expected; got a "
            f"{type(model).__name__} that does not say what it was made of"
        )
    made = abstract(architecture)
    expected, found = list(_structure(made)), list(_structure(model))
    for wanted, got in zip(expected, found, strict=False):
        if wanted != got:
            raise ValueError(f"the model has changed since it was created: {got}, not {wanted}")
    if len(expected) != len(found):
        raise ValueError(
            f"the model has changed since it was created: {len(found)} layers, variables and "
            f"options, not {len(expected)}"
        )
    return architecture


def abstract(architecture: Architecture) -> Any:
    """The model of an architecture with shapes in place of values.

    Raises:
      ValueError, TypeError: as `build`.
    """
    return nnx.eval_shape(lambda: build(architecture, nnx.Rngs(0)))


def make_architecture(
    model: str,
    family: Family,
    num_classes: int,
    image_size: int | tuple[int, int] | None,
    channels: int,
    options: Mapping[str, Any],
) -> Architecture:
    """The architecture of these arguments of ``create``, each dtype by its name."""
    if image_size is None and model in _FOR_ONE_IMAGE_SIZE:
        image_size = 32
    plain = {
        name: jnp.dtype(value).name if name in _DTYPES and value is not None else _plain(value)
        for name, value in options.items()
    }
    return Architecture(
        model,
        family.name,
        num_classes,
        None if image_size is None else image_shape(image_size),
        channels,
        tuple(sorted(plain.items())),
        family.rule,
    )


def _plain(value: Any) -> Any:
    """Lists as tuples, and NumPy's scalars as Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _structure(model: nnx.Module) -> Iterator[str]:
    """A line for each module, variable and adder product of a model, in order."""
    for path, node in nnx.iter_graph(model):
        where = ".".join(map(str, path)) or "the model"
        if isinstance(node, nnx.Variable):
            value = node.get_value()
            yield f"{where} is {type(node).__name__} {value.shape} {value.dtype}"
        elif isinstance(node, nnx.Module):
            options = {
                name: value
                for name, value in sorted(vars(node).items())
                if name not in _OWN_MODES and _is_plain(value)
            }
            yield f"{where} is {type(node).__name__} {options}"
    for place in adder_products(model):
        share = f" at {place.product.l1_share:g}" if isinstance(place.product, MixedProduct) else ""
        adder = place.product.adder if isinstance(place.product, MixedProduct) else place.product
        where = ".".join(map(str, (*place.path, place.attribute)))
        yield f"{where} has {adder.rule}{share}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
