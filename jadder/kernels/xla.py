"""The adder products as loops that XLA compiles for any platform.

XLA has no instruction for a sum of absolute differences, and a broadcast difference that is
reduced afterwards writes an (M, K, N) array or runs at a hundredth of the hardware's speed. Here a
loop runs over the terms of the sum. Each turn adds a chunk of terms, unrolled, to an accumulator
of the output's shape in one elementwise fusion, whose lanes are the output's last dimension.

The operands of a turn are carried over from the turn before it. That keeps XLA's CPU compiler from
fusing the slices that cut them out into the unrolled arithmetic, which otherwise happens for short
chunks and makes the loop six to eight times slower. With ``differentiable`` each turn cuts out its
own, so that a derivative of the loop keeps nothing of a turn: its temporaries, too, have the
operands' sizes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jadder.kernels import linear
from jadder.kernels.spec import (
    ConvSpec,
    Phase,
    Phases,
    forward_phases,
    reach,
    transpose_phases,
    without_distant_taps,
)
from jadder.kernels.varying import zeros_like_operands
from jadder.rules import Clip

CHUNK = 16  # terms unrolled in one fusion: fewer cost memory traffic, more spill registers
BLOCK_ROWS = 256  # patches cut out at a time for a bounded kernel gradient


def matmul(x: Array, w: Array, *, out_dtype: DTypeLike, differentiable: bool = False) -> Array:
    """y[b, m, n] = -Σ_k |x[b, m, k] - w[b, k, n]|."""
    steps, chunk = _chunks(x.shape[2])
    x = pad_to(x, 2, steps * chunk)
    w = jnp.swapaxes(pad_to(w, 1, steps * chunk), 0, 1)[:, :, None]

    def load(i: Array | int) -> tuple[Array, Array]:
        rows = lax.dynamic_slice_in_dim(x, i * chunk, chunk, 2)
        lanes = lax.dynamic_slice_in_dim(w, i * chunk, chunk, 0)
        return rows.astype(out_dtype), lanes.astype(out_dtype)

    y = zeros_like_operands((*x.shape[:2], w.shape[3]), out_dtype, x, w)
    return _sum_terms(y, steps, load, lambda row, lane: -jnp.abs(row - lane), differentiable)


def matmul_dx(
    x: Array,
    w: Array,
    g: Array,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
    differentiable: bool = False,
) -> Array:
    """dx[b, m, k] = Σ_n ψ(w[b, k, n] - x[b, m, k]) g[b, m, n]."""
    if clip.is_linear:
        return linear.matmul_dx(x, w, g, clip, out_dtype=out_dtype, precision=precision)
    steps, chunk = _chunks(w.shape[2])
    g = pad_to(g, 2, steps * chunk)
    w = jnp.moveaxis(pad_to(w, 2, steps * chunk), 2, 0)[:, :, None]
    x = x.astype(out_dtype)

    def load(i: Array | int) -> tuple[Array, Array]:
        rows = lax.dynamic_slice_in_dim(g, i * chunk, chunk, 2)
        lanes = lax.dynamic_slice_in_dim(w, i * chunk, chunk, 0)
        return rows.astype(out_dtype), lanes.astype(out_dtype)

    dx = zeros_like_operands(x.shape, out_dtype, x, w, g)
    return _sum_terms(dx, steps, load, lambda row, lane: clip(lane - x) * row, differentiable)


def matmul_dw(
    x: Array,
    w: Array,
    g: Array,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
    differentiable: bool = False,
) -> Array:
    """dw[b, k, n] = Σ_m ψ(x[b, m, k] - w[b, k, n]) g[b, m, n]."""
    if clip.is_linear:
        return linear.matmul_dw(x, w, g, clip, out_dtype=out_dtype, precision=precision)
    steps, chunk = _chunks(x.shape[1])
    x, g = pad_to(x, 1, steps * chunk), pad_to(g, 1, steps * chunk)
    w = w.astype(out_dtype)

    def load(i: Array | int) -> tuple[Array, Array]:
        rows = jnp.swapaxes(lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1), 1, 2)
        lanes = jnp.swapaxes(lax.dynamic_slice_in_dim(g, i * chunk, chunk, 1), 0, 1)[:, :, None]
        return rows.astype(out_dtype), lanes.astype(out_dtype)

    dw = zeros_like_operands(w.shape, out_dtype, x, w, g)
    return _sum_terms(dw, steps, load, lambda row, lane: clip(row - w) * lane, differentiable)


def conv(
    x: Array,
    w: Array,
    spec: ConvSpec,
    *,
    out_dtype: DTypeLike,
    differentiable: bool = False,
) -> Array:
    """y[b, o, f] = -Σ_{tap, c} |x[b, position(o, tap), c] - w[tap, c, f]|, zeros taking part."""
    window, groups = w.shape[:-2], spec.feature_group_count
    x, w = split_groups(x, groups), by_tap(w, groups)
    magnitude = jnp.sum(jnp.abs(w.astype(out_dtype)), axis=1)

    def phase_sum(source: Array, phase: Targets) -> Array:
        y = zeros_like_operands((x.shape[0], *phase.counts, *w.shape[2:]), out_dtype, x, w)
        absent = phase.absent(len(w))
        if len(absent):  # these taps meet only zeros, of input dilation or padding: |0 - w|
            least = jnp.sum(magnitude[absent], axis=0)
            y = y - least.reshape((1,) * (y.ndim - least.ndim) + least.shape)
        return sum_taps(y, source, w, phase, lambda row, lane: -jnp.abs(row - lane), differentiable)

    dimensions = forward_phases(spec, x.shape[1:-2], window)
    return merge_groups(each_phase(x, dimensions, window, phase_sum))


def conv_dx(
    x: Array,
    w: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
    differentiable: bool = False,
) -> Array:
    """dx[b, p, c] = Σ_{tap, f} ψ(w[tap, c, f] - x[b, p, c]) g[b, output(p, tap), f]."""
    if clip.is_linear:
        return linear.conv_dx(x, w, g, spec, clip, out_dtype=out_dtype, precision=precision)
    window, groups = w.shape[:-2], spec.feature_group_count
    x, w = x.astype(out_dtype), w.astype(out_dtype)
    undefined = undefined_dx(x, w, g.shape[1:-1], spec)
    if undefined is not None:
        x, w = jnp.nan_to_num(x), jnp.nan_to_num(w)
    x, g = split_groups(x, groups), split_groups(g, groups)
    w = jnp.swapaxes(by_tap(w, groups), 1, 3)
    dimensions = transpose_phases(spec, x.shape[1:-2], window)
    periods = [dimension.period for dimension in dimensions]

    def phase_sum(source: Array, phase: Targets) -> Array:
        every = (slice(r, None, p) for r, p in zip(phase.residues, periods, strict=True))
        target = x[(slice(None), *every)]
        dx = zeros_like_operands(target.shape, out_dtype, x, w, g)
        return sum_taps(
            dx, source, w, phase, lambda row, lane: clip(lane - target) * row, differentiable
        )

    dx = merge_groups(each_phase(g, dimensions, window, phase_sum))
    return dx if undefined is None else jnp.where(undefined, jnp.nan, dx)


def conv_dw(
    x: Array,
    w: Array,
    g: Array,
    spec: ConvSpec,
    clip: Clip,
    *,
    out_dtype: DTypeLike,
    precision: lax.PrecisionLike = None,
    differentiable: bool = False,
) -> Array:
    """dw[tap, c, f] = Σ_{b, o} ψ(x[b, position(o, tap), c] - w[tap, c, f]) g[b, o, f].

    Patches are cut out for a few rows of outputs at a time and multiplied as matrices are.
    """
    if clip.is_linear:
        return linear.conv_dw(x, w, g, spec, clip, out_dtype=out_dtype, precision=precision)
    window, groups = w.shape[:-2], spec.feature_group_count
    batch, first, *rest = g.shape[:-1]
    block = max(1, min(first, BLOCK_ROWS // max(1, math.prod(rest))))
    blocks = -(-first // block)
    filters = jnp.moveaxis(by_tap(w, groups), 2, 0).reshape(groups, -1, w.shape[-1] // groups)

    stride, dilation = spec.window_strides[0], spec.rhs_dilation[0]

    def rows_seen(outputs: int) -> int:
        return (outputs - 1) * stride + (window[0] - 1) * dilation + 1

    g = pad_to(g, 1, blocks * block)
    # Not what lies beyond the outputs: a NaN there must not meet the zeros after g's end.
    x = lax.slice_in_dim(_dilate(x, spec), 0, rows_seen(first), axis=1)
    x, seen = pad_to(x, 1, rows_seen(blocks * block)), rows_seen(block)

    def add_block(i: Array, dw: Array) -> Array:
        image, row = i // blocks, i % blocks * block
        x_block = _cut(x, image, row * stride, seen)
        g_block = split_groups(_cut(g, image, row, block), groups)
        patches = _patches(split_groups(x_block, groups), (block, *rest), window, spec)
        g_rows = jnp.moveaxis(g_block.reshape(-1, *g_block.shape[-2:]), 1, 0)
        return dw + matmul_dw(
            patches, filters, g_rows, clip, out_dtype=out_dtype, differentiable=differentiable
        )

    if differentiable:
        add_block = jax.checkpoint(add_block)
    dw = zeros_like_operands(filters.shape, out_dtype, x, w, g)
    dw = lax.fori_loop(0, batch * blocks, add_block, dw)
    return jnp.moveaxis(dw, 0, 1).reshape(w.shape)


def undefined_dx(x: Array, w: Array, out: Sequence[int], spec: ConvSpec) -> Array | None:
    """Where `conv_dx` is NaN because ψ(w - x) is, as x's shape; None if all windows lie inside.

    ψ(NaN) · 0 is NaN. Where windows hang over the edge, a kernel that puts zeros in the place of
    the outputs that are not there must be given no NaN and no infinities that cancel, and has its
    result marked afterwards.

    Args:
      out: the output's spatial shape.
    """
    window, groups = w.shape[:-2], spec.feature_group_count
    dimensions = transpose_phases(spec, x.shape[1:-1], window)
    near = [without_distant_taps(d, n) for d, n in zip(dimensions, out, strict=True)]
    if not any(any(reach(d, n)) for d, n in zip(near, out, strict=True)):
        return None
    taps = w.reshape(*w.shape[:-1], groups, w.shape[-1] // groups)
    kinds = [jnp.isnan(taps), taps == jnp.inf, taps == -jnp.inf]
    marks = [jnp.swapaxes(jnp.any(kind, axis=-1), -1, -2).reshape(*window, -1) for kind in kinds]
    marks.append(jnp.ones((*window, 1), bool))
    # How often each pixel meets each mark, in any channel: the transpose of a small convolution.
    weights = jnp.concatenate(marks, axis=-1).astype(jnp.float32)[..., None]
    outputs = zeros_like_operands((1, *out, 1), jnp.float32, x, w) + 1
    pixels = zeros_like_operands((1, *x.shape[1:-1], weights.shape[-2]), jnp.float32, x, w)
    one_group = dataclasses.replace(spec, feature_group_count=1)
    met = linear.transpose_x(pixels, weights, outputs, one_group, None) > 0
    channels = x.shape[-1]
    nan, above, below, anything = jnp.split(met, [channels, 2 * channels, 3 * channels], axis=-1)
    undefined = nan | (anything & jnp.isnan(x)) | (above & (x == jnp.inf))
    return undefined | (below & (x == -jnp.inf))


class Targets(NamedTuple):
    """One residue class of targets in each dimension, and the taps that all of them meet.

    Attributes:
      taps: their numbers in the window, (n,).
      starts: the source of the first target through each, (n, rank).
    """

    residues: tuple[int, ...]
    counts: tuple[int, ...]
    steps: tuple[int, ...]
    taps: NDArray[np.int64]
    starts: NDArray[np.int64]

    def absent(self, window: int) -> NDArray[np.intp]:
        """The other taps of a window that has so many."""
        return np.setdiff1d(np.arange(window), self.taps, assume_unique=True)


def _sum_terms(
    total: Array,
    steps: int,
    load: Callable[[Array | int], tuple[Array, Array]],
    term: Callable[[Array, Array], Array],
    differentiable: bool,
) -> Array:
    """Adds term(rows[..., c], lanes[c]) for every c of each of ``steps`` loaded chunks."""

    def add_terms(total: Array, rows: Array, lanes: Array) -> Array:
        leading = (1,) * (total.ndim - lanes.ndim + 1)  # nobody's ranks are promoted in silence
        for c in range(lanes.shape[0]):
            lane = lanes[c].reshape(leading + lanes.shape[1:])
            total = total + term(rows[..., c : c + 1], lane)
        return total

    def add_carried(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return add_terms(*carry), *load(i + 1)

    @jax.checkpoint
    def add_loaded(i: Array, total: Array) -> Array:
        return add_terms(total, *load(i))

    if differentiable:
        return lax.fori_loop(0, steps, add_loaded, total)
    return lax.fori_loop(0, steps, add_carried, (total, *load(0)))[0]


def sum_taps(
    total: Array,
    source: Array,
    w: Array,
    phase: Targets,
    term: Callable[[Array, Array], Array],
    differentiable: bool = False,
) -> Array:
    """Adds the terms of every tap of ``phase``.

    source is (batch, *spatial, groups, C) and w (taps, C, groups, lanes).
    """
    if not len(phase.taps):
        return total
    steps, chunk = _chunks(source.shape[-1], turns=len(phase.taps))
    at_once = _taps_at_once(len(phase.taps), source.shape[-1]) if steps == 1 else 1
    source, w = pad_to(source, source.ndim - 1, steps * chunk), pad_to(w, 1, steps * chunk)
    turns = len(phase.taps) // at_once
    taps = jnp.asarray(phase.taps.reshape(turns, at_once), jnp.int32)
    starts = jnp.asarray(phase.starts.reshape(turns, at_once, len(phase.counts)), jnp.int32)
    extent = [(n - 1) * step + 1 for n, step in zip(phase.counts, phase.steps, strict=True)]
    every = (slice(None), *(slice(None, None, step) for step in phase.steps))

    def load(i: Array | int) -> tuple[Array, Array]:
        i, zero = jnp.asarray(i, jnp.int32), jnp.int32(0)
        turn_taps = lax.dynamic_index_in_dim(taps, i // steps, keepdims=False)
        turn_starts = lax.dynamic_index_in_dim(starts, i // steps, keepdims=False)
        channel = i % steps * chunk
        rows, lanes = [], []
        for tap, start in zip(turn_taps, turn_starts, strict=True):
            window = lax.dynamic_slice(
                source,
                (zero, *start, zero, channel),
                (source.shape[0], *extent, source.shape[-2], chunk),
            )
            rows.append(window[every])
            one_tap = (1, chunk, *w.shape[2:])
            lanes.append(lax.dynamic_slice(w, (tap, channel, zero, zero), one_tap)[0])
        row, lane = jnp.concatenate(rows, -1), jnp.concatenate(lanes, 0)
        return row.astype(total.dtype), lane.astype(total.dtype)

    return _sum_terms(total, turns * steps, load, term, differentiable)


def _chunks(terms: int, *, turns: int = 1) -> tuple[int, int]:
    """How to cut ``terms`` for each of ``turns``: (chunks, terms of a chunk), little left over.

    A loop of a single turn would be inlined, and its slices fused into the arithmetic.
    """
    steps = -(-terms // CHUNK)
    if steps * turns == 1 and terms > 1:
        steps = 2
    return steps, -(-terms // steps)


def _taps_at_once(taps: int, channels: int) -> int:
    """How many taps of few channels share a turn; at least two turns remain where there can be."""
    most = min(taps - 1, CHUNK // channels)
    return max((n for n in range(1, most + 1) if taps % n == 0), default=1)


def each_phase(
    source: Array,
    dimensions: Sequence[Phases],
    window: Sequence[int],
    phase_sum: Callable[[Array, Targets], Array],
) -> Array:
    """``phase_sum`` of every combination of residue classes, interleaved into one array."""
    sizes = source.shape[1:-2]
    dimensions = [without_distant_taps(d, n) for d, n in zip(dimensions, sizes, strict=True)]
    pads = [reach(d, n) for d, n in zip(dimensions, source.shape[1:-2], strict=True)]
    padding = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0), (0, 0, 0)]
    if any(low or high for low, high in pads):
        source = lax.pad(source, jnp.zeros((), source.dtype), padding)
    lows = [low for low, _ in pads]
    combinations = list(itertools.product(*(d.phases for d in dimensions)))
    sums = [
        phase_sum(source, residue_targets(phases, dimensions, window, lows))
        for phases in combinations
    ]
    if all(d.are_complete for d in dimensions):
        return interleave(sums, dimensions)
    first = [Phase(0, 1, ()) for _ in dimensions]
    unmet = phase_sum(source, residue_targets(first, dimensions, window, lows))
    unmet = unmet[(slice(None), *(slice(0, 1) for _ in dimensions))]
    shape = (unmet.shape[0], *(d.targets for d in dimensions), *unmet.shape[-2:])
    whole = jnp.broadcast_to(unmet, shape)
    for part, phases in zip(sums, combinations, strict=True):
        every = (slice(p.residue, None, d.period) for p, d in zip(phases, dimensions, strict=True))
        whole = whole.at[(slice(None), *every)].set(part)
    return whole


def residue_targets(
    phases: Sequence[Phase],
    dimensions: Sequence[Phases],
    window: Sequence[int],
    lows: Sequence[int],
) -> Targets:
    """Joins one residue class of each dimension; starts count from the padded source's edge."""
    pairs = [np.array(phase.taps, np.int64).reshape(-1, 2) for phase in phases]
    numbers = np.meshgrid(*(each[:, 0] for each in pairs), indexing="ij")
    places = np.meshgrid(
        *(each[:, 1] + low for each, low in zip(pairs, lows, strict=True)), indexing="ij"
    )
    taps = np.ravel_multi_index(numbers, tuple(window)).reshape(-1)
    starts = np.stack(places, -1).reshape(-1, len(window))
    return Targets(
        residues=tuple(phase.residue for phase in phases),
        counts=tuple(phase.size for phase in phases),
        steps=tuple(dimension.step for dimension in dimensions),
        taps=taps,
        starts=starts,
    )


