"""Exported programs, compiled and run: on this machine and in an emulator."""

import functools
import os
import shutil
import subprocess
import sys
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jadder
from benchmarks import emulator
from jadder.integer import IntegerProgram
from jadder.integer.c import export
from jadder.integer.c.emit import emit
from jadder.integer.c.targets import TARGETS

WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror")


@functools.cache
def compilers() -> dict[str, list[str]]:
    """GCC and Clang, where they are installed."""
    found = {name: [name] for name in ("gcc", "clang") if shutil.which(name)}
    # pip's Clang compiles at once, but would build a C library of its own to link with.
    if "clang" not in found and "gcc" in found and "ziglang" not in emulator.missing():
        found["clang"] = [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all"]
    return found


def compiler(name: str) -> list[str]:
    """The command of a compiler; skips where there is none."""
    if name not in compilers():
        pytest.skip(f"no {name} here")
    return compilers()[name]


def check_on_host(command: Sequence[str], folders: Sequence[Path], into: Path) -> None:
    """Compiles networks of different names into one program, which checks their vectors."""
    names = [folder.name for folder in folders]
    calls = "".join(f"int check_{name}(void);\n" for name in names)
    calls += "int main(void) {\n  int wrong = 0;\n"
    calls += "".join(f"  wrong |= check_{name}();\n" for name in names) + "  return wrong;\n}\n"
    into.mkdir(parents=True, exist_ok=True)
    (into / "main.c").write_text(calls)
    sources = [into / "main.c"]
    for folder, name in zip(folders, names, strict=True):
        check = into / f"check_{name}.c"
        sources += [check, folder / f"{name}.c"]
        text = (folder / "main.c").read_text()
        check.write_text(text.replace("int main(void)", f"int check_{name}(void);\n"
                                      f"int check_{name}(void)"))  # fmt: skip
    program, warnings = into / "program", [*WARNINGS, *(f"-I{folder}" for folder in folders)]
    if "ziglang" in command:
        run([*command, *warnings, "-c", "-o", into / "all.o", *sources])
        run(["gcc", "-o", program, into / "all.o"])
    else:
        run([*command, *warnings, "-o", program, *sources])
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    assert run([program], environment).count(" 0 of ") == len(names)


def run(command: Sequence[Any], environment: dict[str, str] | None = None) -> str:
    """What a command prints, where it succeeds."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


class Emulated:
    """Programs exported for one processor, in one image of the emulator's memory."""

    def __init__(
        self, programs: Sequence[IntegerProgram], machine: str, place: Path, target: str
    ) -> None:
        self._machine = emulator.MACHINES[machine]
        self.codes = []
        folders = []
        for index, program in enumerate(programs):
            name = f"n{index}"
            folders.append(place / name)
            # The vectors are not looked at here, and XLA would compile each operation for them.
            outputs = np.zeros((3, *program.output.shape), np.int32)
            with unittest.mock.patch.object(export.xla, "run", lambda *_, y=outputs: y):
                jadder.export_c(program, folders[-1], target=target, name=name)
            self.codes.append(emit(program, TARGETS[target], name))
        self.elf = emulator.build(folders, self._machine, place / "build")
        self._outputs = [program.output.size for program in programs]

    def load(self, index: int) -> emulator.Emulator:
        """A machine with the network of that number."""
        size = self.codes[index].plan.size
        return emulator.Emulator(self.elf, f"n{index}", self._machine, size, self._outputs[index])


def needs_emulator() -> Any:
    """A mark that skips where the extra "edge" is not installed."""
    missing = emulator.missing()
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
