"""Normalisations for products that lie far from zero, with PyTorch's conventions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import Array, lax

from jadder.models.standardize import standardize
from jadder.nn import promote_to_float32


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` with PyTorch's conventions, and arithmetic that adder products need.

    In training, ``y = scale · (x - mean) / √(var + epsilon) + bias`` with the batch's mean and
    biased variance, as in Flax. What differs:

    * ``var`` follows the *unbiased* variance, n / (n - 1) times the biased one, as in PyTorch;
      ``momentum`` is Flax's decay, so its default 0.9 is PyTorch's 0.1.
    * The variance is the mean of (x - mean)², not E[x²] - mean². An adder product lies far from
      zero (in a trained ResNet-20 at -2600 with a standard deviation of 4), where float32 leaves
      nothing of that difference.
    * All is computed in at least float32, and the statistics are kept in at least float32 (float64
      with ``param_dtype=float64``); only the result is cast to ``dtype``.

    Args:
      num_features: size of the last axis.
      momentum: decay of the running statistics.
      epsilon: added to the variance.
      dtype: dtype of the result; None: that of the input and parameters, promoted.
      param_dtype: dtype of ``scale`` and ``bias``.
      center_features: whether each position's mean over the features is taken away first. All
        outputs of an adder layer fall together where its input grows; this takes out what they
        share, of which there is more than of anything else at the start (see experiments/).
      rngs: see ``nnx.BatchNorm``.
      **options: the other arguments of ``nnx.BatchNorm``.

    Raises:
      ValueError: ``center_features`` with a single feature, of which nothing would be left.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> norm = BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.array([[0.0], [2.0]]))
      >>> float(norm.var[0])  # unbiased: (1 + 1) / (2 - 1)
      2.0
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        center_features: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if center_features and num_features < 2:
            raise ValueError(f"center_features needs at least two features, got {num_features}")
        super().__init__(
            num_features,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_fast_variance=False,
            promote_dtype=promote_to_float32,
            rngs=rngs,
            **options,
        )
        statistics_dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(num_features, statistics_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, statistics_dtype))
        self.center_features = center_features

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        """Normalises ``x`` over all axes but the feature axis.

        Args:
          x: ``(..., num_features)``.
          use_running_average: overrides the attribute that ``train()`` and ``eval()`` set.
          mask: True where an element takes part in the statistics; broadcasts against ``x``.

        Returns:
          An array of the shape of ``x``.

        Raises:
          ValueError: training with one value per feature, which has no unbiased variance.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            evaluated: Array = super().__call__(self._centered(x), use_running_average=True)
            return evaluated
        if mask is None and self.axis_name is None:
            return self._standardized(x)
        count = self._count(x, mask)
        old_var = self.var[...]
        y: Array = super().__call__(self._centered(x), use_running_average=False, mask=mask)
        # Flax has moved var by (1 - momentum) · biased; unbiased - biased is biased / (count - 1).
        moved = self.var[...] - self.momentum * old_var
        self.var[...] = lax.stop_gradient(self.var[...] + moved / (count - 1))
        return y

    def _count(self, x: Array, mask: Array | None = None) -> Array | int:
        """How many values there are of a feature: at least two, where that is known."""
        count = values_per_feature(self, x, mask)
        if not isinstance(count, jax.Array) and count < 2:
            raise ValueError(
                "BatchNorm in training mode needs at least two values per feature, "
                f"got an input of shape {x.shape}"
            )
        return count

    def _standardized(self, x: Array, **options: Any) -> Array:
        """What Flax computes in training, with less work for its derivative."""
        count = self._count(x)
        given: list[Any] = [
            x if parameter is None else parameter[...]
            for parameter in (self.mean, self.var, self.scale, self.bias)
        ]
        x, old_mean, old_var, scale, bias = self.promote_dtype((x, *given), dtype=self.dtype)
        scale = scale if self.use_scale else jnp.ones_like(old_mean)
        bias = bias if self.use_bias else jnp.zeros_like(old_mean)
        y, mean, var = standardize(
            x,
            scale,
            bias,
            self.axis,
            self.epsilon,
            center_features=self.center_features,
            **options,
        )
        unbiased = var * (count / (count - 1))
        for statistic, old, new in ((self.mean, old_mean, mean), (self.var, old_var, unbiased)):
            moved = self.momentum * old + (1 - self.momentum) * new
            statistic[...] = lax.stop_gradient(moved)
        return y if self.dtype is None else y.astype(self.dtype)

    def _is_one_function(self, x: Array, residual: Array | None) -> bool:
        """Whether a call is `standardize`, and rounds nothing before a residual is added."""
        if self.use_running_average or self.axis_name is not None:
            return False
        if type(self).__call__ is not BatchNorm.__call__:
            return False
        if residual is None:
            return True
        given = (self.mean, self.var, self.scale, self.bias)
        present = [each[...] for each in given if each is not None]
        wide = jnp.result_type(jnp.float32, x, *present)
        same = residual.shape == x.shape and residual.dtype == wide
        return same and (self.dtype is None or self.dtype == wide)

    def _centered(self, x: Array) -> Array:
        if not self.center_features:
            return x
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centered: Array = wide - wide.mean(self.axis, keepdims=True)
        return centered


