"""experiments.common: files and messages, one line for whatever is in a file's place."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.errors import LONGEST, UserError, disk_is_full, one_line, status_of
from experiments.common.files import entry, read_bytes, read_json, remove_scratch, write_bytes
from experiments.common.interrupt import Interrupted


def a_socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's name has at most 107 characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(before)


NO_JSON: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: None, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read: Expecting value"),
    "list": (lambda path: path.write_bytes(b"[1]"), "holds a list, expected an object"),
    "string": (lambda path: path.write_bytes(b'"x"'), "holds a str, expected an object"),
    "cut": (lambda path: path.write_bytes(b'{"a": 1, "b'), "cannot be read"),
    "brackets": (lambda path: path.write_bytes(b"[" * 100_000), "nested too deeply"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    "long number": (lambda path: path.write_bytes(b"9" * 10_000), "cannot be read"),
    "folder": (Path.mkdir, "is a folder, expected a file"),
    "FIFO": (os.mkfifo, "is no ordinary file"),
    "socket": (a_socket, "cannot be read"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is no ordinary file"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
    "huge": (lambda path: (path.touch(), os.truncate(path, 2**40)), "too large"),
}


@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json_object(kind: str, tmp_path: Path) -> None:
    make, text = NO_JSON[kind]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(UserError, match=text) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert caught.value.status == 2


@given(st.binary(max_size=50))
def test_any_bytes_are_json_or_one_line(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_bytes(content)
    assert read_bytes(path) == content
    value, text = None, ""
    try:
        value = read_json(path)
    except UserError as error:
        text = str(error)
    assert text.isprintable()
    assert isinstance(value, dict) or str(path) in text


@pytest.mark.parametrize(
    ("value", "kind", "good"),
    [(1, int, True), (1.5, int, False), (True, int, False), (1, float, True), (True, float, False),
     (True, bool, True), ("1", float, False), (None, (int, type(None)), True), ([], dict, False)],
)  # fmt: skip
def test_entries_have_their_kind(value: Any, kind: Any, good: bool) -> None:
    where = Path("config.json")
    if good:
        assert entry({"key": value}, "key", kind, where) is value
    else:
        with pytest.raises(UserError, match=r"config\.json is damaged: its 'key' is .*, expected"):
            entry({"key": value}, "key", kind, where)
    with pytest.raises(UserError, match="lacks 'other'"):
        entry({"key": value}, "other", kind, where)


def test_a_file_that_cannot_be_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("x" * 250)
    write_bytes(path, b"before")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"after")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    for name in (".result.json.1234.tmp", "notes.tmp", ".config", ".mine.tmp"):
        (tmp_path / name).touch()
    remove_scratch(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", ".config", ".mine.tmp"}


@given(st.text(max_size=3000))
def test_messages_are_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 10 * LONGEST


def test_long_messages_lose_their_middle() -> None:
    assert one_line("a" * 10**6).startswith("a" * (LONGEST // 2))
    assert len(one_line("a" * 10**6)) < LONGEST


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("mine"), 2, "error: mine\n"),
        (UserError("not mine", status=1), 1, "error: not mine\n"),
        (PermissionError(errno.EACCES, "Permission denied"), 2, "error: [Errno 13]"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: [Errno 28]"),
        (MemoryError("96 GiB"), 1, "error: out of memory: 96 GiB\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted("stopped here", 15), 143, "stopped here\n"),
    ],
)
def test_exit_statuses(
    error: BaseException,
    status: int,
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # of pytest's own stdout

    def script() -> int:
        raise error

    assert status_of(script) == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert err.count("\n") == 1


def test_a_full_disk_is_known_in_whatever_says_it() -> None:
    def chained() -> BaseException:
        try:
            try:
                raise OSError(errno.EDQUOT, "quota")
            except OSError as error:
                raise RuntimeError("saving failed") from error
        except RuntimeError as error:
            return error

    text = "INTERNAL: Error writing local file: No space left on device [tensorstore]"
    assert disk_is_full(ValueError(text))
    assert disk_is_full(chained())
    assert disk_is_full(ExceptionGroup("several", [KeyError("x"), OSError(errno.ENOSPC, "")]))
    assert not disk_is_full(ValueError("shape"))
    assert not disk_is_full(PermissionError(errno.EACCES, "denied"))
