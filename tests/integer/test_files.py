"""Programs come back from files as they were, and what is no such file is refused."""

import dataclasses
import functools
import io
import json
import os
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jadder.integer import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Requantization,
    Rescale,
    Reshape,
    Residual,
)
from jadder.integer.files import load_golden
from tests.integer import oracle
from tests.integer.programs import images, programs
from tests.integer.resnet20 import resnet20


def assert_same(ours: Any, expected: Any) -> None:
    """Of dataclasses, field by field: types and bits."""
    assert type(ours) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        assert ours.tobytes() == expected.tobytes()
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(ours, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert struct.pack("<d", ours) == struct.pack("<d", expected)
    else:
        assert ours == expected


@settings(max_examples=50)
@given(program=programs(), float_input=st.booleans())
def test_a_program_comes_back_as_it_was(program: IntegerProgram, float_input: bool) -> None:
    program = dataclasses.replace(program, float_input=float_input)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.npz")
        program.save(path)
        content = path.read_bytes()
        loaded = IntegerProgram.load(path)
        assert_same(loaded, program)
        assert load_golden(path) == ()
        loaded.save(path)
        assert path.read_bytes() == content
        assert os.listdir(folder) == ["program.npz"]


@settings(max_examples=2)
@given(program=programs(), seed=st.integers(0, 2**32))
def test_golden_vectors_are_every_value(program: IntegerProgram, seed: int) -> None:
    golden = images(program, 2, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.npz")
        program.save(path, golden=golden)
        assert_same(IntegerProgram.load(path), program)
        vectors = load_golden(path)
    assert [each.dtype.name for each in vectors] == [value.dtype for value in program.values]
    for ours, expected in zip(vectors, oracle.every_value(program, golden), strict=True):
        np.testing.assert_array_equal(ours, expected)


@given(scale=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_scales_keep_their_bits(scale: float) -> None:
    program = tiny(scale=scale)
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder, "a"))
        assert_same(IntegerProgram.load(Path(folder, "a")), program)


def test_resnet20_is_under_300_kib(tmp_path: Path) -> None:
    program = resnet20()
    program.save(tmp_path / "resnet20.npz")
    assert sum(each.kernel.size for each in program.operations if hasattr(each, "kernel")) > 270_000
    assert (tmp_path / "resnet20.npz").stat().st_size < 300 * 1024


def test_numpy_and_json_read_the_file(tmp_path: Path) -> None:
    program = tiny()
    program.save(str(tmp_path / "tiny.npz"), golden=np.full((2, 2, 2, 1), 7, np.uint8))
    with np.load(tmp_path / "tiny.npz", allow_pickle=False) as file:
        header = json.loads(file["program.json"])
        (operation,) = header["operations"]
        assert operation["kind"] == "Rescale"
        assert operation["requantization"]["shift"] == 1
        np.testing.assert_array_equal(file["operation_0_multiplier"], [3])
        np.testing.assert_array_equal(file["value_1"], np.full((2, 2, 2, 1), 10))


def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.npz"
    tiny().save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        tiny(multiplier=4).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tiny.npz"]


@pytest.mark.parametrize(
    ("golden", "error", "says"),
    [
        (np.zeros((1, 2, 2, 1)), TypeError, "uint8"),
        (np.zeros((2, 2, 1), np.uint8), ValueError, r"\(count, 2, 2, 1\)"),
        (np.zeros((0, 2, 2, 1), np.uint8), ValueError, "shape"),
        (np.full((1, 2, 2, 1), 16, np.uint8), ValueError, "at most 15, got 16"),
    ],
)
def test_golden_images_are_checked(tmp_path: Path, golden: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        tiny(maximum=15).save(tmp_path / "tiny.npz", golden=golden)
    assert not os.listdir(tmp_path)


# -- Files that hold no program --------------------------------------------------------------------


def tiny(
    scale: float = 0.5, multiplier: int = 3, maximum: int = 255
) -> IntegerProgram:  # fmt: skip
    grid = Activation((2, 2, 1), (scale,), (1,), maximum=maximum)
    each = Requantization(np.array([multiplier], np.int32), np.array([-1]), 1, -99, 99)
    output = Activation((2, 2, 1), (scale,), (0,), "int32")
    return IntegerProgram(grid, (Rescale(0, each, output),))


@settings(max_examples=300)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_damage_is_an_error_or_does_not_matter(data: st.DataObject, seed: int) -> None:
    program, content = saved()
    random = np.random.default_rng(seed)
    damaged = bytearray(content)
    match data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "swap"])):
        case "flip":
            for at in random.integers(0, len(damaged), random.integers(1, 5)):
                damaged[at] ^= 1 << random.integers(8)
        case "cut":
            start, end = sorted(random.integers(0, len(damaged), 2))
            del damaged[start : data.draw(st.sampled_from([end, len(damaged)]))]
        case "insert":
            at = random.integers(0, len(damaged))
            damaged[at:at] = random.bytes(random.integers(1, 100))
        case "overwrite":
            at = random.integers(0, len(damaged))
            damaged[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"PK\1\2"]))
        case _:
            one, other = random.integers(0, len(damaged) - 64, 2)
            damaged[one : one + 64], damaged[other : other + 64] = (
                damaged[other : other + 64],
                damaged[one : one + 64],
            )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.npz")
        path.write_bytes(damaged)
        try:
            loaded = IntegerProgram.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} holds no integer program: ")  # noqa: PT017
        else:
            assert_same(loaded, program)


