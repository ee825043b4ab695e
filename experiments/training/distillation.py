"""Distillation: a loss that compares logits with those of a network that is trained already."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network, in evaluation mode.

    Attributes:
        graphdef: its structure.
        state: its parameters, and what else it keeps: two trees of arrays.
        weight: of the distance to its logits in the loss, between 0 and 1; labels have the rest.
        temperature: that both networks' logits are divided by before they are compared.
    """

    graphdef: nnx.GraphDef[Any]
    state: tuple[Any, Any]
    weight: float
    temperature: float

    def logits(self, state: tuple[Any, Any], x: jax.Array) -> jax.Array:
        """Of normalised images; `state` is the teacher's, as the argument of a jitted function."""
        model: Any = nnx.merge(self.graphdef, *state)
        model.eval()
        logits: jax.Array = model(x)
        return logits

    def mix(self, loss: jax.Array, logits: jax.Array, soft: jax.Array) -> jax.Array:
        """(1 - weight) · loss + weight · T² · KL(softmax(soft / T) ‖ softmax(logits / T)).

        T² keeps the gradient's size as T grows (Hinton et al., 2015, arXiv:1503.02531, section 2).

        Args:
            loss: of the labels, the mean over a batch.
            logits: (batch, classes), of the network that learns.
            soft: (batch, classes), the teacher's.
        """
        ours = jax.nn.log_softmax(logits / self.temperature)
        theirs = jax.nn.log_softmax(soft.astype(logits.dtype) / self.temperature)
        apart = optax.losses.kl_divergence_with_log_targets(ours, theirs).mean()
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * apart
