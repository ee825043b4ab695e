"""The adder products as Pallas kernels for TPU, compiled by Mosaic.

Forward products, and gradients of every rule that clips; full-precision gradients are matrix
products, and go to the matrix unit (`linear`). Clipped kernel gradients of convolutions are
`xla`'s. Operands of float32 or bfloat16, sums in float32: bfloat16 becomes float32 inside the
kernel, since the vector unit of a v5e has no narrower arithmetic.

One kernel does it all. It adds up ``term(a[r, k], b[k, l], at[r, l])`` over k, where ``at`` is the
operand that a gradient's difference shares with its result, and there is none in a forward product.

What limits it. The matrix unit cannot take an absolute value, so all terms go through the vector
unit, whose registers are 8 sublanes by 128 lanes: 3 operations per term forward (subtract, absolute
value, subtract from the sum), 5 for a clipped gradient (subtract, max, min, multiply, add), 6 for
the sign rule. Everything else is kept well below that. b[k, l] is spread over sublanes, which a
load does on the way; a[r, k] is spread over lanes, which takes the cross-lane unit: one operation
for 8 rows, used for all of the tile's lanes. A tile of the sum is therefore wide, and of at most 16
registers of the 64, where it stays while 16 terms, unrolled, go by: 8 rows by 1024 lanes cost one
spread and eight loads for 24 operations of the forward sum, 32 rows by 512 lanes four and four for
48. As compiled for a v5e, the inner loop of (4096, 512, 512) fills 77 % of the vector unit's four
slots a cycle forward and 81 % for a clipped gradient; what is lost is mostly the wait for the first
spread. No kernel of this file has been timed on a TPU yet.

The lanes hold whatever dimension is long, so that narrow layers do not idle in 112 of 128 lanes:
in a matmul, rows of x where the result has fewer columns than rows; in a convolution, positions of
all images in one flat order, with the filters along sublanes. Zeros between rows of pixels, and
between images, serve the left edge of the one and the right edge of the other. In that order each
tap of the window is a shift by a constant; the kernel lays the shifted channels of all taps side by
side in VMEM, which costs a few operations for eight channels where the filters cost 3 F, and goes
on as for a matmul. Sums that belong to the zeros between rows are computed and dropped: 6 % of
them at 32 pixels, 23 % at 7. Strided and dilated windows are split beforehand into images that a
window of stride 1 reads (`spec.split_phases`).

Blocks are of 1024 lanes and up to 256 rows, to need few transfers, with as much of k as fits
beside them in 12 of the 16 MiB of VMEM that a kernel has by default, transfers double-buffered. The
result's block stays in VMEM while k runs and is the accumulator. A block of positions sees those
after it that a tap reaches through further blocks of the same operand. Where the blocks of the
widest window do not fit (a dilation of tens of thousands), or there are thousands of phases, `xla`
computes the convolution.

NaN and infinities are the reference's, as in `xla`: where a window hangs over the edge, a gradient
of the input meets zeros for the missing outputs, and what must be NaN there is marked afterwards.
Differences below 2⁻¹²⁶ are no differences to the sign rule: the hardware flushes them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jadder.kernels import limits, linear, xla
from jadder.kernels.spec import ConvSpec, Phases, forward_phases, transpose_phases
from jadder.kernels.varying import result_like_operands, zeros_like_operands
from jadder.rules import Clip

LANES = 128
_GRID = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))
CHUNK = 16  # terms unrolled: one rotation brings their columns of a to the first lanes
BLOCK_LANES = 1024
BLOCK_ROWS = 256
MOST_REACH = 16  # blocks that taps may lie ahead, for images to be interleaved
VMEM_BYTES = 12 * 2**20  # of the 16 MiB, to leave room for what the compiler spills

Term = Callable[[Array, Array, Array, Array | None], Array]
"""(sum so far, a, b, at) -> sum."""


def unavailable() -> str | None:
    """Why no TPU here can run these kernels, or None if one can."""
    try:
        jax.local_devices(backend="tpu")
    except RuntimeError:
        return "there is no TPU that JAX can use"
    return None


unsupported = functools.partial(limits.unsupported, floats=(jnp.float32, jnp.bfloat16), integers=())


@dataclasses.dataclass(frozen=True)
class MosaicTpuKernels:
    """The products on a TPU, or with ``interpret`` on any machine, slowly, for tests."""

    interpret: bool = False

    def matmul(self, x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
        """y[b, m, n] = -Σ_k |x[b, m, k] - w[b, k, n]|."""
        if _fills_lanes(w.shape[2], x.shape[1]):
            y = self._matrix_sum(_add_distance, x, w, None)
        else:
            y = _transposed(self._matrix_sum(_add_distance, _transposed(w), _transposed(x), None))
        return y.astype(out_dtype)

    def matmul_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dx[b, m, k] = Σ_n ψ(w[b, k, n] - x[b, m, k]) g[b, m, n]."""
        if clip.is_linear:
            return linear.matmul_dx(x, w, g, clip, out_dtype=out_dtype, precision=precision)
        unit, factor = _unit(clip)
        if _fills_lanes(x.shape[2], x.shape[1]):
            term = functools.partial(_add_clipped_row, unit)
            dx = self._matrix_sum(term, g, _transposed(w), x)
        else:
            term = functools.partial(_add_clipped_column, unit)
            dx = _transposed(self._matrix_sum(term, w, _transposed(g), _transposed(x)))
        return (dx * factor).astype(out_dtype)

    def matmul_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dw[b, k, n] = Σ_m ψ(x[b, m, k] - w[b, k, n]) g[b, m, n]."""
        if clip.is_linear:
            return linear.matmul_dw(x, w, g, clip, out_dtype=out_dtype, precision=precision)
        unit, factor = _unit(clip)
        if _fills_lanes(w.shape[2], w.shape[1]):
            term = functools.partial(_add_clipped_column, unit)
            dw = self._matrix_sum(term, _transposed(x), g, w)
        else:
            term = functools.partial(_add_clipped_row, unit)
            dw = _transposed(self._matrix_sum(term, _transposed(g), x, _transposed(w)))
        return (dw * factor).astype(out_dtype)

    def conv(self, x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
        """y[b, o, f] = -Σ_{tap, c} |x[b, position(o, tap), c] - w[tap, c, f]|, zeros included."""
        groups = spec.feature_group_count
        dimensions = forward_phases(spec, x.shape[1:-1], w.shape[:-2])
        if not all(dimension.are_complete for dimension in dimensions):
            return xla.conv(x, w, spec, out_dtype=out_dtype)
        images, filters = xla.split_groups(x, groups), jnp.swapaxes(xla.by_tap(w, groups), 1, 3)
        classes = _target_classes(dimensions, w.shape[:-2])
        sums = [self._window_sum(_add_distance, filters, images, None, c) for c in classes]
        if any(y is None for y in sums):
            return xla.conv(x, w, spec, out_dtype=out_dtype)
        magnitude = jnp.sum(jnp.abs(filters.astype(out_dtype)), axis=3)  # (taps, F / G, G)
        whole = []
        for y, targets in zip(sums, classes, strict=True):
            assert y is not None
            absent = targets.absent(len(filters))
            if len(absent):  # these taps meet only zeros that input dilation inserts: |0 - w|
                y = y - jnp.sum(magnitude[absent], axis=0).T
            whole.append(y.astype(out_dtype))
        return xla.merge_groups(xla.interleave(whole, dimensions))

    def conv_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        spec: ConvSpec,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dx[b, p, c] = Σ_{tap, f} ψ(w[tap, c, f] - x[b, p, c]) g[b, output(p, tap), f]."""
        if clip.is_linear:
            return linear.conv_dx(x, w, g, spec, clip, out_dtype=out_dtype, precision=precision)
        unit, factor = _unit(clip)
        term = functools.partial(_add_clipped_column, unit)
        groups = spec.feature_group_count
        dimensions = transpose_phases(spec, x.shape[1:-1], w.shape[:-2])
        if not all(dimension.are_complete for dimension in dimensions):
            return xla.conv_dx(x, w, g, spec, clip, out_dtype=out_dtype)
        given = x, w
        undefined = xla.undefined_dx(x, w, g.shape[1:-1], spec)
        if undefined is not None:
            x, w = jnp.nan_to_num(x), jnp.nan_to_num(w)
        images, targets, filters = (
            xla.split_groups(g, groups),
            xla.split_groups(x, groups),
            xla.by_tap(w, groups),
        )
        sums = []
        for one in _target_classes(dimensions, w.shape[:-2]):
            every = (
                slice(residue, None, dimension.period)
                for residue, dimension in zip(one.residues, dimensions, strict=True)
            )
            at = targets[(slice(None), *every)]
            part = self._window_sum(term, filters, images, at, one)
            if part is None:
                return xla.conv_dx(*given, g, spec, clip, out_dtype=out_dtype)
            sums.append((part * factor).astype(out_dtype))
        dx = xla.merge_groups(xla.interleave(sums, dimensions))
        return dx if undefined is None else jnp.where(undefined, jnp.nan, dx)

    def conv_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        spec: ConvSpec,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dw[tap, c, f] = Σ_{b, o} ψ(x[b, position(o, tap), c] - w[tap, c, f]) g[b, o, f]."""
        return xla.conv_dw(x, w, g, spec, clip, out_dtype=out_dtype, precision=precision)

    def _matrix_sum(self, term: Term, a: Array, b: Array, at: Array | None) -> Array:
        """Σ_k term(a[:, r, k], b[:, k, l], at[:, r, l]): (batch, R, L)."""
        sizes = (a.shape[1], b.shape[1], b.shape[2])
        blocks = _Blocks.fit(*sizes, ((0, 0),), (a, b, at))
        assert blocks is not None, "the blocks of a single tap are small"
        return self._sum(term, a[None], b[:, None], at, blocks)

    def _window_sum(
        self, term: Term, filters: Array, images: Array, at: Array | None, targets: xla.Targets
    ) -> Array | None:
        """The sums of one residue class of targets, or None if their blocks do not fit.

        filters is (taps, R, G, K), images (batch, *spatial, G, K), and at, as the result,
        (batch, *counts, G, R).
        """
        batch, groups, rows = images.shape[0], images.shape[-2], filters.shape[1]
        if not len(targets.taps):
            shape = (batch, *targets.counts, groups, rows)
            return zeros_like_operands(shape, jnp.float32, filters, images)
        flat = _Flat.of(targets, images.shape[:-2])
        sizes = (rows, images.shape[-1], math.prod(flat.shape))
        blocks = _Blocks.fit(*sizes, flat.taps, (filters, images, at))
        if blocks is None:
            return None
        a = jnp.moveaxis(filters[targets.taps], 2, 1)
        source = flat.sources(images, blocks.source_lanes)
        at = None if at is None else flat.flatten(at)
        return flat.crop(self._sum(term, a, source, at, blocks), targets.counts)

    def _sum(
        self, term: Term, a: Array, source: Array, at: Array | None, blocks: "_Blocks"
    ) -> Array:
        """a (taps, G, R, K), source (G, images, K, lanes), at (G, R, L): the sums (G, R, L)."""
        rows, lanes = blocks.row_blocks * blocks.rows, blocks.lane_blocks * blocks.lanes
        a = blocks.by_block(a)
        source = xla.pad_to(
            xla.pad_to(source, 2, blocks.k_blocks * blocks.k), 3, blocks.source_lanes
        )
        operands = [a, *[source] * blocks.reach]
        a_block = pl.BlockSpec(
            (None, None, blocks.rows, a.shape[3]),
            lambda group, lane, row, k: (group, k, row, 0),
        )
        result = pl.BlockSpec(
            (None, blocks.rows, blocks.lanes), lambda group, lane, row, k: (group, row, lane)
        )
        in_specs = [a_block, *(_source_block(source, blocks, n) for n in range(blocks.reach))]
        if at is not None:
            operands.append(xla.pad_to(xla.pad_to(at, 1, rows), 2, lanes))
            in_specs.append(result)
        scratch = [pltpu.VMEM((blocks.lanes // LANES, blocks.terms, LANES), jnp.float32)]
        if a.dtype != jnp.float32:
            scratch.append(pltpu.VMEM((blocks.rows, a.shape[3]), jnp.float32))
        if at is not None and at.dtype != jnp.float32:
            scratch.append(pltpu.VMEM((blocks.rows, blocks.lanes), jnp.float32))
        out_shape = (source.shape[0], rows, lanes)
        call = pl.pallas_call(
            functools.partial(_kernel, term, blocks, at is not None),
            out_shape=result_like_operands(out_shape, jnp.float32, source),
            grid=(source.shape[0], blocks.lane_blocks, blocks.row_blocks, blocks.k_blocks),
            in_specs=in_specs,
            out_specs=result,
            scratch_shapes=scratch,
            # The interpreter of JAX 0.10 fails under vmap if it is told which dimensions are which.
            compiler_params=None if self.interpret else _GRID,
            interpret=pltpu.InterpretParams() if self.interpret else False,
            name="adder_sum",
        )
        with jax.enable_x64(False):  # else the kernel's loops and indices would be of 64 bits
            y: Array = call(*operands)
        return y[:, : blocks.all_rows, : blocks.all_lanes]


def _kernel(term: Term, blocks: "_Blocks", has_at: bool, *refs: Any) -> None:
    """Adds one block of k to one block of the result, for all taps."""
    remaining = iter(refs)
    a = next(remaining)
    sources = [next(remaining) for _ in range(blocks.reach)]
    at = next(remaining) if has_at else None
    total, patches = next(remaining), next(remaining)
    a = a if a.dtype == jnp.float32 else _widen(a, next(remaining))
    if at is not None and at.dtype != jnp.float32:
        at = _widen(at, next(remaining))

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    _lay_out_patches(sources, patches, blocks)
    _add_terms(term, a, patches, at, total, blocks)


def _widen(narrow: Any, wide: Any) -> Any:
    wide[...] = narrow[...].astype(jnp.float32)
    return wide


def _lay_out_patches(sources: Sequence[Any], patches: Any, blocks: "_Blocks") -> None:
    """Puts the channels that each tap sees below those of the tap before it."""
    at_once = blocks.granule if blocks.k % blocks.granule == 0 else blocks.k
    tiles = blocks.lanes // LANES

    def lay_out(i: Any, carry: None) -> None:
        channel = pl.multiple_of(i * at_once, at_once)
        for tap, (image, offset) in enumerate(blocks.taps):
            first, rest = divmod(offset, LANES)
            seen = []
            for n in range(first, first + tiles + (rest > 0)):
                part = pl.ds(n % tiles * LANES, LANES)
                tile = sources[n // tiles][image, pl.ds(channel, at_once), part]
                seen.append(tile.astype(jnp.float32))
            if rest:
                wide = pltpu.roll(jnp.concatenate(seen, 1), len(seen) * LANES - rest, 1)
                seen = [wide[:, n * LANES : (n + 1) * LANES] for n in range(tiles)]
            for n, tile in enumerate(seen):
                patches[n, pl.ds(tap * blocks.k + channel, at_once), :] = tile

    lax.fori_loop(0, blocks.k // at_once, lay_out, None)
    used = len(blocks.taps) * blocks.k
    if used < blocks.terms:
        for n in range(tiles):
            patches[n, used:, :] = jnp.zeros((blocks.terms - used, LANES), jnp.float32)


def _add_terms(term: Term, a: Any, b: Any, at: Any, total: Any, blocks: "_Blocks") -> None:
    """total[r, l] += Σ_k term(a[r, k], b[k, l], at[r, l]), a tile of registers at a time."""
    across = blocks.lanes // blocks.tile_lanes

    def add_tile(tile: Any, carry: None) -> None:
        row = pl.multiple_of(_quotient(tile, across) * blocks.tile_rows, blocks.tile_rows)
        lane = pl.multiple_of(_remainder(tile, across) * blocks.tile_lanes, blocks.tile_lanes)
        rows = pl.ds(row, blocks.tile_rows)
        lanes = [
            pl.ds(pl.multiple_of(lane + n, LANES), LANES)
            for n in range(0, blocks.tile_lanes, LANES)
        ]
        ats = [None if at is None else at[rows, part] for part in lanes]
        first = _quotient(lane, LANES)

        def add_chunk(chunk: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            k = pl.multiple_of(chunk * CHUNK, CHUNK)
            columns = a[rows, pl.ds(pl.multiple_of(_quotient(k, LANES) * LANES, LANES), LANES)]
            columns = pltpu.roll(columns, _remainder(LANES - _remainder(k, LANES), LANES), 1)
            for n in range(CHUNK):
                column = jnp.broadcast_to(columns[:, n : n + 1], columns.shape)
                sums = tuple(
                    term(one, column, b[first + i, pl.ds(k + n, 1), :], ats[i])
                    for i, one in enumerate(sums)
                )
            return sums

        sums = tuple(total[rows, part] for part in lanes)
        sums = lax.fori_loop(0, blocks.terms // CHUNK, add_chunk, sums)
        for part, one in zip(lanes, sums, strict=True):
            total[rows, part] = one

    lax.fori_loop(0, blocks.rows // blocks.tile_rows * across, add_tile, None)


def _quotient(n: Any, divisor: int) -> Any:
    """n // divisor for n ≥ 0; Python's operator would ask for signs."""
    return lax.div(n, np.int32(divisor))