@functools.cache
def saved() -> tuple[IntegerProgram, bytes]:
    """A small program of several operations, and its file."""
    random = np.random.default_rng(0)
    grid, hidden = Activation((6, 6, 2), (0.1,), (3,)), Activation((4, 4, 3), (0.2,), (9,))
    kernel = random.integers(0, 256, (3, 3, 2, 3), np.uint8)
    each = Requantization(
        np.array([9, -9, 7], np.int32), np.array([5, -5, 0]), 7, 9, 255, (Residual(1, 5, 2),)
    )
    first = dataclasses.replace(each, residuals=())
    pooled = dataclasses.replace(hidden, shape=(2, 2, 3))
    flat = dataclasses.replace(hidden, shape=(1, 1, 12))
    weights = random.integers(-128, 128, (1, 1, 12, 4), np.int8)
    last = Requantization(np.full(4, 3, np.int32), np.arange(4), 2, -(2**31), 2**31 - 1)
    program = IntegerProgram(
        grid,
        (
            Convolution(0, "adder", kernel, first, hidden),
            Rescale(1, each, hidden),
            MaxPool(2, (2, 2), pooled, (2, 2)),
            Reshape(3, flat),
            Convolution(4, "multiply", weights, last, Activation((1, 1, 4), (0.1,), (0,), "int32")),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.npz")
        program.save(path, golden=images(program, 1, 0))
        return program, path.read_bytes()


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, each in content.items():
            archive.writestr(name, each)


def array(value: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, value, allow_pickle=True)
    return content.getvalue()


def claims(header: str) -> bytes:
    """An array that says to be what it is not."""
    text = f"{{'descr': {header}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "program.npz"
    path.write_bytes(saved()[1])
    return path


KERNEL = "operation_0_kernel.npy"


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        (np.zeros((3, 3, 2, 3), np.int8), r"\|u1 \(3, 3, 2, 3\) .* expected, got \|i1"),
        (np.zeros((3, 3, 3, 2), np.uint8), r"expected, got \|u1 \(3, 3, 3, 2\)"),
        (np.zeros((3, 3, 2, 4), np.uint8), r"expected, got \|u1 \(3, 3, 2, 4\)"),
        (np.zeros((33, 3, 2, 3), np.uint8), "54 bytes and a header expected, got 722"),
        (np.asfortranarray(np.zeros((3, 3, 2, 3), np.uint8)), "fortran_order True"),
        (np.array([object()]), r"NumPy's format|expected, got \|O \(1,\)"),
        ("'|u1', 'fortran_order': False, 'shape': (9" + "9" * 14 + ",), }", "got .u1 .9999999"),
        ("'|O', 'fortran_order': False, 'shape': (3, 3, 2, 3), }", r"got \|O \(3, 3, 2, 3\)"),
        ("'|u1', 'fortran_order': False, 'shape': (3, 3, 2, 3), }", "54 bytes expected, got 0"),
        ("(" * 90 + "}", "NumPy's format 1.0 expected"),
    ],
)
def test_arrays_are_checked_before_they_are_read(path: Path, replaced: Any, says: str) -> None:
    value = claims(replaced) if isinstance(replaced, str) else array(replaced)
    write(path, members(path) | {KERNEL: value})
    refuse(path, says)


