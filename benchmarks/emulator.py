"""Exported networks in an emulator: built with pip's ziglang, run and counted with unicorn.

Counts are of instructions, all of them, from the call of the network's function to its return.
"""

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("ziglang", "unicorn", "capstone", "elftools")
"""Modules of the extra "edge"."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A processor that unicorn emulates.

    Attributes:
      flags: for Clang, as in the folder's Makefile.
      kind: 'thumb' or 'arm64'.
    """

    flags: tuple[str, ...]
    kind: str


def _cortex(name: str) -> Machine:
    size = "-O2" if name == "m0" else "-Os"
    return Machine(("-target", "thumb-freestanding-eabi", f"-mcpu=cortex_{name}", size), "thumb")


MACHINES: Mapping[str, Machine] = {
    "cortex-m4": _cortex("m4"),
    "cortex-m7": _cortex("m7"),
    "cortex-m0": _cortex("m0"),
    "aarch64": Machine(("-target", "aarch64-freestanding", "-mcpu=cortex_a53", "-O2"), "arm64"),
}

_FREESTANDING = (
    "-std=c99", "-ffreestanding", "-fomit-frame-pointer", "-fno-sanitize=all",
    "-fno-unwind-tables", "-fno-asynchronous-unwind-tables", "-fno-stack-protector",
)  # fmt: skip

# What the code needs of a C library.
_STRING_H = """
#include <stddef.h>
void *memset(void *, int, size_t);
void *memcpy(void *restrict, const void *restrict, size_t);
"""
_RUNTIME = """
#include <stddef.h>
#include <stdint.h>
typedef struct { uint32_t word; } __attribute__((packed, may_alias)) Word; /* at any address */
__attribute__((no_builtin)) void *memset(void *to, int value, size_t size) {
  uint8_t *byte = to;
  uint32_t word = (uint8_t)value * UINT32_C(0x01010101);
  for (; size >= 4; size -= 4, byte += 4) ((Word *)(void *)byte)->word = word;
  while (size--) *byte++ = (uint8_t)value;
  return to;
}
__attribute__((no_builtin))
void *memcpy(void *restrict to, const void *restrict from, size_t size) {
  uint8_t *a = to;
  const uint8_t *b = from;
  for (; size >= 4; size -= 4, a += 4, b += 4) {
    ((Word *)(void *)a)->word = ((const Word *)(const void *)b)->word;
  }
  while (size--) *a++ = *b++;
  return to;
}
#if defined(__ARM_ARCH_6M__) /* what its compiler calls for 64-bit integers */
typedef union { uint64_t whole; struct { uint32_t low, high; } part; } Pair;
uint64_t __aeabi_lmul(uint64_t x, uint64_t y) {
  Pair a = {x}, b = {y}, r;
  uint32_t al = a.part.low & 0xffff, ah = a.part.low >> 16;
  uint32_t bl = b.part.low & 0xffff, bh = b.part.low >> 16;
  uint32_t low = al * bl, one = ah * bl + (low >> 16), two = al * bh + (one & 0xffff);
  r.part.low = two << 16 | (low & 0xffff);
  r.part.high = ah * bh + (one >> 16) + (two >> 16);
  r.part.high += a.part.high * b.part.low + a.part.low * b.part.high;
  return r.whole;
}
int64_t __aeabi_lasr(int64_t x, int n) {
  Pair a = {(uint64_t)x};
  int32_t high = (int32_t)a.part.high;
  if (n == 0) return x;
  a.part.low = n < 32 ? a.part.low >> n | (uint32_t)high << (32 - n) : (uint32_t)(high >> (n - 32));
  a.part.high = (uint32_t)(high >> (n < 32 ? n : 31));
  return (int64_t)a.whole;
}
uint64_t __aeabi_llsr(uint64_t x, int n) {
  Pair a = {x};
  if (n == 0) return x;
  a.part.low = n < 32 ? a.part.low >> n | a.part.high << (32 - n) : a.part.high >> (n - 32);
  a.part.high = n < 32 ? a.part.high >> n : 0;
  return a.whole;
}
uint64_t __aeabi_llsl(uint64_t x, int n) {
  Pair a = {x};
  if (n == 0) return x;
  a.part.high = n < 32 ? a.part.high << n | a.part.low >> (32 - n) : a.part.low << (n - 32);
  a.part.low = n < 32 ? a.part.low << n : 0;
  return a.whole;
}
#endif
void emulator_mark(int i) { __asm__ volatile("" :: "r"(i)); }
"""

