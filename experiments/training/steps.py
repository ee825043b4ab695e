"""The jitted training and evaluation steps, on batches that the devices share.

The programs are those of one device; XLA partitions them by the shardings of their arguments, so
that the mean of a batch, in the loss and in batch normalisation, is that of the whole batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from experiments.images.augment import normalize, random_crop, random_flip
from experiments.images.dataset import Dataset
from experiments.images.randaugment import random_augment
from experiments.training.devices import Devices
from experiments.training.distillation import Teacher

State = dict[str, Any]
"""A run's whole state, a tree of arrays:

params, model: the parameters, and what else the model keeps (running statistics, random keys).
optimizer: the optimizer's state.
step: int32, steps done.
sums: loss, correct and count over the images of the epoch so far.
"""


def zero_sums(dtype: DTypeLike) -> dict[str, jax.Array]:
    return {"loss": jnp.zeros((), dtype), "correct": jnp.zeros((), jnp.int32),
            "count": jnp.zeros((), jnp.int32)}  # fmt: skip


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Any, Any]:
    """A model's structure, its parameters and the rest of its state as dicts of arrays."""
    graphdef, state = nnx.split(model)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def initial_state(
    model: nnx.Module, tx: optax.GradientTransformation, dtype: DTypeLike
) -> tuple[nnx.GraphDef[Any], State]:
    """Splits a model into what is traced and the state that a run starts from."""
    graphdef, params, rest = split(model)
    return graphdef, {
        "params": params,
        "model": rest,
        "optimizer": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
        "sums": zero_sums(dtype),
    }


def _add(sums: Any, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Any:
    correct = (jnp.argmax(logits, -1) == labels) & mask
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "loss": sums["loss"] + jnp.sum(jnp.where(mask, losses, 0)),
        "correct": sums["correct"] + jnp.sum(correct, dtype=jnp.int32),
        "count": sums["count"] + jnp.sum(mask, dtype=jnp.int32),
    }


def _loss(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    soft = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype),
                               smoothing)  # fmt: skip
    return optax.softmax_cross_entropy(logits, soft).mean()


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    dataset: Dataset,
    devices: Devices,
    *,
    dtype: DTypeLike,
    seed: int,
    augment: str,
    shift: bool = True,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[State, Any]]:
    """The jitted step (state, x, y) -> (state, sums).

    `x` and `y` are the images and labels of a batch, sharded; state and sums are replicated.
    Whatever is random in a step comes from `seed` and the step's number, so a run that was
    interrupted goes on with the same numbers, on any devices. The state's buffers are donated.
    `augment` is one of `config.AUGMENTATIONS`, and `shift` whether it may shift images.
    `label_smoothing` is the share of each label that goes to all classes.
    `dtype` is that of the images that the model takes, and of the loss.
    With a `teacher`, which sees the same images, the step is (state, x, y, teacher's state).
    """
    mean, std = (jnp.asarray(m, dtype) for m in (dataset.mean, dataset.std))

    def loss_fn(params: Any, rest: Any, x: jax.Array, labels: jax.Array, soft: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        model.train()
        logits = model(x).astype(dtype)
        _, _, rest = split(model)
        loss = _loss(logits, labels, label_smoothing)
        loss = loss if teacher is None else teacher.mix(loss, logits, soft)
        return loss, (logits, rest)

    def step(state: State, x: jax.Array, y: jax.Array, known: Any = None) -> tuple[State, Any]:
        if augment != "none":
            key = jax.random.fold_in(jax.random.key(seed), state["step"])
            if augment == "randaugment":
                x = random_augment(jax.random.fold_in(key, 0), x)
            crop_key, flip_key = jax.random.split(key)
            x = random_crop(crop_key, x, dataset.crop_padding) if shift else x
            x = random_flip(flip_key, x) if dataset.flip else x
        x = normalize(x, mean, std)
        soft = None if teacher is None else teacher.logits(known, x)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, (logits, rest)), grads = grad_fn(state["params"], state["model"], x, y, soft)
        updates, optimizer = tx.update(grads, state["optimizer"], state["params"])
        sums = _add(state["sums"], logits, y, jnp.ones(len(y), bool))
        state = {
            "params": optax.apply_updates(state["params"], updates),
            "model": rest,
            "optimizer": optimizer,
            "step": state["step"] + 1,
            "sums": sums,
        }
        return state, sums

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(devices.replicated, devices.sharded, devices.sharded)
        + (() if teacher is None else (devices.replicated,)),
        out_shardings=devices.replicated,
    )


def make_eval_step(
    graphdef: nnx.GraphDef[Any], dataset: Dataset, devices: Devices, *, dtype: DTypeLike
) -> Callable[..., Any]:
    """The jitted step (params, rest, images, labels, mask, sums) -> sums.

    `images` and `labels` are a batch, sharded as `mask` is, which says which of them count.
    """
    mean, std = (jnp.asarray(m, dtype) for m in (dataset.mean, dataset.std))

    def step(
        params: Any, rest: Any, images: jax.Array, labels: jax.Array, mask: jax.Array, sums: Any
    ) -> Any:
        model = nnx.merge(graphdef, params, rest)
        model.eval()
        logits = model(normalize(images, mean, std)).astype(dtype)
        return _add(sums, logits, labels, mask)

    replicated, sharded = devices.replicated, devices.sharded
    return jax.jit(
        step,
        in_shardings=(replicated, replicated, sharded, sharded, sharded, replicated),
        out_shardings=replicated,
    )
