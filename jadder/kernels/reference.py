"""The literal definition of the adder products and of their gradients.

Every difference is written out as one (batch, M, K, N) array: this file is for reading and for
testing the others against, not for running at size. A convolution is the product of each patch,
padded and dilated with zeros, with each filter.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip


def matmul(x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
    """y[b, m, n] = -Σ_k |x[b, m, k] - w[b, k, n]|."""
    x, w = x.astype(out_dtype), w.astype(out_dtype)
    return -jnp.sum(jnp.abs(x[..., None] - w[:, None]), axis=2)


def matmul_dx(
    x: Array,
    w: Array,
    g: Array,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Array:
    """dx[b, m, k] = Σ_n ψ(w[b, k, n] - x[b, m, k]) g[b, m, n]."""
    x, w, g = x.astype(out_dtype), w.astype(out_dtype), g.astype(out_dtype)
    return jnp.sum(clip(w[:, None] - x[..., None]) * g[:, :, None], axis=3)


def matmul_dw(
    x: Array,
    w: Array,
    g: Array,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Array:
    """dw[b, k, n] = Σ_m ψ(x[b, m, k] - w[b, k, n]) g[b, m, n]."""
    x, w, g = x.astype(out_dtype), w.astype(out_dtype), g.astype(out_dtype)
    return jnp.sum(clip(x[..., None] - w[:, None]) * g[:, :, None], axis=1)


def conv(x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
    """y[b, o, f] = -Σ_{tap, c} |patch(x)[b, o, tap, c] - w[tap, c, f]|, group by group."""
    patches, filters = _patches(x, w.shape, spec), _filters(w, spec)
    y = jnp.moveaxis(matmul(patches, filters, out_dtype=out_dtype), 0, 1)
    return y.reshape(x.shape[0], *spec.out_spatial(x.shape[1:-1], w.shape[:-2]), w.shape[-1])


def conv_dx(
    x: Array,
    w: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Array:
    """The patches' gradient, each value added up where the patches took it from."""
    patches, transpose = jax.vjp(lambda x: _patches(x, w.shape, spec), x.astype(out_dtype))
    (dx,) = transpose(
        matmul_dx(patches, _filters(w, spec), _by_group(g, spec), clip, out_dtype=out_dtype)
    )
    return dx


def conv_dw(
    x: Array,
    w: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Array:
    """dw[tap, c, f] = Σ_{b, o} ψ(patch(x)[b, o, tap, c] - w[tap, c, f]) g[b, o, f]."""
    patches, filters = _patches(x, w.shape, spec), _filters(w, spec)
    dw = matmul_dw(patches, filters, _by_group(g, spec), clip, out_dtype=out_dtype)
    return jnp.moveaxis(dw, 0, 1).reshape(w.shape)


def _patches(x: Array, kernel_shape: Sequence[int], spec: ConvSpec) -> Array:
    """What each output sees of x, zeros included: (groups, batch · outputs, taps · C / groups)."""
    window = kernel_shape[:-2]
    out = spec.out_spatial(x.shape[1:-1], window)
    interior = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(spec.padding, spec.lhs_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *interior, (0, 0, 0)])
    views = []
    for tap in itertools.product(*(range(taps) for taps in window)):
        index = tuple(
            slice(t * dilation, t * dilation + (o - 1) * stride + 1 if o else 0, stride)
            for t, o, stride, dilation in zip(
                tap, out, spec.window_strides, spec.rhs_dilation, strict=True
            )
        )
        views.append(x[(slice(None), *index)])
    rows = x.shape[0] * math.prod(out)
    groups = spec.feature_group_count
    if not views:
        return jnp.zeros((groups, rows, 0), x.dtype)
    stacked = jnp.stack(views, axis=-2).reshape(rows, len(views), groups, x.shape[-1] // groups)
    return jnp.moveaxis(stacked, 2, 0).reshape(groups, rows, -1)


def _filters(w: Array, spec: ConvSpec) -> Array:
    """The kernel as one matrix for each group: (groups, taps · C / groups, F / groups)."""
    rows = math.prod(w.shape[:-1])
    return jnp.moveaxis(w.reshape(rows, spec.feature_group_count, -1), 1, 0)


def _by_group(g: Array, spec: ConvSpec) -> Array:
    """An output-shaped array as (groups, batch · outputs, F / groups)."""
    rows = math.prod(g.shape[:-1])
    return jnp.moveaxis(g.reshape(rows, spec.feature_group_count, -1), 1, 0)
