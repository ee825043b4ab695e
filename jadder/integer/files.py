"""Integer programs as files: a zip archive of arrays (.npz) with a header in JSON.

FORMAT.md describes the file, for readers without jadder and without NumPy. The same program gives
the same bytes. A reader trusts nothing in a file: each size is known, and limited, before memory is
taken for it, nothing is unpickled or evaluated, and `IntegerProgram` checks what comes out.
"""

import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jadder.files import PathLike, open_regular, parse_json, write_bytes
from jadder.integer import xla
from jadder.integer.header import ArrayReference, decode, encode, refer
from jadder.integer.program import IntegerProgram

_HEADER = "program.json"
_OLDEST_DATE = (1980, 1, 1, 0, 0, 0)
_READABLE = 0o644 << 16

_LARGEST_FILE = 1 << 28
_LARGEST_CONTENT = 1 << 28
_LARGEST_HEADER = 1 << 22
_LARGEST_DIRECTORY = 1 << 23

_DIRECTORY_END = struct.Struct("<4sHHHHLLH")
_LARGE_DIRECTORY_END = b"PK\x06\x07"
_ENCRYPTED = 0x1
_ARRAY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)"
    rb"\{'descr': '([^']{1,9})', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,99})\), \}"
    rb" *\n",
    re.DOTALL,
)
_LONGEST_ARRAY_HEADER = 256

_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, IndexError, KeyError,
    NotImplementedError, OSError, OverflowError, RecursionError, TypeError, ValueError,
)  # fmt: skip


def save(program: IntegerProgram, path: PathLike, *, golden: ArrayLike | None = None) -> None:
    """Writes a program to a file, whose name is kept as it is.

    The file is replaced at once: it is there as a whole or not at all.

    Args:
      program: what to write.
      path: of the file.
      golden: images uint8 (count, *program.input.shape) on the input's grid, to be kept with every
        value that the program gives for them.

    Raises:
      ValueError: images that are none of the program's, or more than a file can hold.
      TypeError: images that are not uint8.
    """
    arrays: dict[str, NDArray[Any]] = {}

    def keep(name: str, array: NDArray[Any]) -> dict[str, Any]:
        arrays[name] = array
        return refer(name, array)

    header = encode(program, golden_values(program, golden), keep)
    text = (json.dumps(header, indent=1, allow_nan=False) + "\n").encode()
    size = sum(each.nbytes + _LONGEST_ARRAY_HEADER for each in arrays.values())
    if size + len(text) > _LARGEST_CONTENT or len(text) > _LARGEST_HEADER:
        raise ValueError(
            f"{path}: a file holds at most {_LARGEST_CONTENT} bytes of arrays and "
            f"{_LARGEST_HEADER} bytes of header, got {size} and {len(text)}"
        )
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        _write_member(archive, _HEADER, text)
        for name, array in arrays.items():
            _write_member(archive, f"{name}.npy", _array_bytes(array))
    write_bytes(Path(path), content.getvalue())


def load(path: PathLike) -> IntegerProgram:
    """The program of a file that `save` wrote.

    Raises:
      FileNotFoundError: no file.
      ValueError: a file that holds no program, what was found in it and what was expected.
    """
    with _opened(path) as archive:
        return archive.program


def load_golden(path: PathLike) -> tuple[NDArray[Any], ...]:
    """The golden vectors of a file: every value (count, *shape), from the images to the output.

    Returns:
      uint8 arrays and an int32 one, or nothing, of a file without golden vectors.

    Raises:
      FileNotFoundError: no file.
      ValueError: as in `load`.
    """
    with _opened(path) as archive:
        return tuple(archive.fetch(each) for each in archive.golden)


def golden_values(program: IntegerProgram, images: ArrayLike | None) -> list[NDArray[Any]]:
    """Every value of ``images``, the images themselves first; nothing of no images.

    Raises:
      ValueError: images of another shape, or off the input's grid.
      TypeError: images that are not uint8.
    """
    if images is None:
        return []
    given = np.asarray(images)
    if given.dtype != np.uint8:
        raise TypeError(f"golden images must be uint8 on the input's grid, got {given.dtype}")
    if given.ndim != 4 or given.shape[1:] != program.input.shape or not len(given):
        raise ValueError(
            f"golden images must have the shape (count, {', '.join(map(str, program.input.shape))})"
            f", got {given.shape}"
        )
    if given.max() > program.input.maximum:
        raise ValueError(f"golden images are at most {program.input.maximum}, got {given.max()}")
    return [np.asarray(value) for value in xla.every_value(program, given)]  # type: ignore[arg-type]


# -- Writing ---------------------------------------------------------------------------------------


def _write_member(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, _OLDEST_DATE)
    info.create_system, info.external_attr = 3, _READABLE
    archive.writestr(info, content, zipfile.ZIP_DEFLATED, compresslevel=9)


