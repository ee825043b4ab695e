"""The jitted training and evaluation steps, on a data set that lies on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.augment import normalize, random_crop, random_flip
from experiments.data import Dataset

State = dict[str, Any]
"""A run's whole state, a tree of arrays:

params, model: the parameters, and what else the model keeps (running statistics, random keys).
optimizer: the optimizer's state.
step: int32, steps done.
sums: loss, correct and count over the images of the epoch so far.
"""


def zero_sums() -> dict[str, jax.Array]:
    return {"loss": jnp.zeros(()), "correct": jnp.zeros((), jnp.int32),
            "count": jnp.zeros((), jnp.int32)}  # fmt: skip


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Any, Any]:
    """A model's structure, its parameters and the rest of its state as dicts of arrays."""
    graphdef, state = nnx.split(model)
    params, rest = nnx.split_state(state, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def initial_state(
    model: nnx.Module, tx: optax.GradientTransformation
) -> tuple[nnx.GraphDef[Any], State]:
    """Splits a model into what is traced and the state that a run starts from."""
    graphdef, params, rest = split(model)
    return graphdef, {
        "params": params,
        "model": rest,
        "optimizer": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
        "sums": zero_sums(),
    }


def _add(sums: Any, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "loss": sums["loss"] + jnp.sum(jnp.where(mask, losses, 0)),
        "correct": sums["correct"] + jnp.sum((jnp.argmax(logits, -1) == labels) & mask),
        "count": sums["count"] + jnp.sum(mask),
    }


def make_train_step(
    graphdef: nnx.GraphDef[Any],
    tx: optax.GradientTransformation,
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    augment: bool,
) -> Callable[..., tuple[State, Any]]:
    """The jitted step (state, images, labels, order) -> (state, sums).

    `order` (N,) is the epoch's permutation of the images; the step takes its batch from there.
    Whatever is random in a step comes from `seed` and the step's number, so a run that was
    interrupted goes on with the same numbers. The state's buffers are donated.
    """
    mean, std = (jnp.asarray(m, jnp.float32) for m in (dataset.mean, dataset.std))
    steps_per_epoch = len(dataset.train_images) // batch_size

    def loss_fn(params: Any, rest: Any, x: jax.Array, labels: jax.Array) -> Any:
        model = nnx.merge(graphdef, params, rest)
        model.train()
        logits = model(x).astype(jnp.float32)
        _, _, rest = split(model)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, rest)

    def step(
        state: State, images: jax.Array, labels: jax.Array, order: jax.Array
    ) -> tuple[State, Any]:
        start = state["step"] % steps_per_epoch * batch_size
        index = jax.lax.dynamic_slice(order, (start,), (batch_size,))
        x, y = images[index], labels[index]
        if augment:
            key = jax.random.fold_in(jax.random.key(seed), state["step"])
            crop_key, flip_key = jax.random.split(key)
            x = random_crop(crop_key, x, dataset.crop_padding)
            x = random_flip(flip_key, x) if dataset.flip else x
        x = normalize(x, mean, std)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, (logits, rest)), grads = grad_fn(state["params"], state["model"], x, y)
        updates, optimizer = tx.update(grads, state["optimizer"], state["params"])
        sums = _add(state["sums"], logits, y, jnp.ones(batch_size, bool))
        state = {
            "params": optax.apply_updates(state["params"], updates),
            "model": rest,
            "optimizer": optimizer,
            "step": state["step"] + 1,
            "sums": sums,
        }
        return state, sums

    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    graphdef: nnx.GraphDef[Any], dataset: Dataset, *, batch_size: int
) -> Callable[..., Any]:
    """The jitted step (params, rest, images, labels, start, sums) -> sums.

    It takes the images from `start` on; places beyond the last image count for nothing.
    """
    mean, std = (jnp.asarray(m, jnp.float32) for m in (dataset.mean, dataset.std))

    def step(
        params: Any, rest: Any, images: jax.Array, labels: jax.Array, start: jax.Array, sums: Any
    ) -> Any:
        index = start + jnp.arange(batch_size)
        mask = index < len(images)
        index = jnp.minimum(index, len(images) - 1)
        model = nnx.merge(graphdef, params, rest)
        model.eval()
        logits = model(normalize(images[index], mean, std)).astype(jnp.float32)
        return _add(sums, logits, labels[index], mask)

    return jax.jit(step)
