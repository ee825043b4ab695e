"""A folder has one process that writes there; its lock ends with it, however it ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train, twins
from experiments.common import lock
from experiments.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from experiments.common.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def python(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with python("-c", HOLD, str(folder)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        says = rf"run is in use: process {holder.pid} on \S+ writes there since 20\d\d-\d\d-\d\d "
        with pytest.raises(UserError, match=says) as caught, lock.hold(folder):
            pass
        assert caught.value.status == 2
        holder.send_signal(signal.SIGKILL)
    assert (folder / ".lock").exists()
    with lock.hold(folder):
        pass
    assert list(folder.iterdir()) == []


def test_the_lock_is_held_until_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    for _ in range(2):
        with lock.hold(folder):
            (folder / "kept").touch()
            with pytest.raises(UserError, match="is in use"), lock.hold(folder):
                pass
            with pytest.raises(UserError, match="is in use"), lock.hold(folder):
                pass
        assert [path.name for path in folder.iterdir()] == ["kept"]
    with lock.hold(tmp_path / "made" / "and" / "empty"):
        pass
    assert not (tmp_path / "made").exists()


def test_a_lock_that_says_nothing_still_holds(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        (tmp_path / ".lock").write_text('["not", "ours"]')
        with (
            pytest.raises(UserError, match="is in use: another process writes"),
            lock.hold(tmp_path),
        ):
            pass


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), lock.hold(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_without_locks_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.hold(tmp_path / "a"):
        pass
    err = capsys.readouterr().err
    assert re.fullmatch(r"\S+a cannot be locked \(this system has no fcntl\): .*\n", err)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("command", ["train", "study"])
def test_the_second_command_gets_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "train":
        name, main = "digits-lenet5-conv-s0", train.main
        options = ["--family", "conv", "--out-dir", str(tmp_path)]
    else:
        name, main = "twins-smoke", twins.main
        options = ["--smoke", "--out-dir", str(tmp_path)]
    with lock.hold(tmp_path / name):
        assert main(options) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / name} is in use: process {os.getpid()} on ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("absent", ["fcntl", "resource"])
def test_commands_are_imported_where_unix_modules_are_absent(absent: str) -> None:
    code = f"import sys; sys.modules[{absent!r}] = None; import experiments.train as t; "
    code += "sys.exit(t.main(['--epochs', '0']))"
    with python("-c", code) as process:
        _, err = process.communicate()
    assert (process.returncode, err) == (2, "error: --epochs must be positive, got 0\n")


def test_peak_memory_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.common.environment import peak_memory

    assert "peak_rss_bytes" in peak_memory()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "peak_rss_bytes" not in peak_memory()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_is_imported(signum: signal.Signals) -> None:
    """As `python -m experiments.NAME` begins: the package is imported first of all."""
    code = "import sys, os; sys.argv = ['-m']; import experiments; "
    code += f"os.kill(os.getpid(), {int(signum)}); import time; time.sleep(60)"
    with python("-c", code) as process:
        out, err = process.communicate()
    assert (process.returncode, out, err) == (128 + signum, "", "interrupted\n")