def _remainder(n: Any, divisor: int) -> Any:
    return lax.rem(n, np.int32(divisor))


def _add_distance(total: Array, a: Array, b: Array, at: Array | None) -> Array:
    return total - jnp.abs(b - a)


def _add_clipped_column(
    unit: tuple[float, float], total: Array, a: Array, b: Array, at: Array | None
) -> Array:
    """For a difference of rows of a and ``at``: total + ψ(a - at) b."""
    assert at is not None
    return total + _clipped(a - at, *unit) * b


def _add_clipped_row(
    unit: tuple[float, float], total: Array, a: Array, b: Array, at: Array | None
) -> Array:
    """For a difference of columns of b and ``at``: total + ψ(b - at) a."""
    assert at is not None
    return total + _clipped(b - at, *unit) * a


def _clipped(difference: Array, slope: float, knee: float) -> Array:
    scaled = difference if slope == 1 else difference * np.float32(slope)
    return jnp.minimum(jnp.maximum(scaled, np.float32(-knee)), np.float32(knee))


def _unit(clip: Clip) -> tuple[tuple[float, float], float]:
    """ψ as clip(slope · d, -knee, knee), and the factor to multiply the sums by afterwards."""
    knee = clip.bound / clip.scale
    if knee < 2.0**-126:  # a sign: a slope that takes the least normal number beyond 1
        return (2.0**127, 1.0), clip.bound
    return (1.0, min(knee, float(jnp.finfo(jnp.float32).max))), clip.scale


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How the operands are cut for the grid, and a block's sum into tiles.

    ``taps`` has, for each tap, the image that it reads and how far ahead of its target. ``reach``
    is the number of consecutive blocks of lanes that a block's taps read.
    """

    all_rows: int
    all_lanes: int
    rows: int
    row_blocks: int
    k: int
    k_blocks: int
    lanes: int
    lane_blocks: int
    tile_rows: int
    tile_lanes: int
    granule: int
    taps: tuple[tuple[int, int], ...]

    @classmethod
    def fit(
        cls,
        rows: int,
        terms: int,
        lanes: int,
        taps: tuple[tuple[int, int], ...],
        operands: Sequence[Array | None],
    ) -> "_Blocks | None":
        """The largest blocks that VMEM holds; None if there are none."""
        itemsizes = [0 if operand is None else operand.dtype.itemsize for operand in operands]
        granule = 32 // min(size for size in itemsizes if size)  # rows of a tile in VMEM
        row_blocks = -(-rows // BLOCK_ROWS)
        block_rows = _round_up(-(-rows // row_blocks), granule)
        tile_rows = next(n for n in (32, 24, 16, 8) if block_rows % n == 0)
        registers = {32: 4, 24: 4, 16: 8, 8: 8}[tile_rows]
        for most in (BLOCK_LANES, max(LANES, BLOCK_LANES // 2), LANES):
            tile_lanes = min(most, LANES * min(registers, -(-lanes // LANES)))
            lane_blocks = -(-lanes // most)
            block_lanes = _round_up(-(-lanes // lane_blocks), tile_lanes)
            for k_blocks in range(1, -(-terms // granule) + 1):
                k = -(-terms // k_blocks)
                blocks = cls(
                    rows,
                    lanes,
                    block_rows,
                    row_blocks,
                    k if k <= granule and k_blocks == 1 else _round_up(k, granule),
                    k_blocks,
                    block_lanes,
                    lane_blocks,
                    tile_rows,
                    tile_lanes,
                    granule,
                    taps,
                )
                if blocks._bytes(*itemsizes) <= VMEM_BYTES:
                    return blocks
        return None

    @property
    def terms(self) -> int:
        """Of a block of k: those of all taps, and zeros up to whole chunks."""
        return _round_up(len(self.taps) * self.k, CHUNK)

    @property
    def reach(self) -> int:
        return 1 + -(-max(offset for _, offset in self.taps) // self.lanes)

    @property
    def source_lanes(self) -> int:
        return (self.lane_blocks + self.reach - 1) * self.lanes

    def by_block(self, a: Array) -> Array:
        """a (taps, G, R, K) with the terms of each block of k side by side: (G, blocks, R, _)."""
        a = xla.pad_to(xla.pad_to(a, 2, self.row_blocks * self.rows), 3, self.k_blocks * self.k)
        a = a.reshape(*a.shape[:3], self.k_blocks, self.k)
        a = jnp.transpose(a, (1, 3, 2, 0, 4))
        return xla.pad_to(a.reshape(*a.shape[:3], -1), 3, _round_up(self.terms, LANES))

    def _bytes(self, a: int, b: int, at: int) -> int:
        """Of VMEM, from the operands' item sizes: each block twice, and what is made of it."""
        images = 1 + max(image for image, _ in self.taps)
        a_size = self.rows * _round_up(self.terms, LANES)
        result = self.rows * self.lanes
        source = images * _round_up(self.k, self.granule) * self.lanes * self.reach
        widened = 4 * a_size * (a < 4) + 4 * result * (0 < at < 4)
        patches = 4 * self.terms * self.lanes
        return 2 * (a * a_size + b * source + (at + 4) * result) + widened + patches


