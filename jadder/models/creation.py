"""Models by name, with initial parameters or pretrained ones."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jadder.models.family import Family, get_family
from jadder.models.files import load_as
from jadder.models.published import find
from jadder.models.registry import MODELS, build, make_architecture, names


def create(
    name: str,
    *,
    family: str | Family = "adder",
    pretrained: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> Any:
    """The model of that name, for images (batch, height, width, channels).

    Args:
      name: one of ``names()``.
      family: of the products: 'adder', 'conv', 'euclid' or a ``Family``.
      pretrained: the data that it was trained on, as `jadder.models.pretrained` lists them: 'mnist'
        or 'cifar10', say. The arguments below are then the file's; given ones must agree, but for
        ``dtype`` and ``param_dtype``.
      num_classes: size of the logits; None: 10.
      image_size: int or (height, width); None: 32. The ResNets take any size, whatever is given.
      channels: channels of the images; None: 3.
      rngs: source of the initial parameters; a pretrained model needs none.
      **options: further keyword arguments of the model.

    Returns:
      The model, in training mode as Flax's layers are made: ``model.eval()`` before it predicts.

    Raises:
      ValueError: an unknown name or family, an image size that the model cannot take, no such
        pretrained weights, or an argument that does not agree with theirs.
      TypeError: an option that the model does not have, or no ``rngs``.

    Example:
      >>> from flax import nnx
      >>> model = create("lenet5", image_size=28, channels=1, family="conv", rngs=nnx.Rngs(0))
      >>> type(model).__name__
      'LeNet5'
      >>> model = create("lenet5", pretrained="mnist")  # of 28 x 28 pixels, one channel
      >>> model.conv2.kernel.shape
      (5, 5, 6, 16)
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(names())}")
    layers = get_family(family)
    if pretrained is not None:
        sizes = {"num_classes": num_classes, "image_size": image_size, "channels": channels}
        return _pretrained(name, layers, pretrained, sizes, options)
    if rngs is None:
        raise TypeError("create: rngs, the source of the initial parameters, is missing")
    architecture = make_architecture(
        name,
        layers,
        10 if num_classes is None else num_classes,
        image_size,
        3 if channels is None else channels,
        options,
    )
    return build(architecture, rngs, layers)


def _pretrained(
    name: str, family: Family, data: str, sizes: dict[str, Any], options: dict[str, Any]
) -> Any:
    dtypes = {
        key: jnp.dtype(options.pop(key)).name for key in ("dtype", "param_dtype")
        if options.get(key) is not None
    }  # fmt: skip
    model, description = load_as(find(name, family.name, data), family=family, dtypes=dtypes)
    has = description.architecture
    own: dict[str, Any] = {
        "num_classes": has.num_classes,
        "image_size": has.image_size,
        "channels": has.channels,
    }
    own |= dict(has.options)
    side = sizes["image_size"]
    sizes["image_size"] = (side, side) if isinstance(side, int) else side
    given = {key: value for key, value in sizes.items() if value is not None} | options
    for key, value in given.items():
        if key not in own or own[key] != value:
            found = f"{own[key]!r}" if key in own else "not given there"
            raise ValueError(
                f"create: {key}={value!r} does not agree with the weights that {name!r} has for "
                f"{data!r}, where it is {found}"
            )
    model.train()
    return model
