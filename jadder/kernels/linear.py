"""The forms of both products that are matrix products: full-precision gradients, and Euclid.

With ψ(d) = scale · d the sums over differences factor, for instance
``Σ_m (x[m, k] - w[k, n]) g[m, n] = (xᵀ g)[k, n] - w[k, n] Σ_m g[m, n]``: a dot product, or a
convolution's own gradient, minus an outer correction. Both parts may be large and nearly equal, so
callers ask for full float32 precision unless told otherwise.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jadder.kernels.spec import ConvSpec
from jadder.rules import Clip


def matmul_dx(
    x: Array, w: Array, g: Array, clip: Clip, *, out_dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    """dx = scale · (g wᵀ - x Σ_n g)."""
    pulled = _einsum("bmn,bkn->bmk", g, w, out_dtype, precision)
    g_sum = jnp.sum(g, axis=2, keepdims=True, dtype=out_dtype)
    return clip.scale * (pulled - x.astype(out_dtype) * g_sum)


def matmul_dw(
    x: Array, w: Array, g: Array, clip: Clip, *, out_dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    """dw = scale · (xᵀ g - w Σ_m g)."""
    pulled = _einsum("bmk,bmn->bkn", x, g, out_dtype, precision)
    g_sum = jnp.sum(g, axis=1, keepdims=True, dtype=out_dtype)
    return clip.scale * (pulled - w.astype(out_dtype) * g_sum)


def conv_dx(
    x: Array,
    w: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> Array:
    """dx = scale · (the transposed convolution of g with w, minus x times that with ones)."""
    x, w, g = x.astype(out_dtype), w.astype(out_dtype), g.astype(out_dtype)
    groups = spec.feature_group_count
    pulled = transpose_x(x, w, g, spec, precision)
    by_group = g.reshape(*g.shape[:-1], groups, -1).sum(-1)
    ones = jnp.ones((*w.shape[:-2], 1, groups), out_dtype)
    g_sum = transpose_x(x[..., :groups], ones, by_group, spec, precision)
    return clip.scale * (pulled - x * jnp.repeat(g_sum, x.shape[-1] // groups, axis=-1))


def conv_dw(
    x: Array,
    w: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> Array:
    """dw = scale · (a convolution's kernel gradient - w Σ_{b, o} g)."""
    x, w, g = x.astype(out_dtype), w.astype(out_dtype), g.astype(out_dtype)
    transpose = jax.linear_transpose(lambda w: conv_product(x, w, spec, precision), w)
    (pulled,) = transpose(g)
    g_sum = jnp.sum(g, axis=range(g.ndim - 1)).reshape((1,) * (w.ndim - 1) + (-1,))
    return clip.scale * (pulled - w * g_sum)


def euclid_matmul(
    x: Array, w: Array, *, out_dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    """y = -Σ_k (x - w)² = 2 x·w - Σ_k x² - Σ_k w², for x (B, M, K) and w (B, K, N)."""
    product = _einsum("bmk,bkn->bmn", x, w, out_dtype, precision)
    x, w = x.astype(out_dtype), w.astype(out_dtype)
    return 2 * product - jnp.sum(x * x, 2, keepdims=True) - jnp.sum(w * w, 1, keepdims=True)


def euclid_conv(
    x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    """y = -Σ (patch - filter)²; the patches' squares are added up by a convolution with ones."""
    x, w = x.astype(out_dtype), w.astype(out_dtype)
    groups = spec.feature_group_count
    product = conv_product(x, w, spec, precision)
    by_group = (*x.shape[:-1], groups, x.shape[-1] // groups)
    squares = jnp.sum((x * x).reshape(by_group), axis=-1)
    ones = jnp.ones((*w.shape[:-2], 1, groups), out_dtype)
    x_sum = jnp.repeat(conv_product(squares, ones, spec, precision), w.shape[-1] // groups, -1)
    w_sum = jnp.sum(w * w, axis=range(w.ndim - 1)).reshape((1,) * (x.ndim - 1) + (-1,))
    return 2 * product - x_sum - w_sum


def conv_product(x: Array, w: Array, spec: ConvSpec, precision: lax.PrecisionLike) -> Array:
    """The multiplying convolution of the same spec, channels last."""
    rank = x.ndim
    channels_last = (0, rank - 1, *range(1, rank - 1))
    window_first = (rank - 1, rank - 2, *range(rank - 2))
    layout = lax.ConvDimensionNumbers(channels_last, window_first, channels_last)
    return lax.conv_general_dilated(
        x,
        w,
        spec.window_strides,
        spec.padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        layout,
        feature_group_count=spec.feature_group_count,
        precision=precision,
    )


def transpose_x(
    x: Array, w: Array, g: Array, spec: ConvSpec, precision: lax.PrecisionLike
) -> Array:
    transpose = jax.linear_transpose(lambda x: conv_product(x, w, spec, precision), x)
    return transpose(g)[0]


def _einsum(
    subscripts: str, a: Array, b: Array, out_dtype: DTypeLike, precision: lax.PrecisionLike
) -> Array:
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=out_dtype)
