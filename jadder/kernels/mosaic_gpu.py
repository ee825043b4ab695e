"""The adder products on NVIDIA Hopper GPUs and newer, written in Pallas for Mosaic GPU.

Experimental: right under interpretation, and compiled to machine code for sm_90a on a machine
without a GPU; not yet run on one.

One kernel computes every product, as sums of terms of a row vector and a lane vector, as a matmul
does: the output of a matmul is M rows by N lanes, and that of a convolution has a row for each
output pixel of each image, images innermost. The source of a convolution is laid out with
channels first and images last, so that what a tile of rows meets through one tap is a contiguous
window of it, whatever the strides, dilations and padding: the copy engine fetches it, and no patch
is ever written out. A table lists where each tap's window starts.

A warpgroup holds a tile of 256 × 16, 256 × 32 or 128 × 64 outputs in registers, 32 or 64 a
thread, and feeds it from shared memory, which three stages of asynchronous copies fill. Machine
instructions for each term, counted in the inner loop that jax 0.12.0.1 and ptxas 13.5 make of the
128 × 64 tile for sm_90a, with its loads, waits and copies (150 registers or so, none spilled; the
environment variable MOSAIC_GPU_DUMP_SASS=1 prints them where the kernel is compiled):

- 2.27 float32: ``FADD d, x, -w`` and ``FADD y, y, -|d|``.
- 1.37 float16: packed pairs. Runs of 8 terms are added up in 16 bit, and the runs in float32; a
  run that passes float16's largest value, 65504, is infinite.
- 1.60 bfloat16: the same, but |d| is no free operand there (2.02). The pairs add up
  max(x - w, 0), one ``HFMA2.RELU`` each, and -Σ|x - w| is Σx - Σw - 2 Σ max(x - w, 0). Infinite
  operands may give NaN.
- 0.32 uint8 and int8: ``VABSDIFF4.U8.ACC`` on four packed channels.
- 2.34 ∂x of a finite scale: ``FADD.SAT`` and ``FFMA``, where a clip by minimum and maximum takes
  4.3. With x' = x · scale / 2 bound and w' = w · scale / 2 bound + 1/2, ψ(w - x) is
  2 bound · sat(w' - x') - bound, where sat clips to [0, 1].
- 3.3 ∂x of the sign: an ``FFMA.SAT`` scales the difference by 2¹²⁷ first.

What saturates, ``VABSDIFF4`` and ``HFMA2.RELU`` have no name in Pallas and are inline PTX.
Saturation makes 0 of NaN, so ∂x is set to NaN afterwards where x is NaN, and throughout a channel
whose kernel values hold a NaN. ∂x is inexact by rounding errors of Σ|g| rather than of Σ|ψ g|, and
computes in float32 whatever the operands are.

A full-precision gradient is a matrix product (`jadder.kernels.linear`), and a bounded kernel
gradient is taken by `jadder.kernels.xla`. Channels are rounded up to 16 lanes and features of a
group likewise, so a depthwise convolution runs at a sixteenth of the speed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from jadder.kernels import limits, linear, xla
from jadder.kernels.spec import ConvSpec, forward_phases, transpose_phases
from jadder.kernels.varying import vary_alike, zeros_like_operands
from jadder.rules import Clip

TILES = ((128, 64), (256, 32), (256, 16))  # rows and lanes that a warpgroup holds
TERMS = 16  # of one copy to shared memory, all of them unrolled
STAGES = 3  # copies in flight, of 18 KiB at most: registers, not they, bound the thread blocks
RUN = 8  # terms added up in 16 bit before float32 takes them
WARPGROUP = 128  # threads; a copy's bytes must divide by it


def unavailable() -> str | None:
    """Why no GPU here can run these kernels, or None if one can."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return "there is no NVIDIA GPU that JAX can use"
    capability = min(float(getattr(device, "compute_capability", 0)) for device in devices)
    if capability < 9:
        return f"it needs compute capability 9.0 (Hopper) or newer, not {capability}"
    return None


unsupported = limits.unsupported


