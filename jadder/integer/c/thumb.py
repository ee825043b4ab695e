"""Thumb-2 assembly with the DSP instructions of Cortex-M4 and M7, one function for each shape.

A function computes one row of a result. It works on tiles of two positions and four features, in
eight accumulators (r4 to r11); r0 points at the first position's window, r1 walks through the
weights, which lie in the order of their use; r2 and r3 hold four bytes of each window (two 16-bit
activations in a multiplying layer), r12 and lr two features' weights::

    ldr    r2, [r0, #o]           @ a word of the first window
    ldr    r3, [r0, #o + step]    @ and of the second one
    ldrd   r12, lr, [r1], #8      @ two features
    usada8 r8, r3, r12, r8
    usada8 r4, r2, r12, r4        ... 8 of them for 32 distances, from 4 loads

Multiplying layers are the same with SMLAD, on words of two 16-bit values: their rows are widened
once for each row of results. What follows a tile's sums (`Epilogue`) has its numbers behind the
tile's weights, so that r1 goes on.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

_MOST_WORDS = 144
"""Longer windows are loops: of 48 bytes for each word that is unrolled."""
_MOST_OFFSET = 4095

X = ("r2", "r3")
W = ("r12", "lr")
ACC = (("r4", "r5", "r6", "r7"), ("r8", "r9", "r10", "r11"))

# The stack of a function.
_OUT, _END, _COUNT, _STREAM, _RESIDUAL, _X, _LOOPS = 0, 4, 8, 12, 16, 20, 24
_FRAME = 40


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """From a tile's sums to bytes.

    Attributes:
      offset_starts: whether the bias is a whole number of the sums' units, with which the
        accumulators start; what is left then is a rounded high half of a product.
      narrow: whether results before their bounds fit 16 bits.
      shift: of the 64-bit value.
      low, high: bounds of the result.
      residual: None, or how the residual is multiplied: 'unsigned' or 'signed' 32 bits.
      left_shift: of the residual before.
    """

    offset_starts: bool
    narrow: bool
    shift: int
    low: int
    high: int
    residual: Literal["unsigned", "signed"] | None = None
    left_shift: int = 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What decides a function's code.

    Attributes:
      product: 'adder' or 'multiply'.
      width: positions in the row.
      step: bytes from one position's window to the next.
      taps: loops over a window's words, the outermost first: (times, bytes of each step).
      tiles: fours of features.
      pitch: of the result, in elements; sums have four times the tiles.
      epilogue: None for the sums themselves, in int32.
    """

    product: Literal["adder", "multiply"]
    width: int
    step: int
    taps: tuple[tuple[int, int], ...]
    tiles: int
    pitch: int
    epilogue: Epilogue | None

    @property
    def words(self) -> int:
        """Words of one window."""
        return math.prod(times for times, _ in self.taps)

    @property
    def tile_words(self) -> int:
        """Words of one tile's weights and numbers."""
        return 4 * self.words + epilogue_words(self.epilogue)


def epilogue_words(epilogue: Epilogue | None) -> int:
    """Words that follow (or begin) a tile's weights."""
    if epilogue is None:
        return 0
    if epilogue.offset_starts:
        return 8
    return 12 + (epilogue.residual is not None)


def fits(step: int) -> bool:
    """Whether windows so many bytes apart are within the reach of the loads."""
    return step <= _MOST_OFFSET // 2


