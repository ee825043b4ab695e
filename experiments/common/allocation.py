"""Where the temporaries of a training step lie.

XLA asks malloc for a step's temporaries and gives them back after it. glibc maps so large blocks
anew each time, page by page: a ResNet-20's step at batch 128 meets some 80,000 page faults. With
pages of 2 MiB, which glibc 2.35 and newer asks the kernel for if it is told to before the process
begins, there are a tenth as many.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
"""1 has malloc ask for transparent huge pages."""

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Begins this process again, with huge pages, where that is possible and nothing speaks for
    another choice: a value of the tunable, a preloaded allocator, a debugger.

    It is called first of all by what is run as a command; it changes no number, only time.
    """
    if sys.gettrace() is None and _is_wanted(os.environ):
        given = os.environ.get("GLIBC_TUNABLES")
        tunables = f"{given}:{TUNABLE}=1" if given else f"{TUNABLE}=1"
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": tunables})


def _is_wanted(environment: Mapping[str, str]) -> bool:
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    if TUNABLE in environment.get("GLIBC_TUNABLES", "") or environment.get("LD_PRELOAD"):
        return False
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False
