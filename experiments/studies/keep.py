"""Optimizers that keep a record of a run in their state, where checkpoints save it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Step(NamedTuple):
    """One step of a run.

    Attributes:
        number: from 0.
        gradients: what goes into the optimizer.
        updates: what comes out of it.
        params: the parameters before the step; None where the optimizer was not given them.
    """

    number: jax.Array
    gradients: Any
    updates: Any
    params: Any

    @property
    def new_params(self) -> Any:
        """The parameters after the step.

        Raises:
            ValueError: those before it were not given.
        """
        if self.params is None:
            raise ValueError("update needs the parameters, of which a record is kept")
        return optax.apply_updates(self.params, self.updates)


class KeepingState(NamedTuple):
    """The optimizer's state, the steps so far and the record."""

    inner: optax.OptState
    step: jax.Array
    record: Any


def keeping(
    tx: optax.GradientTransformation,
    begin: Callable[[Any], Any],
    after: Callable[[Any, Step], Any],
) -> optax.GradientTransformation:
    """The same optimizer, which keeps a record.

    Args:
        tx: the optimizer.
        begin: makes the record, a tree of arrays, from the parameters.
        after: makes the record anew from the last one and a step.

    Example:
        >>> tx = keeping(optax.sgd(1.0), lambda params: 0.0, lambda sum, step: sum + step.updates)
        >>> state = tx.init(jnp.zeros(()))
        >>> for _ in range(2):
        ...     _, state = tx.update(jnp.ones(()), state)
        >>> state.record.item()
        -2.0
    """

    def init(params: optax.Params) -> KeepingState:
        return KeepingState(tx.init(params), jnp.zeros((), jnp.int32), begin(params))

    def update(
        gradients: optax.Updates, state: KeepingState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, KeepingState]:
        updates, inner = tx.update(gradients, state.inner, params)
        record = after(state.record, Step(state.step, gradients, updates, params))
        return updates, KeepingState(inner, state.step + 1, record)

    return optax.GradientTransformation(init, update)
