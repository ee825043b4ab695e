"""Effective ranks: of matrices, and of what a vision transformer makes of images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from experiments.images.augment import normalize
from experiments.images.dataset import Dataset
from experiments.studies.watch import Watched

Floats = NDArray[np.floating[Any]]


def effective_rank(matrices: Any) -> Floats:
    """exp of the entropy of the singular values, divided by their sum: Roy & Vetterli, 2007.

    Args:
        matrices: (..., rows, columns), none of them zero.

    Returns:
        (...), from 1 for a matrix of rank one to min(rows, columns) for a multiple of an
        orthogonal one.

    Example:
        >>> round(float(effective_rank(np.eye(3))), 6)
        3.0
    """
    values = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    shares = values / values.sum(-1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-np.sum(shares * logs, -1))


class Observer:
    """What a network makes of test images, by the same programs for all networks.

    Args:
        network: of the structure that is observed.
        dataset: the images.
        batch: how many images at once.
    """

    def __init__(self, network: Any, dataset: Dataset, batch: int):
        self.dataset, self.batch = dataset, batch
        self.identity = network.blocks[0].attention.identity
        graphdef, _ = nnx.split(network)
        mean, std = (jnp.asarray(moment) for moment in (dataset.mean, dataset.std))

        @functools.partial(jax.jit, static_argnames="own_statistics")
        def forward(state: Any, images: jax.Array, own_statistics: bool) -> Any:
            model: Any = nnx.merge(graphdef, state)
            model.train() if own_statistics else model.eval()
            maps, tokens = watch_blocks(model)
            logits = model(normalize(images, mean, std))
            return logits, maps, tokens

        self._forward = forward

    def __call__(self, network: Any, start: int = 0, *, own_statistics: bool = False) -> Any:
        """Logits, and for each block its attention maps and tokens, for a batch from `start` on.

        Args:
            network: of the structure of the first.
            start: the batch's first image.
            own_statistics: whether batch normalisation takes the moments of these images instead
                of the running ones, which mean nothing before training.

        Returns:
            logits (batch, classes), maps (batch, heads, tokens, tokens) and tokens (batch, tokens,
            features) of each block. What is missing from the last batch is its last image again.
        """
        images = self.dataset.test_images
        place = np.minimum(np.arange(start, start + self.batch), len(images) - 1)
        state = nnx.split(network)[1]
        return jax.device_get(self._forward(state, images[place], own_statistics=own_statistics))

    def accuracy(self, network: Any) -> float:
        """On the test images."""
        labels, hits = self.dataset.test_labels, 0
        for start in range(0, len(labels), self.batch):
            expected = labels[start : start + self.batch]
            logits, _, _ = self(network, start)
            hits += int(np.sum(logits.argmax(-1)[: len(expected)] == expected))
        return hits / len(labels)

    def ranks(self, network: Any) -> dict[str, list[float]]:
        """Mean effective ranks for each block, over the first batch of test images.

        Batch normalisation takes the moments of these images, so that ranks before and after
        training can be compared.

        Returns:
            maps: over images and heads.
            mixing: the same of the maps plus the identity, where identity mapping is on.
            tokens: over images, each (tokens, features) with the tokens' mean taken away.
        """
        _, maps, tokens = self(network, own_statistics=True)
        mixing = [m + np.eye(m.shape[-1]) for m in maps] if self.identity else []
        tokens = [t - t.mean(1, keepdims=True) for t in tokens]
        return {
            what: [float(effective_rank(matrices).mean()) for matrices in found]
            for what, found in (("maps", maps), ("mixing", mixing), ("tokens", tokens))
        }


def watch_blocks(model: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """Lists that the model's next call fills with each block's attention maps and output."""
    maps: list[jax.Array] = []
    tokens: list[jax.Array] = []

    def attend(attention: Any, x: jax.Array) -> Any:
        y, sown = nnx.capture(attention, nnx.Intermediate)(x, sow_weights=True)
        maps.append(nnx.to_pure_dict(sown)["attention_weights"][0])
        return y

    def pass_through(block: Any, x: jax.Array) -> jax.Array:
        tokens.append(block(x))
        return tokens[-1]

    for i, block in enumerate(model.blocks):
        block.attention = Watched(block.attention, attend)
        model.blocks[i] = Watched(block, pass_through)
    return maps, tokens