def refuse(path: Path, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        IntegerProgram.load(path)
    assert str(caught.value).startswith(f"{path} holds no integer program: ")
    assert len(str(caught.value)) < len(str(path)) + 600


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.update(format="other"), "format 'jadder integer program' expected"),
        (lambda h: h.update(version=2), "version 1 expected, got 2"),
        (lambda h: h.update(version=True), "version 1 expected, got True"),
        (lambda h: h.update(more=1), "expected, got .*more"),
        (lambda h: h.pop("input"), "fields .* expected"),
        (lambda h: h.update(float_input=0), "float_input: true or false expected, got 0"),
        (lambda h: h.update(operations=[]), "at least one operation"),
        (lambda h: h.update(operations={}), "operations: a list expected"),
        (lambda h: h["input"].update(scale=[float("nan")]), "a finite number expected, got NaN"),
        (lambda h: h["input"].update(scale=[float("inf")]), "finite number expected, got Infinity"),
        (lambda h: h["input"].update(scale=[10**400]), "64 bits"),
        (lambda h: h["input"].update(scale=[0.0]), "positive scales"),
        (lambda h: h["input"].update(scale="1"), r"input.scale: a list expected, got '1'"),
        (lambda h: h["input"].update(shape=[6, 6]), r"input.shape: a list of 3 expected"),
        (lambda h: h["input"].update(shape=[2**40, 2**40, 2]), "three positive sizes"),
        (lambda h: h["input"].update(zero_point=[256]), "zero points within"),
        (lambda h: h["input"].update(zero_point=[1.0]), r"zero_point\[0\]: an integer .* got 1.0"),
        (lambda h: h["input"].update(dtype="float32"), "input.dtype: 'uint8' or 'int32' expected"),
        (lambda h: h["operations"][0].update(input=1), "reads value 1 of 1"),
        (lambda h: h["operations"][0].update(input=-1), "reads value -1"),
        (lambda h: h["operations"][0].update(kind="Exec"), r"\[0\].kind: one of Convolution, "),
        (lambda h: h["operations"][0].update(kind=[]), r"kind: one of"),
        (lambda h: h["operations"][0].update(kind="MaxPool"), "fields input, window"),
        (lambda h: h["operations"][0].update(strides=[0, 1]), "strides must be"),
        (lambda h: h["operations"][0].update(strides=[1, True]), "an integer of 64 bits expected"),
        (lambda h: h["operations"][0].update(padding=[[0, 0], [0, 10**9]]), "padding must be"),
        (lambda h: h["operations"][0].update(product="multiply"), "a multiply kernel is int8"),
        (lambda h: h["operations"][0].update(feature_group_count=0), "in 0 groups"),
        (lambda h: h["operations"][0].update(center=None), "center: true or false"),
        (lambda h: h["operations"][0]["output"].update(shape=[4, 4, 4]), "its output says"),
        (lambda h: kernel(h).update(array="operation_0_bias", shape=[3], dtype="int64"), "its own"),
        (lambda h: kernel(h).update(shape=[2**40, 2**40]), "bytes and a header expected"),
        (lambda h: kernel(h).update(shape=[3, 3, 2, 0]), "one to four sizes"),
        (lambda h: kernel(h).update(shape=[-3, -3, 2, 3]), "one to four sizes"),
        (lambda h: kernel(h).update(dtype="object"), "dtype: uint8 or"),
        (lambda h: kernel(h).update(array="../../etc/passwd"), "which is missing"),
        (lambda h: kernel(h).update(array="operation_1_bias"), "got <i8 .3,."),
        (lambda h: epilogue(h).update(shift=63), "shift must be from 0 to 62"),
        (lambda h: epilogue(h).update(low=-1), "are not within its grid"),
        (lambda h: epilogue(h).update(residuals=[{}]), r"residuals\[0\]: the fields value"),
        (
            lambda h: epilogue(h).update(
                residuals=[{"value": 9, "multiplier": 1, "left_shift": 0}]
            ),
            "reads value 9",
        ),
        (lambda h: h.update(golden=h["golden"][:2]), "an array of every value expected"),
        (lambda h: h.update(golden=[]), "no more than the arrays of the header"),
    ],
)
def test_headers_are_checked(path: Path, change: Any, says: str) -> None:
    content = members(path)
    header = json.loads(content["program.json"])
    change(header)
    write(path, content | {"program.json": json.dumps(header).encode()})
    refuse(path, says)


