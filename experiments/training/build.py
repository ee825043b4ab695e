"""The model that a configuration asks for."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

import jadder
import jadder.models
from experiments.common.environment import check_memory
from experiments.common.errors import UserError
from experiments.images.dataset import Dataset
from experiments.training.config import TrainConfig
from jadder.implementations import Implementation
from jadder.models import get_family

TYPES: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "float64": {"param_dtype": jnp.float64},
}
RULES = {
    "addernet": jadder.ADDERNET,
    "adder_vit": jadder.ADDER_VIT,
    "wide": jadder.GradientRule(x=jadder.rules.Clip(0.5, 1.0)),
    "sign": jadder.SIGN,
}


def choose_model(name: str, dataset: Dataset) -> str:
    """Resolves "auto": LeNet-5 with batch normalisation for grey images, ResNet-20 for others.

    Raises:
        UserError: there is no model of that name.
    """
    if name == "auto":
        return "lenet5" if dataset.train_images.shape[-1] == 1 else "resnet20"
    if name not in jadder.models.names():
        known = ", ".join(jadder.models.names())
        raise UserError(f"--model: {name!r} is not one of auto, {known}")
    return name


def build_model(config: TrainConfig, family: str, dataset: Dataset) -> nnx.Module:
    """The network of one family, for the data set's images and classes.

    Raises:
        UserError: the network cannot take such images or options, or the dtype is not to be had.
    """
    if config.dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError("--dtype float64 needs the environment variable JAX_ENABLE_X64=1")
    layers = get_family(family)
    if family == "adder" and config.rule != "default":
        layers = dataclasses.replace(layers, rule=RULES[config.rule])
    if family == "adder" and config.implementation is not None:
        implementation = cast(Implementation, config.implementation)
        layers = dataclasses.replace(layers, implementation=implementation)
    height, width, channels = dataset.train_images.shape[1:]
    batch = (config.batch_size, height, width, channels)
    check_memory(4 * math.prod(batch), "a batch of --batch-size images")

    def create() -> nnx.Module:
        return jadder.models.create(
            config.model,
            family=layers,
            num_classes=dataset.num_classes,
            image_size=(height, width),
            channels=channels,
            rngs=nnx.Rngs(config.seed),
            **{**TYPES[config.dtype], **config.model_arguments()},
        )

    with refusals(f"--model {config.model} on images of {height} x {width} x {channels}"):
        if config.model_options:
            check_sizes(nnx.eval_shape(create))
        model = create()
        check_sizes(model)
        _check_logits(model, batch, dataset.num_classes)
    return model


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Makes a UserError of what a model's constructor, or its call, raises for bad arguments.

    Args:
        what: was asked for.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error
    except (ArithmeticError, LookupError, AttributeError, MemoryError, RuntimeError) as error:
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


def check_sizes(model: nnx.Module) -> None:
    """Refuses a network, real or abstract, that is empty in a place or larger than the memory.

    Raises:
        UserError: see above.
    """
    size = 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape = variable.get_value().shape
        if 0 in shape:
            raise UserError(f"its {'.'.join(map(str, path))} has the shape {shape}")
        size += math.prod(shape) * jnp.dtype(variable.get_value().dtype).itemsize
    check_memory(size, "its parameters")


def _check_logits(model: nnx.Module, images: tuple[int, ...], num_classes: int) -> None:
    """Traces the model in training, computing nothing, so that what does not fit is said early."""
    graphdef, state = nnx.split(model)

    def forward(state: Any) -> Any:
        traced: Any = nnx.merge(graphdef, state)
        traced.train()
        return traced(jnp.zeros(images))

    logits = jax.eval_shape(forward, state)
    if logits.shape != (images[0], num_classes):
        raise ValueError(f"its output has the shape {logits.shape}")
