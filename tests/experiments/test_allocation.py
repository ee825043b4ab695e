"""A command that restarts itself does so once, with the same arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common import allocation

ROOT = Path(__file__).resolve().parents[2]
CHOICES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF")
PRINTS = (
    "import sys, os; from experiments.common import allocation; "
    "print('begun', flush=True); FOUND; allocation.restart_with_huge_pages(); "
    f"print({{k: os.environ[k] for k in {CHOICES} if k in os.environ}}); "
    "print(sys.argv[1:], sys.flags.no_user_site)"
)
ARGUMENTS = "['a b', '--c'] 1"


def printed(*, jemalloc: bool = False, **environment: str) -> list[str]:
    """What a command prints that restarts itself, with the system's jemalloc or as if without."""
    clean = {k: v for k, v in os.environ.items() if k not in CHOICES}
    found = "pass" if jemalloc else "allocation.find_jemalloc = lambda: None"
    command = [sys.executable, "-s", "-c", PRINTS.replace("FOUND", found), "a b", "--c"]
    done = subprocess.run(
        command, env={**clean, **environment}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not allocation._is_wanted({}), reason="no glibc 2.35, or no huge pages")
def test_restarts_once_with_what_it_was_given() -> None:
    expected = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert printed() == ["begun", "begun", str(expected), ARGUMENTS]
    expected = {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=1"}
    given = "glibc.malloc.check=0"
    assert printed(GLIBC_TUNABLES=given) == ["begun", "begun", str(expected), ARGUMENTS]


@pytest.mark.skipif(not allocation._is_wanted({}), reason="no glibc 2.35, or no huge pages")
@pytest.mark.skipif(allocation.find_jemalloc() is None, reason="jemalloc is not installed")
def test_jemalloc_where_it_is_installed() -> None:
    expected = {
        "LD_PRELOAD": str(allocation.find_jemalloc()),
        "MALLOC_CONF": allocation.MALLOC_CONF,
    }
    assert printed(jemalloc=True) == ["begun", "begun", str(expected), ARGUMENTS]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
        ("MALLOC_CONF", "thp:never"),
    ],
)
def test_another_choice_stays(variable: str, value: str) -> None:
    assert not allocation._is_wanted({variable: value})


def test_the_tunable_is_left_as_it_was() -> None:
    given = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert printed(jemalloc=True, **given) == ["begun", str(given), ARGUMENTS]


def test_the_library_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(allocation, "_LIBRARIES", (tmp_path / "none", tmp_path))
    assert allocation.find_jemalloc() is None
    library = tmp_path / "libjemalloc.so.2"
    library.touch()
    assert allocation.find_jemalloc() == library


@pytest.mark.parametrize("library", [("", ""), ("glibc", "2.31"), ("musl", "1.2")])
def test_not_without_the_library_for_it(
    library: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: library)
    assert not allocation._is_wanted({})
