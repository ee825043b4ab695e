"""The model that a configuration asks for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

import jadder
import jadder.models
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
RULES = {"addernet": jadder.ADDERNET, "adder_vit": jadder.ADDER_VIT, "sign": jadder.SIGN}


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
    try:
        model = jadder.models.create(
            config.model,
            family=layers,
            num_classes=dataset.num_classes,
            image_size=(height, width),
            channels=channels,
            rngs=nnx.Rngs(config.seed),
            **{**TYPES[config.dtype], **config.model_arguments()},
        )
        _check_logits(model, (config.batch_size, height, width, channels), dataset.num_classes)
    except (TypeError, ValueError) as error:
        shape = f"{height} x {width} x {channels}"
        raise UserError(f"--model {config.model} on images of {shape}: {error}") from error
    return model


def _check_logits(model: nnx.Module, images: tuple[int, ...], num_classes: int) -> None:
    """Traces the model, without computing anything, so that what does not fit is said early."""
    graphdef, state = nnx.split(model)

    def forward(state: Any) -> Any:
        traced: Any = nnx.merge(graphdef, state)
        traced.eval()
        return traced(jnp.zeros(images))

    logits = jax.eval_shape(forward, state)
    if logits.shape != (images[0], num_classes):
        raise ValueError(f"its output has the shape {logits.shape}")
