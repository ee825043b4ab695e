"""Integer programs for hardware: files for Verilog's ``$readmemh`` beside a header in JSON."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike, NDArray

from jadder.integer.files import golden_values
from jadder.integer.header import encode, refer
from jadder.integer.program import IntegerProgram


def export_hex(
    program: IntegerProgram,
    folder: str | os.PathLike[str],
    images: ArrayLike | None = None,
) -> None:
    r"""Writes a program as a header, program.json, and a .hex file for each array.

    A .hex file has one word a line, in row-major order and two's complement: 2 digits of uint8 and
    int8, 8 of int32, 16 of int64. FORMAT.md, next to this module, has the fields of the header. The
    same program and images give the same bytes, and the folder is there as a whole or not at all.

    Args:
      program: what to write.
      folder: where to; it is made if there is none, and may be there if it is empty.
      images: uint8 (count, *program.input.shape) on the input's grid, as ``program.to_integers``
        gives them, to be written with every value that the program gives for them: golden vectors
        of each operation.

    Raises:
      FileExistsError: a folder that is not empty, or no folder.
      ValueError, TypeError: images that are none of the program's.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from jadder.integer import Activation, Requantization, Rescale
      >>> grid, output = Activation((2, 2, 1), (0.5,)), Activation((2, 2, 1), (0.5,), dtype="int32")
      >>> sums = Requantization(np.array([3], np.int32), np.array([0]), 0, -999, 999)
      >>> program = IntegerProgram(grid, (Rescale(0, sums, output),))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     export_hex(program, folder)
      ...     sorted(os.listdir(folder)), Path(folder, "operation_0_multiplier.hex").read_text()
      (['operation_0_bias.hex', 'operation_0_multiplier.hex', 'program.json'], '00000003\n')
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: an empty folder expected, or none")
    values = golden_values(program, images)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.absolute().with_name(f".{target.absolute().name}.{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        _write(program, values, scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write(program: IntegerProgram, golden: list[NDArray[Any]], folder: Path) -> None:
    def keep(name: str, array: NDArray[Any]) -> dict[str, Any]:
        file = f"{name}.hex"
        (folder / file).write_text(_hexadecimal(array))
        described = refer(name, array) | {"file": file, "digits": 2 * array.itemsize}
        few = array.ndim == 1
        return described | ({"values": array.tolist()} if few else {})

    header = encode(program, golden, keep)
    (folder / "program.json").write_text(json.dumps(header, indent=1, allow_nan=False) + "\n")


def _hexadecimal(array: NDArray[Any]) -> str:
    """One word a line, the most significant digit first."""
    digits = 2 * array.itemsize
    text = array.astype(array.dtype.newbyteorder(">")).tobytes().hex()
    return "".join(f"{text[at : at + digits]}\n" for at in range(0, len(text), digits))
