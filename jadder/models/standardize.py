"""Batch normalisation as one function with a derivative of its own.

Programs for one CPU have it in native code, which passes over a batch twice, once for the sums and
once for the result; XLA takes a pass for each sum. It is chosen where the program is lowered, and
has no ``implementation=`` as the products have: it computes the same to rounding, and exported
programs never have it (`jadder.kernels.on_one_cpu`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jadder.kernels import cpu
from jadder.kernels.on_one_cpu import OnOneCpu

Three = tuple[Array, Array, Array]


def standardize(
    x: Array,
    scale: Array,
    bias: Array,
    axis: int,
    epsilon: float,
    *,
    center_features: bool = False,
    rectify: bool = False,
    residual: Array | None = None,
) -> Three:
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
      center_features: whether x is taken less its mean over the features, at each position.
      rectify: whether what is negative, of the result, is zero instead.
      residual: of the shape of x, added to the result before; None: nothing.

    Returns:
      The result, the mean and the biased variance, (features,).

    Example:
      >>> y, mean, var = standardize(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), -1, 0.0)
      >>> y[:, 0].tolist(), mean.item(), var.item()
      ([-1.0, 1.0], 2.0, 1.0)
    """
    options = (
        ("axis", axis % x.ndim),
        ("epsilon", epsilon),
        ("center_features", center_features),
        ("rectify", rectify),
    )
    added = () if residual is None else (residual,)
    return _standardize(options, x, scale, bias, *added)


Options = tuple[tuple[str, Any], ...]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(options: Options, x: Array, *others: Array) -> Three:
    return _chosen(_VALUES, x, *others, **dict(options))


@_standardize.defjvp
def _differentiate(
    options: Options, primals: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Three, Three]:
    y, mean, var = _standardize(options, *primals)
    own = dict(options)
    known = (*primals[:3], mean, var)
    if len(primals) == 3:
        return (y, mean, var), _chosen(_TANGENTS, *known, *tangents, **own)
    # With a residual, only the result tells where it is positive.
    rectify, own["rectify"] = own["rectify"], False
    dy, dmean, dvar = _chosen(_TANGENTS, *known, *tangents[:3], **own)
    dy = dy + tangents[3]
    if rectify:
        dy = jnp.where(y > 0, dy, 0)
    return (y, mean, var), (dy, dmean, dvar)


def _values(
    x: Array,
    scale: Array,
    bias: Array,
    *residual: Array,
    axis: int,
    epsilon: float,
    center_features: bool,
    rectify: bool,
) -> Three:
    others = _others(x, axis)
    if center_features:
        x = _centered(x, axis)
    mean = x.mean(others)
    centered = x - _along(mean, x, axis)
    var = lax.square(centered).mean(others)
    factor = lax.rsqrt(var + epsilon) * scale
    y = centered * _along(factor, x, axis) + _along(bias, x, axis)
    for each in residual:
        y = y + each
    return jnp.maximum(y, 0) if rectify else y, mean, var


def _tangents(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    var: Array,
    dx: Array,
    dscale: Array,
    dbias: Array,
    *,
    axis: int,
    epsilon: float,
    center_features: bool,
    rectify: bool,
) -> Three:
    others = _others(x, axis)
    if center_features:
        x, dx = _centered(x, axis), _centered(dx, axis)
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
    if rectify:
        y = (x - _along(mean, x, axis)) * _along(inverse * scale, x, axis) + _along(bias, x, axis)
        dy = jnp.where(y > 0, dy, 0)
    return dy, dmean, 2 * along / inverse


def _gradients(
    x: Array, scale: Array, bias: Array, mean: Array, var: Array, *cotangents: Array, **options: Any
) -> Three:
    tangents = functools.partial(_tangents, x, scale, bias, mean, var, **options)
    dx, dscale, dbias = jax.linear_transpose(tangents, x, scale, bias)(cotangents)
    return dx, dscale, dbias


def _native(function: Any) -> Any:
    """The function without the axis, which is the last."""

    def of_last_axis(*operands: Array, axis: int, **options: Any) -> Three:
        return function(*operands, **options)

    return of_last_axis


_VALUES = OnOneCpu("standardize", _values, _native(cpu.standardize), like=(0, 1, 1))
_TANGENTS = OnOneCpu("standardize_tangent", _tangents, None, like=(0, 1, 1))
_GRADIENTS = OnOneCpu(
    "standardize_gradient", _gradients, _native(cpu.standardize_gradient), like=(0, 1, 2)
)
_TANGENTS.transposed_by(_GRADIENTS, linear=3)


def _chosen(function: OnOneCpu, x: Array, *others: Array, axis: int, **options: Any) -> Any:
    if axis != x.ndim - 1:
        return function.formula(x, *others, axis=axis, **options)
    return function(x, *others, axis=axis, **options)


def _centered(x: Array, axis: int) -> Array:
    return x - x.mean(axis, keepdims=True)


def _others(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis)


def _along(features: Array, x: Array, axis: int) -> Array:
    return jnp.expand_dims(features, _others(x, axis))