def interleave(sums: Sequence[Array], dimensions: Sequence[Phases]) -> Array:
    """The inverse of taking every period-th value, from each residue on, in each dimension."""
    classes = [len(dimension.phases) for dimension in dimensions]
    if len(sums) == 1:
        return sums[0]
    targets = [sum(phase.size for phase in dimension.phases) for dimension in dimensions]
    for axis, dimension in enumerate(dimensions, start=1):
        longest = dimension.phases[0].size
        sums = [pad_to(part, axis, longest) for part in sums]
    spatial = len(dimensions)
    stacked = jnp.stack(sums).reshape(*classes, *sums[0].shape)
    order = [spatial]
    for d in range(spatial):
        order += [spatial + 1 + d, d]
    stacked = jnp.transpose(stacked, (*order, *range(2 * spatial + 1, stacked.ndim)))
    shape = [n * stacked.shape[2 + 2 * d] for d, n in enumerate(sums[0].shape[1 : spatial + 1])]
    merged = stacked.reshape(stacked.shape[0], *shape, *stacked.shape[2 * spatial + 1 :])
    return merged[(slice(None), *(slice(n) for n in targets))]


def _patches(x: Array, out: Sequence[int], window: Sequence[int], spec: ConvSpec) -> Array:
    """What each of ``out`` positions sees of x (*spatial, G, C): (G, positions, taps · C)."""
    views = []
    for tap in itertools.product(*(range(taps) for taps in window)):
        index = tuple(
            slice(t * dilation, t * dilation + (n - 1) * stride + 1, stride)
            for t, n, stride, dilation in zip(
                tap, out, spec.window_strides, spec.rhs_dilation, strict=True
            )
        )
        views.append(x[index])
    stacked = jnp.moveaxis(jnp.stack(views, axis=-2), -3, 0)
    return stacked.reshape(stacked.shape[0], math.prod(out), -1)


