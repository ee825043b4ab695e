"""What an installation does where the native kernels do not compile: csrc/attempt.cmake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FALSE = shutil.which("false") or "/bin/false"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake")


def attempt(tmp_path: Path, compiler: str, *, required: bool = False) -> tuple[int, str, str]:
    """The status and the text of an attempt with that compiler, and the reason that it left."""
    result = tmp_path / "result"
    done = subprocess.run(
        [
            "cmake",
            f"-DSOURCE={CSRC}",
            f"-DBINARY={tmp_path / 'build'}",
            f"-DRESULT={result}",
            f"-DSETTINGS=-DPython3_EXECUTABLE={sys.executable}",
            f"-DREQUIRED={'ON' if required else 'OFF'}",
            "-P",
            str(CSRC / "attempt.cmake"),
        ],
        env={**os.environ, "CC": compiler, "CXX": compiler},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    left = result / "missing.txt"
    return done.returncode, done.stdout, left.read_text() if left.exists() else ""


def test_a_compiler_that_always_fails_leaves_the_reason(tmp_path):
    status, text, reason = attempt(tmp_path, FALSE)
    assert status == 0
    assert reason == "no C++ compiler was found that works\n"
    assert "installed without native CPU kernels" in text
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["missing.txt"]


def test_a_compiler_that_fails_at_a_kernel_leaves_its_words(tmp_path):
    found = shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        "case \"$*\" in *kernels.cc*) echo 'fatal error: no such instruction' >&2; exit 1;; esac\n"
        f'exec {found} -O0 "$@"\n'
    )
    compiler.chmod(0o755)
    status, _, reason = attempt(tmp_path, str(compiler))
    assert status == 0
    assert reason == "compiling it failed (fatal error: no such instruction)\n"


def test_where_native_code_is_required_it_is_an_error(tmp_path):
    status, text, reason = attempt(tmp_path, FALSE, required=True)
    assert status != 0
    assert "configuring the native CPU kernels failed" in text
    assert not reason