class _Code:
    """Lines of assembly and the bytes that they take."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.size = 0

    def __call__(self, text: str, size: int = 4) -> None:
        self.lines.append(f"    {text}")
        self.size += size

    def label(self, name: str) -> None:
        self.lines.append(f"{name}:")

    def load(self, register: str, base: str, offset: int) -> None:
        """LDR in its short form where there is one."""
        low = register in _LOW and offset % 4 == 0
        short = low and ((base in _LOW and offset <= 124) or (base == "sp" and offset <= 1020))
        self(f"ldr{'' if short else '.w'} {register}, [{base}, #{offset}]", 2 if short else 4)

    def store(self, register: str, base: str, offset: int) -> None:
        low = register in _LOW and offset % 4 == 0
        short = low and ((base in _LOW and offset <= 124) or (base == "sp" and offset <= 1020))
        self(f"str{'' if short else '.w'} {register}, [{base}, #{offset}]", 2 if short else 4)

    def add(self, register: str, value: int, scratch: str = "r12") -> None:
        """register += value; ``scratch`` is lost where value is large."""
        if value == 0:
            return
        name, size = ("add", value) if value > 0 else ("sub", -value)
        if size <= _MOST_OFFSET:
            self(f"{name}w {register}, {register}, #{size}")
            return
        self.number(scratch, size)
        self(f"{name}.w {register}, {register}, {scratch}")

    def number(self, register: str, value: int) -> None:
        self(f"movw {register}, #{value & 0xFFFF}")
        if value >> 16:
            self(f"movt {register}, #{value >> 16}")


_LOW = {f"r{i}" for i in range(8)}


def function(name: str, kernel: Kernel) -> tuple[str, int]:
    """The assembly of ``void name(x, stream, out, residual)``, and its size in bytes."""
    code = _Code()
    pixels = min(2, kernel.width)
    pairs = -(-kernel.width // pixels)
    each = kernel.epilogue
    element = 4 if each is None else 1
    code("push.w {r4-r11, lr}")
    code(f"sub sp, #{_FRAME}", 2)
    code.store("r2", "sp", _OUT)
    code.store("r3", "sp", _RESIDUAL)
    code.store("r1", "sp", _STREAM)
    code.number("r2", 4 * kernel.tiles * kernel.tile_words)
    code("adds r2, r2, r1", 2)
    code.store("r2", "sp", _END)
    if pairs > 1:
        code.number("r2", pairs)
        code.store("r2", "sp", _COUNT)
    code.label(f".L{name}_positions")
    if each is not None and each.residual:
        code.store("r0", "sp", _X)
    code.label(f".L{name}_tile")
    _sums(code, name, kernel, pixels)
    if each is None:
        _store_sums(code, kernel, pixels)
    else:
        _store_bytes(code, kernel, each, pixels)
    code("cmp r1, r3", 2)
    code(f"bne.w .L{name}_tile")
    if pairs > 1:
        _next_positions(code, name, kernel, element)
    code(f"add sp, #{_FRAME}", 2)
    code("pop.w {r4-r11, pc}")
    head = [f"    .global {name}", f"    .type {name}, %function", "    .thumb_func", f"{name}:"]
    tail = [f"    .size {name}, . - {name}"]
    return "\n".join(["    .balign 4", *head, *code.lines, *tail]) + "\n", code.size


def _next_positions(code: _Code, name: str, kernel: Kernel, element: int) -> None:
    """Goes on by two positions, or by one to the last two of an odd row.

    ``r2``, the result's address, is behind the first position's features.
    """
    odd = kernel.width % 2 == 1
    moved = 4 * kernel.tiles * element
    pitch = kernel.pitch * element
    has_residual = kernel.epilogue is not None and kernel.epilogue.residual is not None
    code.load("r1", "sp", _COUNT)
    code("subs r1, #1", 2)
    code.store("r1", "sp", _COUNT)
    code(f"beq.w .L{name}_end")
    code.add("r0", 2 * kernel.step)
    code.add("r2", 2 * pitch - moved)
    if has_residual:
        code.load("r3", "sp", _RESIDUAL)
        code.add("r3", 2 * pitch - moved)
    if odd:
        code("cmp r1, #1", 2)
        code(f"bne.w .L{name}_whole")
        code.add("r0", -kernel.step)
        code.add("r2", -pitch)
        if has_residual:
            code.add("r3", -pitch)
        code.label(f".L{name}_whole")
    code.store("r2", "sp", _OUT)
    if has_residual:
        code.store("r3", "sp", _RESIDUAL)
    code.load("r1", "sp", _STREAM)
    code(f"b.w .L{name}_positions")
    code.label(f".L{name}_end")


def _split(taps: Sequence[tuple[int, int]], step: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The loops that stay, and the offsets of the words that are unrolled within them."""
    loops = [each for each in taps if each[0] > 1]
    if loops and loops[-1][0] > _MOST_WORDS:
        times, size = loops.pop()
        inner = max(n for n in range(1, _MOST_WORDS + 1) if times % n == 0)
        loops += [(times // inner, inner * size), (inner, size)]
    offsets = [0]
    while loops:
        times, size = loops[-1]
        longer = [i * size + offset for i in range(times) for offset in offsets]
        if len(longer) > _MOST_WORDS or longer[-1] + step > _MOST_OFFSET:
            break
        offsets = longer
        loops.pop()
    return loops, offsets


def _sums(code: _Code, name: str, kernel: Kernel, pixels: int) -> None:
    """The sums of a tile in the accumulators."""
    loops, offsets = _split(kernel.taps, kernel.step if pixels == 2 else 0)
    each = kernel.epilogue
    starts = each is not None and each.offset_starts
    if starts:
        code("ldm.w r1!, {r4-r7}")
    if loops:
        for pixel in range(pixels):
            for feature in range(4):
                if pixel and starts:
                    code(f"mov {ACC[1][feature]}, {ACC[0][feature]}", 2)
                elif not starts:
                    code(f"mov.w {ACC[pixel][feature]}, #0")
    for level, (times, _) in enumerate(loops):
        code.number("r2", times)
        code.store("r2", "sp", _LOOPS + 4 * level)
        code.label(f".L{name}_loop{level}")
    for index, offset in enumerate(offsets):
        first = None if loops or index else ("start" if starts else "zero")
        _word(code, kernel, pixels, offset, first)
    advanced = 0
    for level in reversed(range(len(loops))):
        times, size = loops[level]
        code.add("r0", size - advanced)
        advanced = times * size
        code.load("r2", "sp", _LOOPS + 4 * level)
        code("subs r2, #1", 2)
        code.store("r2", "sp", _LOOPS + 4 * level)
        code(f"bne.w .L{name}_loop{level}")
    code.add("r0", -advanced)


def _word(code: _Code, kernel: Kernel, pixels: int, offset: int, first: str | None) -> None:
    """One word of the windows with four features' weights."""
    for pixel in range(pixels):
        code.load(X[pixel], "r0", offset + pixel * kernel.step)
    add, begin = ("usada8", "usad8") if kernel.product == "adder" else ("smlad", "smuad")
    for half in range(2):
        code("ldrd r12, lr, [r1], #8")
        for w in range(2):
            for pixel in reversed(range(pixels)):
                to = ACC[pixel][2 * half + w]
                if first == "zero":
                    code(f"{begin} {to}, {X[pixel]}, {W[w]}")
                else:
                    onto = ACC[0][2 * half + w] if first == "start" else to
                    code(f"{add} {to}, {X[pixel]}, {W[w]}, {onto}")


def _store_sums(code: _Code, kernel: Kernel, pixels: int) -> None:
    code("ldrd r2, r3, [sp]")
    if pixels == 2:
        code(f"addw r12, r2, #{4 * kernel.pitch}")
        code("stm.w r12, {r8-r11}")
    code("stm.w r2!, {r4-r7}")
    code.store("r2", "sp", _OUT)


def _store_bytes(code: _Code, kernel: Kernel, each: Epilogue, pixels: int) -> None:
    if each.offset_starts:
        _rounded_products(code, each, pixels)
    else:
        _exact_values(code, kernel, each, pixels)
    full = each.high.bit_length()
    _bounds(code, each, full, pixels)
    code("ldrd r2, r3, [sp]")
    if pixels == 2:
        code(f"str.w r8, [r2, #{kernel.pitch}]")
    code("str.w r4, [r2], #4")
    code.store("r2", "sp", _OUT)


def _rounded_products(code: _Code, each: Epilogue, pixels: int) -> None:
    """q = (sum · multiplier + 2^31) >> 32, where the bias is in the sum."""
    bits = each.high.bit_length()
    code("ldm.w r1!, {r2, r3, r12, lr}")
    for pixel in range(pixels):
        for acc, multiplier in zip(ACC[pixel], (*X, *W), strict=True):
            code(f"smmulr {acc}, {acc}, {multiplier}")
    for pixel in range(pixels):
        a, b, c, d = ACC[pixel]
        if each.narrow:
            code(f"pkhbt {a}, {a}, {c}, lsl #16")
            code(f"pkhbt {b}, {b}, {d}, lsl #16")
            code(f"usat16 {a}, #{bits}, {a}")
            code(f"usat16 {b}, #{bits}, {b}")
            code(f"orr.w {a}, {a}, {b}, lsl #8")
        else:
            for acc in ACC[pixel]:
                code(f"usat {acc}, #{bits}, {acc}")
            _pack(code, pixel)


def _exact_values(code: _Code, kernel: Kernel, each: Epilogue, pixels: int) -> None:
    """q = (sum · multiplier + bias + residual · its multiplier) >> shift, in 64 bits."""
    bits = each.high.bit_length()
    if each.residual:
        code("ldr.w lr, [r1], #4")
        code.load("r0", "sp", _RESIDUAL)
    for feature in range(4):
        for pixel in range(pixels):
            acc = ACC[pixel][feature]
            last = pixel + 1 == pixels
            if each.residual:
                code(f"ldm.w r1{'!' if last else ''}, {{r2, r3, r12}}")
            elif pixel == 0:
                code("ldm.w r1!, {r2, r3, r12}")
            else:
                code("ldrd r3, r12, [r1, #-8]")
            code(f"smlal r3, r12, {acc}, r2")
            if each.residual:
                code(f"ldrb.w r2, [r0, #{pixel * kernel.pitch + feature}]")
                if each.left_shift:
                    code(f"lsls r2, r2, #{each.left_shift}", 2)
                code(f"{'umlal' if each.residual == 'unsigned' else 'smlal'} r3, r12, r2, lr")
            _shifted_and_saturated(code, acc, each.shift, bits)
    if each.residual:
        code("adds r0, #4", 2)
        code.store("r0", "sp", _RESIDUAL)
        code.load("r0", "sp", _X)
    for pixel in range(pixels):
        _pack(code, pixel)


def _shifted_and_saturated(code: _Code, to: str, shift: int, bits: int) -> None:
    """From r12:r3 to ``bits`` unsigned bits."""
    if shift >= 32:
        by = f", asr #{shift - 32}" if shift > 32 else ""
        code(f"usat {to}, #{bits}, r12{by}")
        return
    if shift:
        code(f"lsrs r3, r3, #{shift}", 2)
        code(f"orr.w r3, r3, r12, lsl #{32 - shift}")
    code(f"usat {to}, #{bits}, r3")


def _pack(code: _Code, pixel: int) -> None:
    a, b, c, d = ACC[pixel]
    code(f"orr.w {a}, {a}, {b}, lsl #8")
    code(f"orr.w {c}, {c}, {d}, lsl #8")
    code(f"orr.w {a}, {a}, {c}, lsl #16")


def _bounds(code: _Code, each: Epilogue, bits: int, pixels: int) -> None:
    """Bounds that saturation to ``bits`` bits has not taken care of, four bytes at a time."""
    packed = [ACC[pixel][0] for pixel in range(pixels)]
    if each.high != (1 << bits) - 1:
        code(f"mov.w r3, #0x{each.high * 0x01010101:08x}")
        for acc in packed:
            code(f"uqsub8 r2, {acc}, r3")
            code(f"usub8 {acc}, {acc}, r2")
    if each.low:
        code(f"mov.w r3, #0x{each.low * 0x01010101:08x}")
        for acc in packed:
            code(f"uqsub8 {acc}, {acc}, r3")
            code(f"uadd8 {acc}, {acc}, r3")


def widen(name: str, *, aligned: bool) -> tuple[str, int]:
    """``void name(from, to, blocks)``: blocks of 16 bytes as 16-bit integers.

    Where addresses and pixels are of whole words, each four come out in the order 0, 2, 1, 3,
    which is what UXTB16 gives; otherwise in their own.
    """
    code = _Code()
    code("push.w {r4-r10, lr}")
    code.label(f".L{name}")
    if aligned:
        code("ldm.w r0!, {r3, r5, r7, r9}")
        for i in (3, 5, 7, 9):
            code(f"uxtb16 r{i + 1}, r{i}, ror #8")
            code(f"uxtb16 r{i}, r{i}")
        code("stm.w r1!, {r3-r10}")
    else:
        for _ in range(4):
            code("ldr.w r3, [r0], #4")
            code("uxtb16 r4, r3, ror #8")
            code("uxtb16 r3, r3")
            code("pkhbt r5, r3, r4, lsl #16")
            code("pkhtb r6, r4, r3, asr #16")
            code("strd r5, r6, [r1], #8")
    code("subs r2, #1", 2)
    code(f"bne.w .L{name}")
    code("pop.w {r4-r10, pc}")
    head = [f"    .global {name}", f"    .type {name}, %function", "    .thumb_func", f"{name}:"]
    tail = [f"    .size {name}, . - {name}"]
    return "\n".join(["    .balign 4", *head, *code.lines, *tail]) + "\n", code.size
