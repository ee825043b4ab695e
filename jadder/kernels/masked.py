"""Adder and Euclid convolutions of which some taps see nothing.

``seen``, of the kernel's shape, is True where a tap takes part. No term of a tap that does not is
added and subtracted again: it is never part of a sum, so whatever lies under it, infinities and NaN
included, changes neither the adder products nor their gradients by a single bit.

The kernel's gradient at a tap depends on that tap alone, so any implementation's will do, with
zeros put in. The forward product and the input's gradient are the loops of `jadder.kernels.xla`
over kernels that carry ``seen`` beside them as further groups.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jadder.kernels import linear
from jadder.kernels.interface import Kernels
from jadder.kernels.spec import ConvSpec, forward_phases, transpose_phases
from jadder.kernels.varying import zeros_like_operands
from jadder.kernels.xla import (
    Targets,
    by_tap,
    each_phase,
    merge_groups,
    split_groups,
    sum_taps,
)
from jadder.rules import Clip


def conv(x: Array, w: Array, seen: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
    """y[b, o, f] = -Σ_{tap, c: seen} |x[b, position(o, tap), c] - w[tap, c, f]|."""
    loops = functools.partial(_conv, spec=spec, out_dtype=out_dtype)
    batch, features = _axes(x)[:1], _axes(w)[-1:]
    space = (None,) * (x.ndim - 2)
    return _placed(loops, (*batch, *space, *(features if features != batch else (None,))))(
        x, w, seen
    )


def _conv(x: Array, w: Array, seen: Array, *, spec: ConvSpec, out_dtype: DTypeLike) -> Array:
    window, groups = w.shape[:-2], spec.feature_group_count
    x, lanes = split_groups(x, groups), _with_seen(by_tap(w, groups), by_tap(seen, groups))
    magnitude = jnp.sum(jnp.abs(jnp.where(seen, w, 0).astype(out_dtype)), axis=-2)
    magnitude = magnitude.reshape(-1, 1, groups, w.shape[-1] // groups)

    def term(row: Array, lane: Array) -> Array:
        lane, part = jnp.split(lane, 2, axis=-2)
        return jnp.where(part != 0, -jnp.abs(row - lane), 0)

    def phase_sum(source: Array, phase: Targets) -> Array:
        shape = (x.shape[0], *phase.counts, groups, w.shape[-1] // groups)
        y = zeros_like_operands(shape, out_dtype, x, w, seen)
        absent = [tap for tap in range(len(lanes)) if tap not in phase.taps]
        if absent:  # these taps meet only the zeros that input dilation inserts: |0 - w|
            least = jnp.sum(magnitude[jnp.array(absent)], axis=0)
            y = y - least.reshape((1,) * (y.ndim - 2) + least.shape[1:])
        return sum_taps(y, source, lanes, phase, term)

    dimensions = forward_phases(spec, x.shape[1:-2], window)
    return merge_groups(each_phase(x, dimensions, window, phase_sum))


def conv_dx(
    x: Array, w: Array, seen: Array, g: Array, spec: ConvSpec, clip: Clip, *, out_dtype: DTypeLike
) -> Array:
    """dx[b, p, c] = Σ_{tap, f: seen} ψ(w[tap, c, f] - x[b, p, c]) g[b, output(p, tap), f]."""
    loops = functools.partial(_conv_dx, spec=spec, clip=clip, out_dtype=out_dtype)
    return _placed(loops, _axes(x))(x, w, seen, g)


def _conv_dx(
    x: Array, w: Array, seen: Array, g: Array, *, spec: ConvSpec, clip: Clip, out_dtype: DTypeLike
) -> Array:
    window, groups = w.shape[:-2], spec.feature_group_count
    x, g = split_groups(x, groups), split_groups(g, groups)
    w, seen = (jnp.swapaxes(by_tap(array, groups), 1, 3) for array in (w, seen))
    lanes = _with_seen(w, seen)
    dimensions = transpose_phases(spec, x.shape[1:-2], window)
    periods = [dimension.period for dimension in dimensions]

    def phase_sum(source: Array, phase: Targets) -> Array:
        every = (slice(r, None, p) for r, p in zip(phase.residues, periods, strict=True))
        target = x[(slice(None), *every)].astype(out_dtype)

        def term(row: Array, lane: Array) -> Array:
            lane, part = jnp.split(lane, 2, axis=-2)
            return jnp.where(part != 0, clip(lane - target) * row, 0)

        dx = zeros_like_operands(target.shape, out_dtype, x, w, seen, g)
        return sum_taps(dx, source, lanes, phase, term)

    return merge_groups(each_phase(g, dimensions, window, phase_sum))


def conv_dw(
    kernels: Kernels,
    x: Array,
    w: Array,
    seen: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
) -> Array:
    """dw[tap, c, f] = Σ_{b, o} ψ(x[b, position(o, tap), c] - w[tap, c, f]) g[b, o, f], or 0."""
    w = jnp.where(seen, w, 0)
    dw = kernels.conv_dw(x, w, g, spec, clip, out_dtype=out_dtype, precision=precision)
    return jnp.where(seen, dw, 0)


def euclid_conv(
    x: Array,
    w: Array,
    seen: Array,
    spec: ConvSpec,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> Array:
    """y = -Σ_{seen} (patch - filter)² = 2 Σ x·w - Σ x² - Σ w², each over what is seen.

    Masked taps are zeros of both kernels, as in a multiplying convolution: finite inputs under them
    change nothing.
    """
    part = seen.astype(out_dtype)
    x, w = x.astype(out_dtype), jnp.where(seen, w, 0).astype(out_dtype)
    product = linear.conv_product(x, w, spec, precision)
    squares = linear.conv_product(x * x, part, spec, precision)
    kernel_squares = jnp.sum(w * w, axis=tuple(range(w.ndim - 1)))
    return 2 * product - squares - kernel_squares.reshape((1,) * (product.ndim - 1) + (-1,))


def _axes(array: Array) -> tuple[Any, ...]:
    """The mesh axes that each dimension's type names, on explicit axes."""
    spec = jax.typeof(array).sharding.spec
    return (*spec, *(None,) * (array.ndim - len(spec)))


def _placed(function: Callable[..., Array], axes: tuple[Any, ...]) -> Callable[..., Array]:
    """``function`` where XLA places what it cuts into slices, its result sharded over ``axes``."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return function
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.sharding.auto_axes(function, out_sharding=sharding)


def _with_seen(w: Array, seen: Array) -> Array:
    """w's groups, then as many of zeros and ones, which its lanes have at the same place."""
    return jnp.concatenate([w, seen.astype(w.dtype)], axis=-2)