@dataclasses.dataclass(frozen=True)
class MosaicGpuKernels:
    """The products on Hopper and newer.

    Attributes:
      interpret: run on the CPU under Pallas' interpreter, where this version of JAX has one.
    """

    interpret: bool = False

    def matmul(self, x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
        """y[b, m, n] = -Σ_k |x[b, m, k] - w[b, k, n]|."""
        y = self._matmul_sums(_distances(x.dtype, w.dtype), x, w)
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
        target, lanes = _scaled(x, w, clip)
        dx = self._matmul_sums(_slopes(clip), g, jnp.swapaxes(lanes, 1, 2), target)
        return _restore_nan(dx, x, w, reduce=2, expand=1).astype(out_dtype)

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
        return xla.matmul_dw(x, w, g, clip, out_dtype=out_dtype, precision=precision)

    def conv(self, x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
        """y[b, o, f] = -Σ_{tap, c} |x[b, position(o, tap), c] - w[tap, c, f]|, zeros included."""
        one_dimensional = x.ndim == 3
        x, w, spec = _planar(x, w, spec)
        window, groups = w.shape[:2], spec.feature_group_count
        arithmetic = _distances(x.dtype, w.dtype)
        x, w = xla.split_groups(x, groups), xla.by_tap(w, groups)
        magnitude = jnp.abs(w.astype(arithmetic.total)).sum(1)
        lanes = jnp.moveaxis(w, 2, 0)

        def phase_sum(source: Array, phase: xla.Targets) -> Array:
            y = self._window_sums(arithmetic, source, lanes, phase)
            absent = phase.absent(len(w))
            if len(absent):  # these taps meet only zeros, of input dilation or padding: |0 - w|
                y = y - magnitude[absent].sum(0)
            return y

        dimensions = forward_phases(spec, x.shape[1:3], window)
        y = xla.merge_groups(xla.each_phase(x, dimensions, window, phase_sum)).astype(out_dtype)
        return y[:, 0] if one_dimensional else y

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
        if one_dimensional := x.ndim == 3:
            g = g[:, None]
        x, w, spec = _planar(x, w, spec)
        window, groups = w.shape[:2], spec.feature_group_count
        undefined = xla.undefined_dx(x, w, g.shape[1:-1], spec)
        if undefined is not None:
            x, w = jnp.nan_to_num(x), jnp.nan_to_num(w)
        x, g, w = xla.split_groups(x, groups), xla.split_groups(g, groups), xla.by_tap(w, groups)
        scaled, lanes = _scaled(x, w, clip)
        lanes = jnp.transpose(lanes, (2, 0, 3, 1))
        dimensions = transpose_phases(spec, x.shape[1:3], window)
        rows, columns = (dimension.period for dimension in dimensions)

        def phase_sum(source: Array, phase: xla.Targets) -> Array:
            top, left = phase.residues
            target = scaled[:, top::rows, left::columns]
            return self._window_sums(_slopes(clip), source, lanes, phase, target)

        dx = xla.each_phase(g, dimensions, window, phase_sum)
        if undefined is None:  # every window lies inside, so that all pixels meet all taps
            dx = _restore_nan(dx, x, jnp.moveaxis(w, 2, 0), reduce=(1, 3), expand=())
        dx = xla.merge_groups(dx)
        if undefined is not None:
            dx = jnp.where(undefined, jnp.nan, dx)
        dx = dx.astype(out_dtype)
        return dx[:, 0] if one_dimensional else dx

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

    def _matmul_sums(
        self, arithmetic: "_Arithmetic", rows: Array, lanes: Array, target: Array | None = None
    ) -> Array:
        """Sums over rows (B, M, K) and lanes (B, K, N), for a target (B, M, N) if there is one."""
        source = jnp.swapaxes(rows, 1, 2)[:, None, :, None]
        at = None if target is None else target[:, None]
        shape = 1, rows.shape[1]
        sums = _sums(arithmetic, source, lanes[:, None], [(0, 0, 0, 0)], shape, at, self.interpret)
        return sums[:, 0]

    def _window_sums(
        self,
        arithmetic: "_Arithmetic",
        source: Array,
        lanes: Array,
        phase: xla.Targets,
        target: Array | None = None,
    ) -> Array:
        """Sums over the taps of ``phase``.

        source is (B, *spatial, G, K), lanes (G, taps, K, N), the target and the result
        (B, *counts, G, N).
        """
        batch, (height, width) = source.shape[0], phase.counts
        groups, features = lanes.shape[0], lanes.shape[3]
        if not len(phase.taps):
            whole = batch, height, width, groups, features
            return zeros_like_operands(whole, arithmetic.total, source, lanes)
        rows, wide = _planes(source, phase.steps)
        lines = -(-width * batch // TILES[0][0]) * height
        fold = -(-height * wide * batch // TILES[0][0]) < lines  # short lines: cut tiles across
        table = []
        for tap, (top, left) in zip(phase.taps.tolist(), phase.starts.tolist(), strict=True):
            plane = top % phase.steps[0] * phase.steps[1] + left % phase.steps[1]
            line, column = top // phase.steps[0], left // phase.steps[1]
            if fold:
                table.append((plane, tap, 0, (line * wide + column) * batch))
            else:
                table.append((plane, tap, line, column * batch))
        across = wide if fold else width
        shape = (1, height * across * batch) if fold else (height, across * batch)
        if fold:
            rows = rows.reshape(*rows.shape[:3], 1, -1)
        at = None
        if target is not None:
            at = xla.pad_to(jnp.transpose(target, (3, 1, 2, 0, 4)), 2, across)
            at = at.reshape(groups, *shape, features)
        sums = _sums(arithmetic, rows, lanes, table, shape, at, self.interpret)
        sums = sums.reshape(groups, height, across, batch, features)[:, :, :width]
        return jnp.transpose(sums, (3, 1, 2, 0, 4))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The outputs of one warpgroup, (rows, lanes) of them, in the layout of a matrix product."""

    rows: int
    lanes: int
    interpret: bool

    @property
    def layout(self) -> Any:
        return _pallas().Layout.WGMMA

    def row(self, ref: Any) -> Array:
        """One value for each row."""
        return _pallas().layout_cast(ref[...], self.layout.reduce(1))

    def lane(self, ref: Any) -> Array:
        """One value for each lane."""
        return _pallas().layout_cast(ref[...], self.layout.reduce(0))

    def load(self, ref: Any) -> Array:
        """One value for each output, from device memory."""
        load = _pallas().load
        index = ((),) if "idx" in inspect.signature(load).parameters else ()  # jax 0.10
        values: Array = load(ref, *index, layout=self.layout, optimized=False)
        return values

    def store(self, ref: Any, values: Array) -> None:
        """Writes one value for each output to device memory: eight rows of 32 bytes at a time."""
        plgpu = _pallas()
        if hasattr(plgpu, "store"):
            plgpu.store(ref, values, optimized=False)
        else:  # jax 0.10
            ref[...] = values

    def spread(self, values: Array, axis: int) -> Array:
        """A value for each row (axis 0) or lane (axis 1) as one for each output: no instruction."""
        spread = lax.broadcast_in_dim(values, (self.rows, self.lanes), (axis,))
        return _pallas().layout_cast(spread, self.layout)

    def zeros(self, dtype: DTypeLike) -> Array:
        return _pallas().layout_cast(jnp.zeros((self.rows, self.lanes), dtype), self.layout)

    def apply(self, ptx: str, meaning: Callable[..., Array], *operands: Array) -> Array:
        """``ptx`` on every element: $0 is the result, of the type of the first operand, $1."""
        if self.interpret:
            return meaning(*operands)
        plgpu, result = _pallas(), operands[0]
        result_type = plgpu.ShapeDtypeStruct(result.shape, result.dtype, layout=self.layout)
        kinds = ["f" if a.dtype == jnp.float32 else "r" for a in operands]
        constraints = ",".join([f"={kinds[0]}", *kinds])
        layouts = (self.layout,) * len(operands)

        def inline(_: Any, *arrays: Any) -> Any:
            registers = np.empty_like(arrays[0].registers)
            for i in np.ndindex(registers.shape):
                registers[i] = _each_value(ptx, constraints, [a.registers[i] for a in arrays])
            return type(arrays[0])(
                _registers=registers, _layout=arrays[0].layout, _is_signed=arrays[0].is_signed
            )

        inlined = plgpu.inline_mgpu(arg_types=layouts, return_type=result_type)(inline)
        applied: Array = inlined(*operands)
        return applied


def _each_value(ptx: str, constraints: str, vectors: Sequence[Any]) -> Any:
    """One inline instruction sequence for each value of some vector registers.

    Pairs of 16-bit values are one 32-bit value.
    """
    kind = ir.VectorType(vectors[0].type)
    if isinstance(kind.element_type, ir.BF16Type):
        word = ir.IntegerType.get_signless(32)
        words = [llvm.bitcast(word, v) for v in vectors]
        pair: Any = llvm.inline_asm(word, words, ptx, constraints)
        return llvm.bitcast(kind, pair)
    result: Any = llvm.mlir_undef(kind)
    for i in range(kind.shape[0]):
        at = ir.DenseI64ArrayAttr.get([i])
        values = [vector.extract(v, dynamic_position=[], static_position=at) for v in vectors]
        value: Any = llvm.inline_asm(kind.element_type, values, ptx, constraints)
        result = vector.insert(value, result, dynamic_position=[], static_position=at)
    return result


@dataclasses.dataclass(frozen=True)
class _Arithmetic:
    """What one kind of term does.

    Attributes:
      dtype: of rows and lanes in memory, once packed.
      total: of the sums.
      pack: turns operands with terms on axis 2 into what is kept in memory.
      add: adds the terms of [(row, lane), ...] to the sums, for a target if there is one.
      finish: the result from the sums.
    """

    dtype: Any
    total: Any
    pack: Callable[[Array], Array]
    add: Callable[[_Tile, Any, Sequence[tuple[Array, Array]], Array | None], Any]
    start: Callable[[_Tile], Any]
    finish: Callable[[_Tile, Any], Array]


def _distances(x_dtype: DTypeLike, w_dtype: DTypeLike) -> _Arithmetic:
    """-|x - w| for operands of these types."""
    dtype = jnp.promote_types(x_dtype, w_dtype)

    def start(tile: _Tile) -> Array:
        return tile.zeros(jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32)

    def keep(tile: _Tile, total: Array) -> Array:
        return total

    if jnp.issubdtype(dtype, jnp.integer):
        return _Arithmetic(
            jnp.int32, jnp.int32, _pack_bytes, _add_bytes, start, lambda tile, total: -total
        )
    if dtype == jnp.float16:
        return _Arithmetic(dtype, jnp.float32, lambda a: a.astype(dtype), _add_pairs, start, keep)
    if dtype == jnp.bfloat16:
        return _Arithmetic(
            dtype, jnp.float32, lambda a: a.astype(dtype), _add_positive_parts, _start_sums, _join
        )
    return _Arithmetic(jnp.float32, jnp.float32, _to_float32, _add_floats, start, keep)


def _slopes(clip: Clip) -> _Arithmetic:
    """ψ(w - x) g, for rows of g, lanes of w and targets x, both as `_scaled` gives them."""

    def finish(tile: _Tile, sums: tuple[Array, Array]) -> Array:
        total, g_sum = sums
        return total * (2 * clip.bound) - tile.spread(g_sum * clip.bound, 0)

    add = functools.partial(_add_slopes, steep=clip.is_sign)
    return _Arithmetic(jnp.float32, jnp.float32, _to_float32, add, _start_sums, finish)


def _scaled(x: Array, w: Array, clip: Clip) -> tuple[Array, Array]:
    """x' and w' with ψ(w - x) = 2 bound · sat(w' - x') - bound."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if clip.is_sign:  # sat(2¹²⁷ (w - x) + 1/2), in the kernel: 1/2 where w = x
        return x, w
    scale = clip.scale / (2 * clip.bound)
    return x * scale, w * scale + 0.5


def _add_floats(
    tile: _Tile, total: Array, terms: Sequence[tuple[Array, Array]], target: Array | None
) -> Array:
    for row, lane in terms:
        total = total - jnp.abs(tile.spread(row, 0) - tile.spread(lane, 1))
    return total


def _add_pairs(
    tile: _Tile, total: Array, terms: Sequence[tuple[Array, Array]], target: Array | None
) -> Array:
    for first in range(0, len(terms), RUN):
        distances = [
            jnp.abs(tile.spread(row, 0) - tile.spread(lane, 1))
            for row, lane in terms[first : first + RUN]
        ]
        total = total - functools.reduce(lambda a, b: a + b, distances).astype(total.dtype)
    return total


def _add_positive_parts(
    tile: _Tile,
    sums: tuple[Array, Array],
    terms: Sequence[tuple[Array, Array]],
    target: Array | None,
) -> tuple[Array, Array]:
    """Adds max(x - w, 0) to the first sum, and x to the second."""
    minus_one = "0xBF80BF80"

    def positive_part(x: Array, w: Array) -> Array:
        fma = "fma.rn.relu.bf16x2 $0, $2, minus_one, $1;"
        ptx = f"{{ .reg .b32 minus_one; mov.b32 minus_one, {minus_one}; {fma} }}"
        operands = tile.spread(x, 0), tile.spread(w, 1)
        return tile.apply(ptx, lambda x, w: jnp.maximum(x - w, 0), *operands)

    total, x_sum = sums
    for first in range(0, len(terms), RUN):
        run = terms[first : first + RUN]
        parts = [positive_part(x, w) for x, w in run]
        total = total + functools.reduce(lambda a, b: a + b, parts).astype(total.dtype)
        for x, _ in run:
            x_sum = x_sum + x.astype(x_sum.dtype)
    return total, x_sum


def _join(tile: _Tile, sums: tuple[Array, Array]) -> Array:
    """-Σ|x - w| but for Σw, as -2 Σ max(x - w, 0) + Σx."""
    total, x_sum = sums
    return tile.spread(x_sum, 0) - 2 * total


def _start_sums(tile: _Tile) -> tuple[Array, Array]:
    """A sum for each output, and one for each row."""
    rows = _pallas().layout_cast(jnp.zeros(tile.rows, jnp.float32), tile.layout.reduce(1))
    return tile.zeros(jnp.float32), rows


def _add_bytes(
    tile: _Tile, total: Array, terms: Sequence[tuple[Array, Array]], target: Array | None
) -> Array:
    def meaning(total: Array, row: Array, lane: Array) -> Array:
        for shift in range(0, 32, 8):
            total = total + jnp.abs((row >> shift & 255) - (lane >> shift & 255))
        return total

    for row, lane in terms:
        operands = total, tile.spread(row, 0), tile.spread(lane, 1)
        total = tile.apply("vabsdiff4.u32.u32.u32.add $0, $2, $3, $1;", meaning, *operands)
    return total


def _add_slopes(
    tile: _Tile,
    sums: tuple[Array, Array],
    terms: Sequence[tuple[Array, Array]],
    target: Array | None,
    *,
    steep: bool,
) -> tuple[Array, Array]:
    assert target is not None
    difference, half = "sub.f32 d, $3, $2; ", "0f7F000000, 0f3F000000"  # 2¹²⁷ and 1/2
    saturate = f"{difference}fma.rn.sat.f32 d, d, {half};" if steep else "sub.sat.f32 d, $3, $2;"
    ptx = f"{{ .reg .f32 d; {saturate} fma.rn.f32 $0, d, $4, $1; }}"

    def meaning(total: Array, x: Array, w: Array, g: Array) -> Array:
        d = w - x
        return total + jnp.clip(d * 2.0**127 + 0.5 if steep else d, 0, 1) * g

    total, g_sum = sums
    for row, lane in terms:
        operands = total, target, tile.spread(lane, 1), tile.spread(row, 0)
        total, g_sum = tile.apply(ptx, meaning, *operands), g_sum + row
    return total, g_sum


def _to_float32(array: Array) -> Array:
    return array.astype(jnp.float32)


def _pack_bytes(array: Array) -> Array:
    """Four neighbours along axis 2 in one int32, as unsigned bytes with the same differences."""
    offset = 128 if array.dtype == jnp.int8 else 0
    array = xla.pad_to(array, 2, -(-array.shape[2] // 4) * 4)
    array = (array.astype(jnp.int32) + offset).astype(jnp.uint8)
    fours = array.reshape(*array.shape[:2], -1, 4, *array.shape[3:])
    return lax.bitcast_convert_type(jnp.moveaxis(fours, 3, -1), jnp.int32)


def _sums(
    arithmetic: _Arithmetic,
    source: Array,
    lanes: Array,
    table: Sequence[tuple[int, int, int, int]],
    shape: tuple[int, int],
    target: Array | None,
    interpret: bool,
) -> Array:
    """Sums of terms for each of ``shape`` = (lines, rows) and each lane: (G, *shape, N).

    Args:
      source: (G, planes, K, lines, rows); row r of line l meets, through an entry of the table,
        the source's row r + offset of line l + line of that plane.
      lanes: (G, taps, K, N).
      table: (plane, tap, line, offset) of each tap that takes part.
      target: (G, *shape, N), where terms depend on it.
    """
    (lines, count), features = shape, lanes.shape[3]
    source, lanes = arithmetic.pack(source), arithmetic.pack(lanes)
    tile = _choose_tile(count, features, interpret)
    rows, features_up = _round_up(count, tile.rows), _round_up(features, tile.lanes)
    terms, chunks = _chunks(lanes.shape[2], WARPGROUP // (tile.lanes * lanes.dtype.itemsize))
    longest = max(source.shape[4], rows + max(offset for *_, offset in table))
    source = xla.pad_to(xla.pad_to(source, 2, terms * chunks), 4, _round_up(longest, 16))
    lanes = xla.pad_to(xla.pad_to(lanes, 2, terms * chunks), 3, features_up)
    operands = [
        source.reshape(-1, *source.shape[2:]),
        lanes.reshape(-1, features_up),
        jnp.array(table, jnp.int32),
    ]
    if target is not None:
        operands.append(xla.pad_to(xla.pad_to(target, 2, rows), 3, features_up))
    out = (source.shape[0], lines, rows, features_up)
    sums = _kernel(arithmetic, tile, terms, source.shape[1], lanes.shape[1], out, operands)
    sums = sums[:, :, :count, :features]
    if arithmetic.finish is _join:
        present = lanes[:, np.array([tap for _, tap, *_ in table]), :, :features]
        sums = sums - present.astype(jnp.float32).sum((1, 2))[:, None, None]
    return sums


def _kernel(
    arithmetic: _Arithmetic,
    tile: _Tile,
    terms: int,
    planes: int,
    taps: int,
    out: tuple[int, int, int, int],
    operands: Sequence[Array],
) -> Array:
    """The Pallas kernel: a warpgroup for each tile of the output."""
    plgpu = _pallas()
    groups, lines, rows, features = out
    chunks = operands[0].shape[1] // terms
    steps = operands[2].shape[0] * chunks
    stages = min(STAGES, steps)

    def body(source: Any, lanes: Any, table: Any, *refs: Any) -> None:
        *targets, result, row_buffer, lane_buffer, arrived = refs
        group, line, first_row, first_lane = _position(
            lax.axis_index("tile"), (groups, lines, rows // tile.rows, features // tile.lanes)
        )
        row_window = _window(first_row * tile.rows, tile.rows)
        lane_window = _window(first_lane * tile.lanes, tile.lanes)

        def fetch(step: Array) -> None:
            entry, chunk, slot = step // chunks, lax.rem(step, chunks), lax.rem(step, stages)
            plane, tap, down, offset = (table[entry, i] for i in range(4))
            term = chunk * terms
            plgpu.copy_gmem_to_smem(
                source.at[
                    group * planes + plane,
                    _window(term, terms),
                    line + down,
                    _window(first_row * tile.rows + offset, tile.rows),
                ],
                row_buffer.at[slot],
                arrived.at[slot],
            )
            plgpu.copy_gmem_to_smem(
                lanes.at[
                    _window((group * taps + tap) * (chunks * terms) + term, terms), lane_window
                ],
                lane_buffer.at[slot],
                arrived.at[slot],
            )

        def add(step: Array, sums: Any) -> Any:
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(arrived.at[slot])
            loaded = [
                (tile.row(row_buffer.at[slot, i]), tile.lane(lane_buffer.at[slot, i]))
                for i in range(terms)
            ]
            sums = arithmetic.add(tile, sums, loaded, target)
            lax.cond(step + stages < steps, lambda: fetch(step + stages), lambda: None)
            return sums

        for step in range(stages):
            fetch(jnp.int32(step))
        target = None
        if targets:
            target = tile.load(targets[0].at[group, line, row_window, lane_window])
        sums = lax.fori_loop(0, steps, add, arithmetic.start(tile))
        tile.store(result.at[group, line, row_window, lane_window], arithmetic.finish(tile, sums))

    tiles = groups * lines * (rows // tile.rows) * (features // tile.lanes)
    call = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, arithmetic.total),
        scratch_types=[
            plgpu.SMEM((stages, terms, tile.rows), arithmetic.dtype),
            plgpu.SMEM((stages, terms, tile.lanes), arithmetic.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        grid=(tiles,),
        grid_names=("tile",),
        kernel_name="jadder_sums",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if tile.interpret else None,
    )
    # Pallas gives its results no varying axes inside jax.shard_map.
    return vary_alike(call(*operands), *operands)[0]


def _position(index: Array, sizes: Sequence[int]) -> list[Array]:
    """The coordinates of a flat index, the last of them the fastest."""
    position = []
    for size in reversed(sizes):
        position.append(lax.rem(index, size))
        index = index // size
    return position[::-1]


def _window(start: Array, size: int) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(start, size)


def _pallas() -> Any:
    """Pallas for Mosaic GPU, imported where it is used: its interface is not stable."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _choose_tile(rows: int, features: int, interpret: bool) -> _Tile:
    """The tile that computes the fewest outputs beside those asked for, the squarest of equals."""
    most, lanes = min(TILES, key=lambda tile: (_round_up(features, tile[1]), TILES.index(tile)))
    return _Tile(min(most, _round_up(rows, 64)), lanes, interpret)


def _chunks(terms: int, unit: int) -> tuple[int, int]:
    """How to cut ``terms``: (terms of a chunk, a multiple of ``unit``, and chunks)."""
    unit = max(1, unit)
    units = -(-terms // unit)
    chunks = -(-units * unit // TERMS)
    return -(-units // chunks) * unit, chunks


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _planes(source: Array, steps: Sequence[int]) -> tuple[Array, int]:
    """A source (B, *spatial, G, K) split by residues, and how wide its lines are.

    It comes as (G, planes, K, lines, columns · B): within a plane, neighbours are ``steps`` apart.
    """
    for axis, step in enumerate(steps, start=1):
        source = xla.pad_to(source, axis, _round_up(source.shape[axis], step))
    batch, height, width, groups, terms = source.shape
    (down, across), lines, wide = steps, height // steps[0], width // steps[1]
    split = source.reshape(batch, lines, down, wide, across, groups, terms)
    split = jnp.transpose(split, (5, 2, 4, 6, 1, 3, 0))
    return split.reshape(groups, down * across, terms, lines, wide * batch), wide


def _planar(x: Array, w: Array, spec: ConvSpec) -> tuple[Array, Array, ConvSpec]:
    """A convolution of one dimension as one of two: a plane one pixel high."""
    if x.ndim == 4:
        return x, w, spec
    planar = ConvSpec(
        (1, *spec.window_strides),
        ((0, 0), *spec.padding),
        (1, *spec.lhs_dilation),
        (1, *spec.rhs_dilation),
        spec.feature_group_count,
    )
    return x[:, None], w[None], planar


def _restore_nan(
    dx: Array, x: Array, w: Array, *, reduce: int | tuple[int, ...], expand: int | tuple[int, ...]
) -> Array:
    """NaN where a difference w - x is: saturating instructions make 0 of it."""
    nan, high, low = (
        jnp.expand_dims(jnp.any(found, axis=reduce), expand)
        for found in (jnp.isnan(w), w == jnp.inf, w == -jnp.inf)
    )
    none = jnp.isnan(x) | nan | ((x == jnp.inf) & high) | ((x == -jnp.inf) & low)
    return jnp.where(none, jnp.nan, dx)
