"""Adder networks on small processors, beside their multiplying twins: `python -m benchmarks.edge`.

Networks of the shape of MLPerf Tiny's ResNet-8 and of ResNet-20, exported with random weights,
compiled with pip's ziglang and run in an emulator that counts instructions. Counts hardly depend on
the weights. No time is measured: what an instruction takes is the processor's affair. With every
row, ten minutes; the assembly alone (`--rows cortex-m4`), seconds.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jadder
from benchmarks import emulator
from jadder.integer import Convolution, IntegerProgram
from jadder.integer.c.emit import Code, describe, emit
from jadder.integer.c.targets import TARGETS

# What is compiled, and for which processor.
ROWS: Mapping[str, tuple[str, str]] = {
    "cortex-m4": ("cortex-m4", "cortex-m4"),
    "cortex-m7": ("cortex-m7", "cortex-m7"),
    "c99 on cortex-m4": ("c99", "cortex-m4"),
    "c99 on cortex-m0": ("c99", "cortex-m0"),
    "aarch64": ("aarch64", "aarch64"),
    "c99 on aarch64": ("c99", "aarch64"),
}
FAMILIES = ("adder", "conv")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One network on one processor.

    Attributes:
      program: the network.
      code: its C.
      instructions: of one image.
      layers: instructions of each operation.
      sizes: of the linked network.
    """

    program: IntegerProgram
    code: Code
    instructions: int
    layers: tuple[int, ...]
    sizes: emulator.Sizes


def network(model: str, family: str) -> IntegerProgram:
    """A network for CIFAR's images in bytes, untrained, its batch norms fitted to random images."""
    built = jadder.models.create(model, family=family, rngs=nnx.Rngs(0))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    x = (pixels / np.float32(255) - 0.5) / 0.25
    forward = nnx.jit(lambda model, x: model(x))
    for _ in range(50):  # until the running statistics are those of the images
        forward(built, x)
    return jadder.quantize(built, pixels, mean=0.5, std=0.25)


def measure(program: IntegerProgram, row: str) -> Measured:
    """Exports, compiles and runs a network.

    Raises:
      RuntimeError: it does not compile, or its output is not the program's.
    """
    target, machine = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        image = np.random.default_rng(1).integers(0, 256, (1, *program.input.shape), np.uint8)
        jadder.export_c(program, place / "c", target=target, name="net", images=image)
        code = emit(program, TARGETS[target], "net")
        elf = emulator.build([place / "c"], emulator.MACHINES[machine], place / "b", marks=True)
        processor = emulator.Emulator(
            elf, "net", emulator.MACHINES[machine], code.plan.size, program.output.size
        )
        output, count = processor.run(image[0])
    wanted = np.asarray(program(image))[0] / np.float32(program.output.scale[0])
    if not np.array_equal(output, np.rint(wanted).reshape(-1)):
        raise RuntimeError(f"{row}: the output is not the program's")
    layers = tuple(np.diff([0, *processor.marks]).tolist())
    return Measured(program, code, count, layers, processor.sizes)


def terms(program: IntegerProgram) -> list[int]:
    """Distances or products of each operation."""
    return [
        math.prod(each.output.shape) * math.prod(each.kernel.shape[:3])
        if isinstance(each, Convolution)
        else 0
        for each in program.operations
    ]


def layer_table(adder: Measured, twin: Measured) -> list[list[str]]:
    """A line for each operation."""
    lines = [["operation", "terms", "adder", "terms/instruction", "twin", "terms/instruction",
              "ratio"]]  # fmt: skip
    for i, (operation, count) in enumerate(
        zip(adder.program.operations, terms(adder.program), strict=True)
    ):
        ours, theirs = adder.layers[i], twin.layers[i]
        rates = [f"{count / n:.2f}" if count else "" for n in (ours, theirs)]
        lines.append([describe(operation), f"{count:,}" if count else "", f"{ours:,}", rates[0],
                      f"{theirs:,}", rates[1], f"{theirs / ours:.2f}"])  # fmt: skip
    return lines


def summary(name: str, row: str, family: str, one: Measured) -> list[str]:
    """The line of a whole network."""
    total = sum(terms(one.program))
    kib = [f"{n / 1024:.1f}" for n in (one.sizes.code, one.sizes.constants, one.code.plan.size)]
    return [name, row, family, f"{one.instructions:,}", f"{total / one.instructions:.2f}", *kib]


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """In Markdown."""
    print(f"| {' | '.join(lines[0])} |")
    print(f"| {' | '.join(['---'] * len(lines[0]))} |")
    for line in lines[1:]:
        print(f"| {' | '.join(line)} |")
    print()


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edge", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=["resnet8", "resnet20"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args(argv)
    if missing := emulator.missing():
        print(f"needs {', '.join(missing)}: pip install 'jadder[edge]'", file=sys.stderr)
        return 2
    totals = [["network", "target", "family", "instructions", "terms/instruction", "code, KiB",
               "constants, KiB", "RAM, KiB", "twin / adder"]]  # fmt: skip
    for model in options.models:
        programs = [network(model, family) for family in FAMILIES]
        for row in options.rows:
            adder, twin = (measure(program, row) for program in programs)
            if row in TARGETS:
                print(f"{model}, {row}: instructions of one image\n")
                print_table(layer_table(adder, twin))
            for family, one in zip(FAMILIES, (adder, twin), strict=True):
                ratio = f"{twin.instructions / adder.instructions:.2f}" if one is adder else ""
                totals.append([*summary(model, row, family, one), ratio])
            jax.clear_caches()
    print_table(totals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
