"""The text of each file of an exported network."""

import importlib.resources
from collections.abc import Mapping
from typing import Any

import numpy as np

from jadder.integer.c import text
from jadder.integer.c.emit import Code, describe
from jadder.integer.c.targets import Target
from jadder.integer.program import Activation, IntegerProgram

_WARNINGS = "-Wall -Wextra -Wconversion -pedantic -Werror"


def make_files(
    program: IntegerProgram, target: Target, name: str, code: Code, images: Any, outputs: Any
) -> Mapping[str, str]:
    """The files' texts by their names."""
    files = {
        f"{name}.h": header(program, name, code),
        f"{name}.c": model(name, code),
        f"{name}_kernels.h": kernels(code),
        f"{name}_weights.h": f"{_banner('Weights, multipliers and sizes.')}\n{code.tables}",
        f"{name}_vectors.h": vectors(images, outputs),
        "main.c": main(name),
        "Makefile": makefile(target, name, code),
        "README.md": readme(program, target, name, code, len(images)),
    }
    if code.assembly:
        files[f"{name}_rows.s"] = (
            f"@ Rows of results, one function for each shape of layer. Made by jadder.\n"
            f"    .syntax unified\n    .thumb\n    .text\n\n{code.assembly}\n"
            '    .section .note.GNU-stack,"",%progbits\n'
        )
    return files


def _banner(what: str) -> str:
    return f"/* {what} Made by jadder's export_c. */\n"


def _source(name: str) -> str:
    files = importlib.resources.files("jadder.integer.c") / "sources"
    return (files / name).read_text(encoding="utf-8")


def kernels(code: Code) -> str:
    """The portable kernels that the network needs, and those with intrinsics."""
    parts = [_source(name) for name in code.sources if name != "types.h"]
    return "\n".join([_banner("What the operations have in common."), _source("types.h"), *parts])