class _Flat(NamedTuple):
    """One residue class of a convolution's targets, of all images, as one row of positions.

    Position (part, row, column, image) of ``shape`` is a target of one image of one part of the
    batch, or one of the zeros after a row's or image's end. The neighbours of all targets lie at
    the same distances, on the other side of those zeros too.
    """

    shape: tuple[int, ...]
    steps: tuple[int, ...]
    residues: tuple[tuple[int, ...], ...]
    taps: tuple[tuple[int, int], ...]
    front: int

    @classmethod
    def of(cls, targets: xla.Targets, images: Sequence[int]) -> "_Flat":
        """For images of the shape (batch, *spatial)."""
        batch, *spatial = images
        steps, counts, starts = map(np.array, (targets.steps, targets.counts, targets.starts))
        shifts, residues = starts // steps, (starts % steps).tolist()
        sizes = -(-np.array(spatial) // steps) + np.maximum(0, -shifts.min(0))
        pitches = np.maximum(sizes, counts + np.maximum(0, shifts.max(0)))
        offsets = shifts @ np.append(np.cumprod(pitches[:0:-1])[::-1], 1)
        front = max(0, -int(offsets.min()))
        farthest = LANES * (int(offsets.max()) + front)
        together = LANES if batch % LANES == 0 and farthest < MOST_REACH * BLOCK_LANES else 1
        every = sorted({tuple(one) for one in residues})
        return cls(
            (batch // together, *pitches.tolist(), together),
            targets.steps,
            tuple(every),
            tuple(
                (every.index(tuple(one)), together * (offset + front))
                for one, offset in zip(residues, offsets.tolist(), strict=True)
            ),
            together * front,
        )

    def sources(self, images: Array, lanes: int) -> Array:
        """Images (batch, *spatial, G, K) in every residue class that is read: (G, _, K, lanes)."""
        parts = []
        for residue in self.residues:
            every = (slice(r, None, step) for r, step in zip(residue, self.steps, strict=True))
            parts.append(self.flatten(images[(slice(None), *every)]))
        stacked = jnp.stack(parts, axis=1)
        after = lanes - self.front - stacked.shape[3]
        padding = [(0, 0, 0)] * 3 + [(self.front, after, 0)]
        return lax.pad(stacked, jnp.zeros((), stacked.dtype), padding)

    def flatten(self, images: Array) -> Array:
        """(batch, *spatial, G, K) to (G, K, positions)."""
        parts, *pitches, together = self.shape
        for axis, pitch in enumerate(pitches, start=1):
            images = xla.pad_to(images, axis, pitch)
        images = images.reshape(parts, together, *images.shape[1:])
        images = jnp.moveaxis(images, (-2, -1, 1), (0, 1, -1))
        return images.reshape(*images.shape[:2], -1)

    def crop(self, sums: Array, counts: Sequence[int]) -> Array:
        """(G, R, positions) to (batch, *counts, G, R)."""
        sums = sums.reshape(*sums.shape[:2], *self.shape)
        sums = sums[(..., *(slice(count) for count in counts), slice(None))]
        sums = jnp.moveaxis(sums, (0, 1, -1), (-2, -1, 1))
        return sums.reshape(-1, *sums.shape[2:])


def _source_block(source: Array, blocks: _Blocks, ahead: int) -> pl.BlockSpec:
    """The block of lanes that is ``ahead`` of the result's."""
    return pl.BlockSpec(
        (None, source.shape[1], blocks.k, blocks.lanes),
        lambda group, lane, row, k: (group, 0, k, lane + ahead),
    )


def _target_classes(dimensions: Sequence[Phases], window: Sequence[int]) -> list[xla.Targets]:
    return [
        xla.residue_targets(phases, dimensions, window, [0] * len(window))
        for phases in itertools.product(*(dimension.phases for dimension in dimensions))
    ]


def _fills_lanes(lanes: int, rows: int) -> bool:
    """Whether a matrix's last dimension is to lie along the lanes, and not its rows."""
    return lanes >= min(rows, BLOCK_LANES // 2)


def _transposed(matrices: Array) -> Array:
    return jnp.swapaxes(matrices, 1, 2)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