def kernel(header: Any) -> Any:
    return header["operations"][0]["kernel"]


def epilogue(header: Any) -> Any:
    return header["operations"][0]["requantization"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[]", "an object expected, got"),
        (b"{}", "format, version expected"),
        (b"[" * 100_000, "brackets"),
        (b'{"a":' * 100_000, "brackets"),
        (b"\xff\xfe", "program.json: "),
        (b'{"format": 1, "format": 2}', "a field twice"),
        (b"1" * 5000, "program.json: "),
        (b" " * (1 << 22) + b"{}", "at most 4194304 bytes expected, got 4194306"),
    ],
)
def test_what_is_no_header_is_refused(path: Path, text: bytes, says: str) -> None:
    write(path, members(path) | {"program.json": text})
    refuse(path, says)


def test_members_are_those_of_the_header(path: Path) -> None:
    content = members(path)
    write(path, content | {"../evil.npy": b""})
    refuse(path, "no more than the arrays of the header expected, got '../evil.npy'")
    write(path, {name: each for name, each in content.items() if name != KERNEL})
    refuse(path, "'operation_0_kernel' expected, which is missing")
    write(path, {name: each for name, each in content.items() if name != "program.json"})
    refuse(path, "a member 'program.json' expected")
    write(path, content, zipfile.ZIP_LZMA)
    refuse(path, "stored or deflated expected")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program.json", b"{}")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("program.json", b"{}")
    refuse(path, "two members have the same name")
    write(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"more"
    refuse(path, "without a comment")


def test_a_bomb_is_refused_before_it_goes_off(path: Path) -> None:
    content = members(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in content.items():
            if name != KERNEL:
                archive.writestr(name, each)
        archive.writestr(KERNEL, bytes(1 << 24))
    tracemalloc.start()
    refuse(path, "54 bytes and a header expected, got 16777216")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    inflated = bytearray(path.read_bytes())
    at = inflated.rfind(b"PK\1\2")
    inflated[at + 24 : at + 28] = struct.pack("<L", 0xFFFFFFF0)
    path.write_bytes(inflated)
    refuse(path, "at most 268435456 bytes of content expected")
    inflated[-10:-6] = struct.pack("<L", 0x7FFFFFFF)
    path.write_bytes(inflated)
    refuse(path, "a directory of at most")


def test_what_is_no_file_of_a_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        IntegerProgram.load(tmp_path / "missing.npz")
    refuse(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")
    for content in (b"", b"PK\5\6", bytes(22), b"\x93NUMPY", b"a" * 1000):
        (tmp_path / "other").write_bytes(content)
        refuse(tmp_path / "other", f"a zip archive .* expected, got {len(content)} bytes")
    np.savez(tmp_path / "arrays.npz", np.arange(3))
    refuse(tmp_path / "arrays.npz", r"a member 'program.json' expected, got \['arr_0.npy'\]")
