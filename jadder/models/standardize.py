"""Batch normalisation as one function with a derivative of its own."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def standardize(
    x: Array, scale: Array, bias: Array, axis: int, epsilon: float
) -> tuple[Array, Array, Array]:
    """scale · (x - mean) / √(var + epsilon) + bias, with mean and variance over all other axes.

    The derivative is written so that both sums over the batch that a gradient needs, Σ g and
    Σ g (x - mean) / √(var + epsilon), are taken once: those that JAX derives from the formula take
    each of them twice, for x and for the parameters, and pass over the batch once more for a part
    of the mean's gradient that is zero.

    Args:
      x: floating, with the features at ``axis``.
      scale: (features,).
      bias: (features,).
      axis: of the features.
      epsilon: added to the variance.

    Returns:
      The result, the mean and the biased variance, (features,).

    Example:
      >>> y, mean, var = standardize(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), -1, 0.0)
      >>> y[:, 0].tolist(), mean.item(), var.item()
      ([-1.0, 1.0], 2.0, 1.0)
    """
    others = _others(x, axis)
    mean = x.mean(others)
    centered = x - _along(mean, x, axis)
    var = lax.square(centered).mean(others)
    factor = lax.rsqrt(var + epsilon) * scale
    return centered * _along(factor, x, axis) + _along(bias, x, axis), mean, var


@standardize.defjvp
def _standardize_jvp(
    axis: int, epsilon: float, primals: Sequence[Array], tangents: Sequence[Array]
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    y, mean, var = standardize(x, scale, bias, axis, epsilon)
    others = _others(x, axis)
    inverse = lax.rsqrt(var + epsilon)
    standard = (x - _along(mean, x, axis)) * _along(inverse, x, axis)
    dmean, along = dx.mean(others), (standard * dx).mean(others)
    # Factors of the features stay with the features: the sums of the transpose are then the same
    # for x as for the parameters.
    dy = (
        _along(scale * inverse, x, axis) * dx
        + standard * _along(dscale - scale * inverse * along, x, axis)
        + _along(dbias - scale * inverse * dmean, x, axis)
    )
    return (y, mean, var), (dy, dmean, 2 * along / inverse)


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _along(features: Array, x: Array, axis: int) -> Array:
    return jnp.expand_dims(features, _others(x, axis))
