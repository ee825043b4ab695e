"""Statistics of batch normalisations, estimated anew from data."""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jadder.models.normalization import BatchNorm, values_per_feature


def update_statistics(
    model: nnx.Module,
    batches: Iterable[Any],
    forward: Callable[[Any, Any], Any] | None = None,
) -> None:
    """Replaces the running statistics of a model's batch normalisations by those of ``batches``.

    For parameters that no running average has followed: averaged ones, loaded or converted ones
    (`jadder.adderize`), those trained with a momentum too close to 1. The mean and the unbiased
    variance of all values of all batches together, as if they were one array, are computed in one
    pass, by the update of Chan, Golub and LeVeque (1983), which keeps its digits however far from
    zero the values lie. As in training, each layer sees what the layers before it make of a batch
    with the batch's own statistics. (``torch.optim.swa_utils.update_bn`` averages the batches'
    variances, and so leaves out the spread of their means.)

    Nothing else of the model changes: it runs as a copy in training mode, dropout included, from
    whose random streams nothing is taken. A normalisation that no batch reaches keeps its
    statistics, and a model without any stays as it is, its batches unused.

    Args:
      model: any NNX module with ``nnx.BatchNorm``s of Flax's kind or of `jadder.models`, scanned
        and vmapped ones included; its statistics change.
      batches: what the model is called with, of any sizes. It compiles once for each.
      forward: ``forward(model, batch)``, which need not return anything; default ``model(batch)``.

    Raises:
      ValueError: no batches, or a feature of which they have but one value.

    Example:
      >>> import jax.numpy as jnp
      >>> norm = BatchNorm(1, rngs=nnx.Rngs(0))
      >>> update_statistics(norm, [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]] * 2)])
      >>> norm.mean[...], norm.var[...]
      (Array([3.5], dtype=float32), Array([3.6666667], dtype=float32))
    """
    norms = _norms(model)
    if not norms:
        return
    graphdef, *states = nnx.split(_pooling_copy(model), nnx.BatchStat, nnx.RngState, ...)
    statistics, streams, others = states

    @jax.jit
    def pool(statistics: Any, streams: Any, others: Any, batch: Any) -> tuple[Any, Any]:
        copy = nnx.merge(graphdef, statistics, streams, others)
        if forward is None:
            copy(batch)
        else:
            forward(copy, batch)
        return nnx.state(copy, nnx.BatchStat), nnx.state(copy, nnx.RngState)

    seen = False
    for batch in batches:
        statistics, streams = pool(statistics, streams, others, batch)
        seen = True
    if not seen:
        raise ValueError("update_statistics: there are no batches")
    pooled = _norms(nnx.merge(graphdef, statistics, streams, others))
    for path, norm in pooled.items():
        if bool(jnp.any((norm.count[...] > 0) & (norm.count[...] < 2))):
            name = "/".join(map(str, path)) or "the model itself"
            raise ValueError(
                f"update_statistics: {name} got a single value of a feature from all batches, "
                "which has no variance"
            )
    for path, norm in norms.items():
        _take_over(norm, pooled[path])


class _Pooling(nnx.BatchNorm):
    """Mixed into a batch normalisation: its statistics are those of all values that it has seen.

    Until the end ``var`` has the sum of the squared deviations from the mean.
    """

    count: nnx.BatchStat[Array]

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalises ``x`` as in training, whatever ``use_running_average``."""
        del use_running_average
        old_count, old_mean, old_squares = self.count[...], self.mean[...], self.var[...]
        y: Array = super().__call__(x, use_running_average=False, mask=mask)
        # The momentum is 0: these are the batch's. Ours divide by count - 1, Flax's by count.
        batch_mean, batch_var = self.mean[...], self.var[...]
        batch_count = jnp.asarray(values_per_feature(self, x, mask), old_count.dtype)
        batch_squares = batch_var * (batch_count - isinstance(self, BatchNorm))

        count = old_count + batch_count
        share = batch_count / jnp.maximum(count, 1)
        difference = batch_mean - old_mean
        squares = old_squares + batch_squares + difference**2 * old_count * share
        some = batch_count > 0  # of a feature that is masked out entirely there is no mean
        self.count[...] = count
        self.mean[...] = jnp.where(some, old_mean + difference * share, old_mean)
        self.var[...] = jnp.where(some, squares, old_squares)
        return y


@functools.cache
def _pooling_class(kind: type[Any]) -> type[Any]:
    return types.new_class(f"Pooling{kind.__name__}", (_Pooling, kind))


def _pooling_copy(model: nnx.Module) -> nnx.Module:
    copy = nnx.clone(model)
    copy.train()
    for norm in _norms(copy).values():
        kind: Any = type(norm)
        object.__setattr__(norm, "__class__", _pooling_class(kind))
        norm.momentum = 0.0
        norm.use_fast_variance = False
        for variable in (norm.mean, norm.var):
            variable.set_value(jnp.zeros_like(variable.get_value()))
        norm.count = nnx.BatchStat(jnp.zeros_like(norm.mean.get_value()))
    return copy


def _take_over(norm: Any, pooled: Any) -> None:
    """Sets a normalisation's statistics to the pooled ones, where there are any."""
    count = pooled.count[...]
    var = pooled.var[...] / jnp.maximum(count - 1, 1)
    for variable, value in ((norm.mean, pooled.mean[...]), (norm.var, var)):
        kept = variable.get_value()
        variable.set_value(jnp.where(count > 0, value, kept).astype(kept.dtype))


def _norms(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """A model's batch normalisations by their paths."""
    modules = nnx.iter_modules(model)
    return {tuple(path): norm for path, norm in modules if isinstance(norm, nnx.BatchNorm)}
