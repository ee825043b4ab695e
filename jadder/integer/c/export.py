"""A program as a folder of C."""

import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jadder.integer import xla
from jadder.integer.c.emit import emit
from jadder.integer.c.files import check_images, make_files
from jadder.integer.c.targets import TARGETS
from jadder.integer.program import IntegerProgram

_RANDOM_IMAGES = 3
_KEYWORDS = frozenset(
    [
        "auto",
        "break",
        "case",
        "char",
        "const",
        "continue",
        "default",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "main",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "typedef",
        "union",
        "unsigned",
        "void",
        "volatile",
        "while",
    ]
)


def export_c(
    program: IntegerProgram,
    folder: str | os.PathLike[str],
    *,
    target: str = "c99",
    name: str = "model",
    images: ArrayLike | None = None,
) -> None:
    """Writes a network of integers as C99 that compiles by itself.

    The folder gets ``NAME.h`` (the interface: sizes, grids and one function), ``NAME.c`` and its
    headers of weights and kernels, assembly for Cortex-M, ``main.c`` with images and their outputs,
    a Makefile and a README with sizes. Its results are the program's to the last bit. The same
    program gives the same files.

    Args:
      program: the network.
      folder: where to write; it must be empty or not be there.
      target: 'c99' (any processor), 'cortex-m4', 'cortex-m7' (Thumb-2 assembly with the DSP
        instructions), 'aarch64' (NEON) or 'x86' (SSE2 or AVX2). Every target computes every
        operation; the README says which of them are portable C there.
      name: what names and files begin with, so that several networks can be linked: lower-case
        letters, digits and underscores.
      images: uint8 (batch, height, width, channels), images to check the C with; None for random
        ones.

    Raises:
      TypeError: ``program`` is no ``IntegerProgram``, or ``images`` are not uint8.
      ValueError: an unknown target, a name that C cannot have, or images of another shape.
      FileExistsError: the folder has files, or is a file.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from jadder.integer import Activation, Convolution, IntegerProgram, Requantization
      >>> logits = Convolution(
      ...     0, "adder", np.zeros((1, 1, 4, 2), np.uint8),
      ...     Requantization(np.full(2, -1, np.int32), np.zeros(2, np.int64), 0, -(2**31), 0),
      ...     Activation((1, 1, 2), (0.5,), dtype="int32"),
      ... )
      >>> program = IntegerProgram(Activation((1, 1, 4), (0.5,)), (logits,))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export_c(program, folder)
      ...     print(*sorted(os.listdir(folder))[:3])
      Makefile README.md main.c
    """
    if not isinstance(program, IntegerProgram):
        raise TypeError(f"an IntegerProgram expected, got {type(program).__name__}")
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; the targets are {', '.join(TARGETS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _KEYWORDS:
        raise ValueError(
            f"name must be a lower-case C name of letters, digits and underscores, got {name!r}"
        )
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be an empty folder or a new one")
    if images is None:
        random = np.random.default_rng(0)
        shape = (_RANDOM_IMAGES, *program.input.shape)
        images = random.integers(0, program.input.maximum + 1, shape, np.uint8)
    images = check_images(program, images)
    outputs = np.asarray(xla.run(program, jnp.asarray(images)))
    code = emit(program, TARGETS[target], name)
    files = make_files(program, TARGETS[target], name, code, images, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(content, encoding="utf-8", newline="\n")