def rectified(norm: Callable[[Array], Array], x: Array, residual: Array | None = None) -> Array:
    """``nnx.relu(norm(x) + residual)``; a `BatchNorm` in training takes no further pass for it.

    Args:
      norm: a normalisation, or any other layer.
      x: what it takes.
      residual: of the shape of the result; None: nothing is added.

    Returns:
      An array of the shape of the result.

    Example:
      >>> norm = BatchNorm(1, rngs=nnx.Rngs(0))
      >>> rectified(norm, jnp.array([[0.0], [2.0]]))[0].item()
      0.0
    """
    if isinstance(norm, BatchNorm) and norm._is_one_function(x, residual):
        return norm._standardized(x, rectify=True, residual=residual)
    y = norm(x)
    return nnx.relu(y if residual is None else y + residual)


def values_per_feature(norm: nnx.BatchNorm, x: Array, mask: Array | None) -> Array | int:
    """How many values of ``x`` a batch normalisation's statistics are made of.

    Args:
      norm: its feature axis and the mapped axis that it sums over, if there is one, matter.
      x: its input.
      mask: True where an element takes part; broadcasts against ``x``.

    Returns:
      One number for all features, or with a mask (num_features,).
    """
    feature_axis = norm.axis % x.ndim
    count: Array | int
    if mask is None:
        count = x.size // x.shape[feature_axis]
    else:
        others = tuple(axis for axis in range(x.ndim) if axis != feature_axis)
        count = jnp.broadcast_to(mask, x.shape).sum(others)
    if norm.axis_name is not None:
        count = lax.psum(count, norm.axis_name, axis_index_groups=norm.axis_index_groups)
    return count


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` with PyTorch's epsilon and the arithmetic of ``BatchNorm`` above.

    Args:
      num_features: size of the last axis.
      epsilon: added to the variance.
      dtype: dtype of the result; None: that of the input and parameters, promoted.
      param_dtype: dtype of ``scale`` and ``bias``.
      rngs: see ``nnx.LayerNorm``.
      **options: the other arguments of ``nnx.LayerNorm``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> norm = LayerNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> [float(y) for y in norm(jnp.array([-2601.0, -2599.0]))]
      [-1.0, 1.0]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_fast_variance=False,
            promote_dtype=promote_to_float32,
            rngs=rngs,
            **options,
        )


BatchNormName = Literal["batch", "centered_batch"]

BATCH_NORMS: Mapping[str, Callable[..., BatchNorm]] = {
    "batch": BatchNorm,
    "centered_batch": functools.partial(BatchNorm, center_features=True),
}
"""What models call them: 'centered_batch' is the one with ``center_features``."""


def get_batch_norm(norm: BatchNormName) -> Callable[..., BatchNorm]:
    """The batch normalisation of that name.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> get_batch_norm("centered_batch")(8, rngs=nnx.Rngs(0)).center_features
      True
    """
    try:
        return BATCH_NORMS[norm]
    except (KeyError, TypeError):
        known = " or ".join(map(repr, BATCH_NORMS))
        raise ValueError(f"norm must be {known}, got {norm!r}") from None
