"""What a network computes in training and inference, as programs that can be timed one by one."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import jadder.models
from experiments.training import optimizer, steps
from experiments.training.build import refusals
from experiments.training.config import TrainConfig
from jadder.models import Family
from jadder.nn import adder_mask


@dataclasses.dataclass(frozen=True)
class Images:
    """The shape of the images that a network is timed with.

    Attributes:
        batch: how many.
        size: height and width.
        channels: 1 or 3, say.
    """

    batch: int
    size: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.size, self.size, self.channels)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, its optimizer's state, and a batch of random images of ten classes.

    The methods are the programs, without augmentation; `operands` has what they take.
    """

    graphdef: nnx.GraphDef[Any]
    tx: optax.GradientTransformation
    operands: Mapping[str, Any]

    def inference(self, params: Any, rest: Any, images: Array) -> Array:
        """Logits, with the statistics that training has gathered."""
        model: Any = nnx.merge(self.graphdef, params, rest)
        model.eval()
        return model(images)

    def forward(self, params: Any, rest: Any, images: Array, labels: Array) -> tuple[Array, Any]:
        """The training loss, and the rest of the state after it."""
        model: Any = nnx.merge(self.graphdef, params, rest)
        model.train()
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), steps.split(model)[2]

    def gradient(self, params: Any, rest: Any, images: Array, labels: Array) -> Any:
        """The loss's gradient, and the rest of the state after it."""
        return jax.grad(self.forward, has_aux=True)(params, rest, images, labels)

    def update(self, params: Any, gradient: Any, optimizer: Any) -> Any:
        """Parameters and optimizer's state after a step of the optimizer."""
        return update(self.tx, params, gradient, optimizer)

    def step(self, params: Any, rest: Any, images: Array, labels: Array, optimizer: Any) -> Any:
        """Everything that a training step changes."""
        gradient, rest = self.gradient(params, rest, images, labels)
        return self.update(params, gradient, optimizer), rest

    def compile(self, program: str) -> Any:
        """The compiled method of that name, for `operands`."""
        return jax.jit(getattr(self, program)).lower(*self._arguments(program)).compile()

    def call(self, program: str, compiled: Any) -> Callable[[], Any]:
        """Runs a compiled method on `operands`."""
        arguments = self._arguments(program)
        return lambda: compiled(*arguments)

    def _arguments(self, program: str) -> list[Any]:
        names = {
            "inference": ("params", "rest", "images"),
            "forward": ("params", "rest", "images", "labels"),
            "gradient": ("params", "rest", "images", "labels"),
            "update": ("params", "gradient", "optimizer"),
            "step": ("params", "rest", "images", "labels", "optimizer"),
        }[program]
        return [self.operands[name] for name in names]


def update(tx: optax.GradientTransformation, params: Any, gradient: Any, state: Any) -> Any:
    """Parameters and optimizer's state after a step of the optimizer `tx`."""
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def create(name: str, family: Family, images: Images, **options: Any) -> nnx.Module:
    """A network of ten classes.

    Raises:
        UserError: it cannot take such images or options.
    """
    with refusals(f"{name} on images of {images.shape[1:]}"):
        return jadder.models.create(
            name,
            family=family,
            num_classes=10,
            image_size=(images.size, images.size),
            channels=images.channels,
            rngs=nnx.Rngs(0),
            **options,
        )


def prepare(model: nnx.Module, name: str, images: Images) -> Network:
    """A network with the recipe of `experiments.train` and a batch to train on.

    Args:
        model: the network.
        name: its name in the registry, which the recipe goes by.
        images: the batch's shape.
    """
    tx = make_optimizer(name, adder_mask(model))
    graphdef, params, rest = steps.split(model)
    return Network(graphdef, tx, {
        "params": params,
        "rest": rest,
        "images": random_normal(jax.ShapeDtypeStruct(images.shape, jnp.float32)),
        "labels": jnp.arange(images.batch) % 10,
        "gradient": jax.tree.map(lambda p: random_normal(p, 1e-3), params),
        "optimizer": tx.init(params),
    })  # fmt: skip


def make_optimizer(name: str, mask: Any) -> optax.GradientTransformation:
    """The recipe's for this model, at its peak rate; `mask` marks adder kernels."""
    config = TrainConfig(model=name)
    recipe = optimizer.choose(config)
    return optimizer.make(config, recipe, optax.constant_schedule(recipe.learning_rate), mask)


def random_normal(like: Any, scale: float = 1.0) -> Array:
    """Numbers from N(0, scale²) in the shape and dtype of `like`.

    NumPy draws them: a program of JAX's would be compiled for each shape.
    """
    return jnp.asarray(scale * np.random.default_rng(0).standard_normal(like.shape), like.dtype)


def temporaries_mib(compiled: Any) -> float:
    """What XLA plans for a program's temporaries."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def load_average() -> float | None:
    """Programs that wanted a processor in the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