_CODE, _DATA = 0x0100_0000, 0x2000_0000
_STACK, _STACK_SIZE = 0x3000_0000, 0x1_0000
_RETURN = 0x7000_0000


def missing() -> list[str]:
    """The modules of the extra "edge" that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def build(folders: Sequence[Path], machine: Machine, into: Path, *, marks: bool = False) -> Path:
    """Compiles exported networks and links them together.

    Args:
      folders: of the networks, whose names differ.
      machine: what to compile for.
      into: a folder for what comes out.
      marks: whether the networks tell the emulator where each operation ends, which takes a few
        instructions.

    Raises:
      RuntimeError: with what the compiler said.
    """
    into.mkdir(parents=True, exist_ok=True)
    (into / "runtime.c").write_text(_RUNTIME)
    (into / "string.h").write_text(_STRING_H)
    sources = [into / "runtime.c"]
    names = []
    for folder in folders:
        (header,) = (h for h in folder.glob("*.h") if not h.stem.endswith(_PARTS))
        names.append(header.stem)
        sources += sorted(each for each in folder.glob(f"{header.stem}*.[cs]"))
    macros = [f"-D{name.upper()}_AFTER(i)={_MARK}" for name in names] if marks else []
    _zig("cc", *machine.flags, *_FREESTANDING, *macros, "-I", into, "-c", "-o", "network.o",
         *(each.resolve() for each in sources), cwd=into)  # fmt: skip
    kept = [option for name in names for option in ("-u", f"{name}_run")]
    _zig("ld.lld", "--entry=0", f"-Ttext={_CODE:#x}", "-o", "linked.elf", "--gc-sections", *kept,
         "-u", "emulator_mark", "network.o", cwd=into)  # fmt: skip
    return into / "linked.elf"


_PARTS = ("_kernels", "_weights", "_vectors")
_MARK = "do{void emulator_mark(int);emulator_mark(i);}while(0)"


def _zig(*arguments: Any, cwd: Path) -> None:
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@dataclasses.dataclass
class Sizes:
    """Bytes of a linked network.

    Attributes:
      code: instructions, C and assembly.
      constants: read-only data.
    """

    code: int
    constants: int


class Emulator:
    """One network in memory.

    Args:
      elf: what ``build`` made.
      name: of the network.
      machine: as for ``build``.
      arena_bytes: of its activations.
      output_size: of its output.
    """

    def __init__(
        self, elf: Path, name: str, machine: Machine, arena_bytes: int, output_size: int
    ) -> None:
        import unicorn
        from elftools.elf.elffile import ELFFile
        from unicorn.unicorn import Uc

        self._thumb = machine.kind == "thumb"
        if self._thumb:
            mode = unicorn.UC_MODE_THUMB | unicorn.UC_MODE_MCLASS
            self._uc = Uc(unicorn.UC_ARCH_ARM, mode)
            self._uc.ctl_set_cpu_model(unicorn.arm_const.UC_CPU_ARM_CORTEX_M4)
        else:
            self._uc = Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.arena_bytes, self.output_size = arena_bytes, output_size
        self.sizes = Sizes(0, 0)
        with elf.open("rb") as file:
            linked = ELFFile(file)
            self._load(linked)
            table: Any = linked.get_section_by_name(".symtab")
            symbols = {each.name: each["st_value"] for each in table.iter_symbols()}
        self._entry = symbols[f"{name}_run"]
        self._mark = symbols["emulator_mark"] & ~1
        self._uc.mem_map(_STACK, _STACK_SIZE)
        self._uc.mem_map(_RETURN, 0x1000)
        self._uc.mem_map(_DATA, 0x0100_0000)
        self._lengths: dict[tuple[int, int], int] = {}
        self._count = 0
        self.marks: list[int] = []
        """Instructions counted when each operation had ended."""
        self._disassembler = _disassembler(machine)
        self._uc.hook_add(unicorn.UC_HOOK_BLOCK, self._block)

    def _load(self, linked: Any) -> None:
        for section in linked.iter_sections():
            if section["sh_flags"] & 2 and section["sh_type"] == "SHT_PROGBITS":
                executable = bool(section["sh_flags"] & 4)
                if executable:
                    self.sizes.code += section["sh_size"]
                elif ".ARM.ex" not in section.name:
                    self.sizes.constants += section["sh_size"]
        for segment in linked.iter_segments("PT_LOAD"):
            start = segment["p_vaddr"] & ~0xFFF
            end = -(-(segment["p_vaddr"] + segment["p_memsz"]) // 0x1000) * 0x1000
            for page in range(start, end, 0x1000):
                with contextlib.suppress(Exception):  # two segments may share a page
                    self._uc.mem_map(page, 0x1000)
            self._uc.mem_write(segment["p_vaddr"], segment.data())

    def _block(self, uc: Any, address: int, size: int, _: Any) -> None:
        key = (address, size)
        if key not in self._lengths:
            code = bytes(uc.mem_read(address, size))
            lengths = self._disassembler.disasm_lite(code, address)
            self._lengths[key] = sum(1 for _ in lengths)
        if address == self._mark:
            self.marks.append(self._count)
        self._count += self._lengths[key]

    def run(self, image: Any) -> tuple[Any, int]:
        """The int32 output of one image, and the number of instructions."""
        image = np.ascontiguousarray(image, np.uint8)
        out_at, image_at = _DATA + 0x40_0000, _DATA + 0x80_0000
        self._uc.mem_write(image_at, image.tobytes())
        # What memory holds before must not matter.
        self._uc.mem_write(_DATA, b"\xa5" * (self.arena_bytes + 64))
        self._count = 0
        self.marks.clear()
        self._call([image_at, out_at, _DATA])
        guard = bytes(self._uc.mem_read(_DATA + self.arena_bytes, 64))
        if guard != b"\xa5" * 64:
            raise RuntimeError("the network wrote behind its arena")
        output = bytes(self._uc.mem_read(out_at, 4 * self.output_size))
        return np.frombuffer(output, np.int32), self._count

    def _call(self, arguments: Sequence[int]) -> None:
        from unicorn import arm64_const, arm_const

        top = _STACK + _STACK_SIZE - 64
        if self._thumb:
            registers = [arm_const.UC_ARM_REG_R0 + i for i in range(len(arguments))]
            link, stack = arm_const.UC_ARM_REG_LR, arm_const.UC_ARM_REG_SP
        else:
            registers = [arm64_const.UC_ARM64_REG_X0 + i for i in range(len(arguments))]
            link, stack = arm64_const.UC_ARM64_REG_X30, arm64_const.UC_ARM64_REG_SP
        for register, value in zip(registers, arguments, strict=True):
            self._uc.reg_write(register, value)
        self._uc.reg_write(stack, top)
        self._uc.reg_write(link, _RETURN | 1 if self._thumb else _RETURN)
        self._uc.emu_start(self._entry | 1 if self._thumb else self._entry, _RETURN)


def _disassembler(machine: Machine) -> Any:
    import capstone

    if machine.kind == "thumb":
        mode = capstone.CS_MODE_THUMB | capstone.CS_MODE_MCLASS
        return capstone.Cs(capstone.CS_ARCH_ARM, mode)
    return capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