def header(program: IntegerProgram, name: str, code: Code) -> str:
    """The interface."""
    upper = name.upper()
    source, result = program.input, program.output
    lines = [
        _banner("A network of integers: C99, no heap, no floating point."),
        f"#ifndef {upper}_H",
        f"#define {upper}_H",
        "",
        "#include <stdint.h>",
        "",
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        *_grid("The image", "input", upper, source),
        *_grid("The result", "output", upper, result),
        "/* Memory for activations, in words of 32 bits. It needs no initial value and keeps none:",
        "   several calls may share it if they do not overlap. */",
        f"#define {upper}_ARENA_BYTES {code.plan.size}",
        f"#define {upper}_ARENA_WORDS {_words(code)}",
        "",
        "/* Computes the output of one image.",
        "",
        f"   image   {source.size} bytes, row after row, the channels of a pixel together",
        f"   output  {result.size} integers in the same order",
        f"   arena   {upper}_ARENA_WORDS words, which are overwritten",
        "",
        "   Nothing else is written or kept, so that calls with arenas of their own may run at the",
        "   same time. */",
        f"void {name}_run(const uint8_t *image, int32_t *output, uint32_t *arena);",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def _words(code: Code) -> int:
    return -(-code.plan.size // 4)


def _grid(title: str, what: str, upper: str, each: Activation) -> list[str]:
    prefix = f"{upper}_{what.upper()}"
    height, width, channels = each.shape
    many = len(each.scale) > 1 or len(each.zero_point) > 1
    where = "c" if many else ""
    scale = f"scale[{where}]" if len(each.scale) > 1 else "scale"
    zero = f"zero point[{where}]" if len(each.zero_point) > 1 else "zero point"
    top = f", q from 0 to {each.maximum}" if each.dtype == "uint8" else ""
    formula = f"q stands for {scale} * (q - {zero}){' in channel c' if many else ''}{top}"
    return [
        f"/* {title}, {each.dtype}: {formula}. */",
        f"#define {prefix}_HEIGHT {height}",
        f"#define {prefix}_WIDTH {width}",
        f"#define {prefix}_CHANNELS {channels}",
        f"#define {prefix}_SIZE {each.size}",
        f"#define {prefix}_SCALE {_numbers(each.scale)}",
        f"#define {prefix}_ZERO_POINT {_numbers(each.zero_point)}",
        "",
    ]


def _numbers(values: Any) -> str:
    literals = [repr(float(v)) if isinstance(v, float) else str(int(v)) for v in values]
    return literals[0] if len(literals) == 1 else f"{{{', '.join(literals)}}}"


def model(name: str, code: Code) -> str:
    """The network itself."""
    upper = name.upper()
    return f"""{_banner("A network of integers.")}
#include "{name}.h"
#include "{name}_kernels.h"
#include "{name}_weights.h"

/* Called after each operation, with its number: for measurements. */
#ifndef {upper}_AFTER
#define {upper}_AFTER(operation) ((void)0)
#endif

void {name}_run(const uint8_t *image, int32_t *output, uint32_t *arena) {{
  uint8_t *const bytes = (uint8_t *)arena;
{code.statements}
}}
"""


def vectors(images: Any, outputs: Any) -> str:
    """Images and what the network gives for them."""
    return "\n".join(
        [
            _banner("Images and the outputs that belong to them."),
            f"enum {{ vectors = {len(images)} }};\n",
            text.array("uint8_t", "vector_images", images),
            text.array("int32_t", "vector_outputs", outputs),
        ]
    )


def main(name: str) -> str:
    """A program that checks the vectors."""
    upper = name.upper()
    return f"""{_banner("Computes the vectors and compares.")}
#include <stdint.h>
#include <stdio.h>

#include "{name}.h"
#include "{name}_vectors.h"

static uint32_t arena[{upper}_ARENA_WORDS];

int main(void) {{
  int32_t output[{upper}_OUTPUT_SIZE];
  int wrong = 0;
  for (int v = 0; v < vectors; ++v) {{
    {name}_run(vector_images + v * {upper}_INPUT_SIZE, output, arena);
    for (int i = 0; i < {upper}_OUTPUT_SIZE; ++i) {{
      if (output[i] != vector_outputs[v * {upper}_OUTPUT_SIZE + i]) ++wrong;
    }}
  }}
  printf("{name}: %d vectors, %d of %d outputs differ\\n", (int)vectors, wrong,
         (int)vectors * {upper}_OUTPUT_SIZE);
  return wrong != 0;
}}
"""


def makefile(target: Target, name: str, code: Code) -> str:
    """Builds and checks."""
    bare = target.kernels == "thumb"
    objects = f"{name}.o" + (f" {name}_rows.o" if code.assembly else "")
    assembled = ""
    if code.assembly:
        assembled = f"\n{name}_rows.o: {name}_rows.s\n\t$(CC) $(ARCH) -c -o $@ $<\n"
    compiler = "CC = arm-none-eabi-gcc\n" if bare else ""
    how = (
        "# make check needs a compiler that links programs for a system, and what runs them:\n"
        "#   make check CC=arm-linux-gnueabihf-gcc ARCH='-march=armv7-a -mthumb -static'"
        " RUN=qemu-arm\n"
        if bare
        else "# make check ARCH=... for other processors or options.\n"
    )
    return f"""# {name}: {target.about}. Made by jadder's export_c.
{how}{compiler}ARCH = {target.flags}
CFLAGS = {"-Os" if bare else "-O2"} -std=c99 {_WARNINGS}
SIZE = size
RUN =

objects = {objects}

all: $(objects)

{name}.o: {name}.c {name}.h {name}_kernels.h {name}_weights.h
\t$(CC) $(CFLAGS) $(ARCH) -c -o $@ $<
{assembled}
main.o: main.c {name}.h {name}_vectors.h
\t$(CC) $(CFLAGS) $(ARCH) -c -o $@ $<

check_{name}: main.o $(objects)
\t$(CC) $(ARCH) -o $@ main.o $(objects)

check: check_{name}
\t$(RUN) ./check_{name}

size: $(objects)
\t$(SIZE) $(objects)

clean:
\trm -f main.o $(objects) check_{name}

.PHONY: all check size clean
"""


def readme(program: IntegerProgram, target: Target, name: str, code: Code, count: int) -> str:
    """What the folder is, how it is used, and its sizes."""
    source, result = program.input, program.output
    upper = name.upper()
    sizes = _sizes(target, upper, code)
    lines = [
        f"# {name}",
        "",
        f"A network of integers in C99, written by jadder's `export_c` for the target "
        f"`{target.name}`: {target.about}.",
        "",
        "```c",
        f'#include "{name}.h"',
        "",
        f"static uint32_t arena[{upper}_ARENA_WORDS];",
        f"int32_t output[{upper}_OUTPUT_SIZE];",
        f"{name}_run(image, output, arena);   /* image: {source.size} bytes */",
        "```",
        "",
        f"It takes {_shape(source)} of `uint8_t` and gives {_shape(result)} of `int32_t`; "
        f"`{name}.h` says what the integers stand for. It needs no heap and no floating point, and "
        "of a C library only `memcpy` and `memset`. It is reentrant: all that it writes is the "
        f"output and the arena. Every name that is seen from outside begins with `{name}_`.",
        "",
        f"`make check` computes {count} images and compares with what the network gave where it "
        f"was made, bit for bit. `-D{upper}_AFTER(i)=...` puts a statement after each "
        "operation, to measure them one by one.",
        "",
        "## Sizes",
        "",
        "| what | size | where |",
        "| --- | --- | --- |",
        *(f"| {a} | {b} | {c} |" for a, b, c in sizes),
        "",
        "## Operations",
        "",
        "| | operation | computed by |",
        "| --- | --- | --- |",
    ]
    for index, operation in enumerate(program.operations):
        choice = code.choices[index]
        by = {"portable": "C", "vector": "C with intrinsics", "thumb": "assembly"}[choice.way]
        if choice.way == "thumb" and not choice.whole:
            by = f"assembly, and C for its results ({choice.why})"
        elif choice.why:
            by += f" ({choice.why})"
        lines.append(f"| {index} | {describe(operation)} | {by} |")
    return "\n".join(lines) + "\n"


def _sizes(target: Target, upper: str, code: Code) -> list[tuple[str, str, str]]:
    """What takes how much of which memory."""
    constants = ("weights, multipliers and other constants", f"{code.table_size:,} bytes", "flash")
    arena = (f"activations (`{upper}_ARENA_BYTES`)", f"{code.plan.size:,} bytes", "RAM")
    if target.kernels != "thumb":
        return [constants, ("code", "as `make size` says", "flash"), arena]
    rest = code.code_size - code.assembly_size
    flash = code.table_size + code.code_size
    return [
        constants,
        ("assembly", f"{code.assembly_size:,} bytes", "flash"),
        ("C", f"about {rest:,} bytes by Clang with -Os", "flash"),
        ("code and constants together", f"about {flash / 1024:.1f} KiB", "flash"),
        arena,
    ]


def _shape(each: Activation) -> str:
    return " × ".join(map(str, each.shape))


def check_images(program: IntegerProgram, images: Any) -> Any:
    """Images as uint8 (batch, height, width, channels) on the program's grid.

    Raises:
      TypeError: another dtype.
      ValueError: another shape, or values beyond the grid.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1:] != program.input.shape or not len(images):
        wanted = ", ".join(map(str, program.input.shape))
        raise ValueError(f"images must be (batch, {wanted}), got {images.shape}")
    if images.max() > program.input.maximum:
        raise ValueError(f"images up to {program.input.maximum} expected, got {images.max()}")
    return images
