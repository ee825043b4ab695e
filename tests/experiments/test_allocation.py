"""A command that restarts itself does so once, with the same arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common import allocation

ROOT = Path(__file__).resolve().parents[2]
PRINTS = (
    "import sys, os; from experiments.common.allocation import restart_with_huge_pages; "
    "print('begun', flush=True); restart_with_huge_pages(); "
    "print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], sys.flags.no_user_site)"
)


def printed(**environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    command = [sys.executable, "-s", "-c", PRINTS, "a b", "--c"]
    done = subprocess.run(
        command, env={**clean, **environment}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(not allocation._is_wanted({}), reason="no glibc 2.35, or no huge pages")
def test_restarts_once_with_what_it_was_given() -> None:
    assert printed() == ["begun", "begun", "glibc.malloc.hugetlb=1 ['a b', '--c'] 1"]
    assert printed(GLIBC_TUNABLES="glibc.malloc.check=0") == [
        "begun", "begun", "glibc.malloc.check=0:glibc.malloc.hugetlb=1 ['a b', '--c'] 1",
    ]  # fmt: skip


def test_another_choice_stays() -> None:
    assert printed(GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == [
        "begun", "glibc.malloc.hugetlb=0 ['a b', '--c'] 1"
    ]  # fmt: skip
    assert not allocation._is_wanted({"LD_PRELOAD": "libjemalloc.so.2"})


@pytest.mark.parametrize("library", [("", ""), ("glibc", "2.31"), ("musl", "1.2")])
def test_not_without_the_library_for_it(
    library: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: library)
    assert not allocation._is_wanted({})
