"""An integer program as plain values, which JSON can hold, and back: FORMAT.md field by field.

Dataclasses become objects with the same names, tuples lists, and an array a reference to where it
is kept. Reading checks the form of everything and says where it found what; whether the values make
a program, `IntegerProgram` checks itself.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import numpy as np
from numpy.typing import NDArray

from jadder.files import expect, expect_fields, short
from jadder.integer.program import Activation, IntegerProgram, Operation

FORMAT = "jadder integer program"
VERSION = 1

_KINDS: Mapping[str, type[Any]] = {each.__name__: each for each in get_args(Operation)}
_DTYPES = ("uint8", "int8", "int32", "int64")
_FIELDS = ("format", "version", "float_input", "input", "operations", "golden")
_LARGEST_INTEGER = 1 << 63

_Decoded = TypeVar("_Decoded")


class ArrayReference(NamedTuple):
    """An array that a header names.

    Attributes:
      name: of the array; no two arrays of a file share it.
      dtype: 'uint8', 'int8', 'int32' or 'int64'.
      shape: its sizes, the last one moving fastest.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


Keep = Callable[[str, NDArray[Any]], dict[str, Any]]
"""Puts an array somewhere and returns the object that stands for it in the header."""

Fetch = Callable[[ArrayReference], NDArray[Any]]
"""The array of a reference."""


def refer(name: str, array: NDArray[Any]) -> dict[str, Any]:
    """The object that stands for an array in a header."""
    return {"array": name, "dtype": array.dtype.name, "shape": list(array.shape)}


def encode(program: IntegerProgram, golden: list[NDArray[Any]], keep: Keep) -> dict[str, Any]:
    """The header of a program.

    Args:
      program: what to write.
      golden: every value of some images, or nothing.
      keep: is called with each array.
    """
    operations = [
        {"kind": type(operation).__name__, **_encode(operation, f"operation_{index}", keep)}
        for index, operation in enumerate(program.operations)
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "float_input": bool(program.float_input),
        "input": _encode(program.input, "input", keep),
        "operations": operations,
        "golden": [keep(f"value_{index}", array) for index, array in enumerate(golden)],
    }


def _encode(value: Any, name: str, keep: Keep) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {each.name: _encode(getattr(value, each.name), _below(name, each.name), keep)
                for each in fields}  # fmt: skip
    if isinstance(value, np.ndarray):
        return keep(name, value)
    if isinstance(value, np.generic):
        return value.item()
    return [_encode(each, name, keep) for each in value] if isinstance(value, tuple) else value


def _below(name: str, field: str) -> str:
    """Of an array: the multiplier of a requantization is its operation's."""
    return name if field == "requantization" else f"{name}_{field}"


def decode(header: Any, fetch: Fetch) -> tuple[IntegerProgram, tuple[ArrayReference, ...]]:
    """The program of a header, and the references to its golden vectors.

    Raises:
      ValueError: what is not as FORMAT.md says: where it is, what is there and what was expected.
      TypeError: arrays that do not belong where they are.
    """
    expect_fields(header, _FIELDS[:2], "the header", others=True)
    if header["format"] != FORMAT:
        raise ValueError(f"format {FORMAT!r} expected, got {short(header['format'])}")
    if header["version"] != VERSION or isinstance(header["version"], bool):
        raise ValueError(f"version {VERSION} expected, got {short(header['version'])}")
    expect_fields(header, _FIELDS, "the header")
    program = IntegerProgram(
        _decode(Activation, header["input"], "input", fetch),
        _decode(tuple[Operation, ...], header["operations"], "operations", fetch),
        _decode(bool, header["float_input"], "float_input", fetch),
    )
    golden = tuple(
        _reference(each, f"golden[{index}]")
        for index, each in enumerate(_list(header["golden"], "golden"))
    )
    _check_golden(program, golden)
    return program, golden


def _check_golden(program: IntegerProgram, golden: tuple[ArrayReference, ...]) -> None:
    if not golden:
        return
    count = golden[0].shape[0] if golden[0].shape else 0
    expected = [(each.dtype, (count, *each.shape)) for each in program.values]
    found = [(each.dtype, each.shape) for each in golden]
    if count < 1 or found != expected:
        raise ValueError(
            "golden: an array of every value expected, of one or more images each, got "
            + short(found)
        )


def _decode(hint: Any, value: Any, where: str, fetch: Fetch) -> Any:
    """A value of the type ``hint``, which is one that the fields of a program have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return expect(value, isinstance(value, bool), "true or false", where)
    if hint is int:
        return _integer(value, where)
    if hint is float:
        return _number(value, where)
    if origin is Literal:
        fits = isinstance(value, str) and value in arguments
        return expect(value, fits, " or ".join(map(repr, arguments)), where)
    if origin is tuple:
        return _tuple(arguments, value, where, fetch)
    if origin is np.ndarray:
        return fetch(_reference(value, where))
    if origin is types.UnionType:
        return _operation(value, where, fetch)
    return _dataclass(hint, value, where, fetch)


def _tuple(arguments: tuple[Any, ...], value: Any, where: str, fetch: Fetch) -> tuple[Any, ...]:
    values = _list(value, where)
    hints = arguments[:1] * len(values) if arguments[-1] is Ellipsis else arguments
    expect(value, len(values) == len(hints), f"a list of {len(hints)}", where)
    each = zip(hints, values, strict=True)
    return tuple(_decode(h, v, f"{where}[{i}]", fetch) for i, (h, v) in enumerate(each))


def _operation(value: Any, where: str, fetch: Fetch) -> Any:
    expect_fields(value, ("kind",), where, others=True)
    kind = value["kind"]
    known = isinstance(kind, str) and kind in _KINDS
    expect(kind, known, "one of " + ", ".join(_KINDS), f"{where}.kind")
    rest = {name: each for name, each in value.items() if name != "kind"}
    return _dataclass(_KINDS[kind], rest, where, fetch)


def _dataclass(cls: Callable[..., _Decoded], value: Any, where: str, fetch: Fetch) -> _Decoded:
    hints = _hints(cls)
    expect_fields(value, tuple(hints), where)
    decoded = {n: _decode(hint, value[n], f"{where}.{n}", fetch) for n, hint in hints.items()}
    return cls(**decoded)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _reference(value: Any, where: str) -> ArrayReference:
    expect_fields(value, ("array", "dtype", "shape"), where)
    name, dtype = value["array"], value["dtype"]
    expect(name, isinstance(name, str), "the name of an array", f"{where}.array")
    fits = isinstance(dtype, str) and dtype in _DTYPES
    expect(dtype, fits, " or ".join(_DTYPES), f"{where}.dtype")
    sizes = _list(value["shape"], f"{where}.shape")
    shape = tuple(_integer(size, f"{where}.shape") for size in sizes)
    expect(shape, 1 <= len(shape) <= 4 and min(shape) > 0, "one to four sizes", f"{where}.shape")
    return ArrayReference(name, dtype, shape)


def _list(value: Any, where: str) -> list[Any]:
    return expect(value, isinstance(value, list), "a list", where)


def _integer(value: Any, where: str) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool)
    fits = fits and -_LARGEST_INTEGER <= value < _LARGEST_INTEGER
    return expect(value, fits, "an integer of 64 bits", where)


def _number(value: Any, where: str) -> float:
    if isinstance(value, float):
        return value
    return float(_integer(value, where))