def _dilate(x: Array, spec: ConvSpec) -> Array:
    """x with the zeros of padding and input dilation written out."""
    interior = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(spec.padding, spec.lhs_dilation, strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *interior, (0, 0, 0)])


def _cut(array: Array, image: Array, row: Array, rows: int) -> Array:
    """Rows of one image: (rows, *rest)."""
    one = lax.dynamic_index_in_dim(array, image, keepdims=False)
    return lax.dynamic_slice_in_dim(one, row, rows)


def by_tap(w: Array, groups: int) -> Array:
    """A kernel (*window, C, F) as (taps, C, groups, F / groups)."""
    return w.reshape(-1, w.shape[-2], groups, w.shape[-1] // groups)


def split_groups(array: Array, groups: int) -> Array:
    return array.reshape(*array.shape[:-1], groups, array.shape[-1] // groups)


def merge_groups(array: Array) -> Array:
    return array.reshape(*array.shape[:-2], array.shape[-2] * array.shape[-1])


def pad_to(array: Array, axis: int, size: int) -> Array:
    """``array`` with zeros after its end along ``axis``, up to ``size``."""
    missing = size - array.shape[axis]
    if missing <= 0:
        return array
    padding = [(0, missing if d == axis else 0, 0) for d in range(array.ndim)]
    return lax.pad(array, jnp.zeros((), array.dtype), padding)