def _array_bytes(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    np.lib.format.write_array(content, little, version=(1, 0), allow_pickle=False)
    return content.getvalue()


# -- Reading ---------------------------------------------------------------------------------------


class _Archive:
    """The program of an open file, and its members, of which each belongs to it."""

    def __init__(self, file: BinaryIO) -> None:
        _check_directory(file)
        self._archive = zipfile.ZipFile(file)
        members = self._archive.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise ValueError("two members have the same name")
        if (size := sum(member.file_size for member in members)) > _LARGEST_CONTENT:
            raise ValueError(f"at most {_LARGEST_CONTENT} bytes of content expected, got {size}")
        self._used = {_HEADER}
        header = parse_json(self._read(_HEADER, _LARGEST_HEADER), _HEADER)
        self.program, self.golden = decode(header, self._claim_and_fetch)
        for each in self.golden:
            self._claim(each)
        if extra := sorted(self._members.keys() - self._used):
            raise ValueError(f"no more than the arrays of the header expected, got {extra[0]!r}")

    def fetch(self, reference: ArrayReference) -> NDArray[Any]:
        """An array, of as many bytes as its member says to have, and no more."""
        member, wanted = f"{reference.name}.npy", _bytes_of(reference)
        content = self._read(member, wanted + _LONGEST_ARRAY_HEADER)
        start = _check_array_header(content[:_LONGEST_ARRAY_HEADER], reference)
        if len(content) - start != wanted:
            raise ValueError(f"{member}: {wanted} bytes expected, got {len(content) - start}")
        dtype = np.dtype(reference.dtype)
        flat = np.frombuffer(content, dtype.newbyteorder("<"), offset=start)
        return flat.reshape(reference.shape).astype(dtype)

    def _claim_and_fetch(self, reference: ArrayReference) -> NDArray[Any]:
        self._claim(reference)
        return self.fetch(reference)

    def _claim(self, reference: ArrayReference) -> None:
        """Takes a member for one field, if it has the size of the field's array."""
        member, wanted = f"{reference.name}.npy", _bytes_of(reference)
        if member not in self._members:
            raise ValueError(f"the array {reference.name!r:.80} expected, which is missing")
        if member in self._used:
            raise ValueError(f"{member}: an array of its own expected for each field")
        size = self._members[member].file_size
        if not wanted < size <= wanted + _LONGEST_ARRAY_HEADER:
            raise ValueError(f"{member}: {wanted} bytes and a header expected, got {size}")
        self._used.add(member)

    def _read(self, name: str, most: int) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise ValueError(f"a member {name!r} expected, got {sorted(self._members)[:4]}")
        plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not plain or member.flag_bits & _ENCRYPTED:
            raise ValueError(f"{name}: stored or deflated expected, and not encrypted")
        if member.file_size > most:
            raise ValueError(f"{name}: at most {most} bytes expected, got {member.file_size}")
        with self._archive.open(member) as opened:
            content = opened.read(most)
        if len(content) != member.file_size:
            raise ValueError(f"{name}: {member.file_size} bytes expected, got {len(content)}")
        return content


@contextmanager
def _opened(path: PathLike) -> Iterator[_Archive]:
    """The archive at ``path``; whatever is wrong with it becomes one kind of error."""
    name = os.fspath(path)
    try:
        file = open_regular(name)
    except ValueError as error:
        raise ValueError(f"{name} holds no integer program: {error}") from None
    with file:
        try:
            yield _Archive(file)
        except _UNREADABLE as error:
            said = str(error) or type(error).__name__
            raise ValueError(f"{name} holds no integer program: {said:.500}") from None


def _check_directory(file: BinaryIO) -> None:
    """Of the archive: without it, reading one would take memory before anything is known."""
    size = file.seek(0, os.SEEK_END)
    if size > _LARGEST_FILE:
        raise ValueError(f"a file of at most {_LARGEST_FILE} bytes expected, got {size}")
    file.seek(max(0, size - _DIRECTORY_END.size - 20))
    tail = file.read()
    end = tail[-_DIRECTORY_END.size :]
    if len(end) < _DIRECTORY_END.size or end[:4] != b"PK\x05\x06":
        raise ValueError(
            f"a zip archive that ends with its directory, and without a comment, "
            f"expected, got {size} bytes"
        )
    *_, directory, _, comment = _DIRECTORY_END.unpack(end)
    if comment or tail[: -_DIRECTORY_END.size].startswith(_LARGE_DIRECTORY_END):
        raise ValueError("a zip archive without a comment and without zip64 records expected")
    if directory > _LARGEST_DIRECTORY:
        raise ValueError(f"a directory of at most {_LARGEST_DIRECTORY} bytes: got {directory}")


def _bytes_of(reference: ArrayReference) -> int:
    return math.prod(reference.shape) * np.dtype(reference.dtype).itemsize


def _check_array_header(content: bytes, reference: ArrayReference) -> int:
    """Where an array's values start."""
    found = _ARRAY_HEADER.match(content)
    if found is None:
        raise ValueError(f"{reference.name}: an array in NumPy's format 1.0 expected")
    length, descr, fortran, sizes = found.groups()
    dtype = np.dtype(reference.dtype).newbyteorder("<").str.encode()
    shape = ", ".join(map(str, reference.shape)) + "," * (len(reference.shape) == 1)
    if found.end() != 10 + int.from_bytes(length, "little"):
        raise ValueError(f"{reference.name}: the length of its header is not as it says")
    if (descr, fortran, sizes) != (dtype, b"False", shape.encode()):
        raise ValueError(
            f"{reference.name}: {dtype.decode()} ({shape}) in row-major order expected, got "
            f"{descr.decode('latin1')} ({sizes.decode()}), fortran_order {fortran.decode()}"
        )
    return found.end()
