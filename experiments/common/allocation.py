"""Where the temporaries of a training step lie.

XLA asks malloc for a step's temporaries and gives them back after it. glibc maps so large blocks
anew each time, page by page: a ResNet-20's step at batch 128 meets some 80,000 page faults, and
the system zeroes every page. jemalloc keeps the pages if it is told to. Without it, glibc 2.35 and
newer asks the kernel for pages of 2 MiB if it is told to before the process begins, and a tenth as
many faults are left.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
"""1 has malloc ask for transparent huge pages."""

MALLOC_CONF = "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1"
"""jemalloc's options: huge pages, never given back, and one arena, so that threads do not keep some
each. The peak is some tenths higher than glibc's."""

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LIBRARIES = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))


def restart_with_huge_pages() -> None:
    """Begins this process again, with jemalloc where that is installed, otherwise with huge pages
    of glibc's; unless neither is possible or something speaks for another choice: a value of the
    tunable, jemalloc's options, a preloaded library, a debugger.

    It is called first of all by what is run as a command; it changes no number, only time.
    """
    if sys.gettrace() is None and _is_wanted(os.environ):
        sys.stdout.flush()
        sys.stderr.flush()
        environment = {**os.environ, **settings(os.environ, find_jemalloc())}
        os.execve(sys.executable, sys.orig_argv, environment)


def settings(environment: Mapping[str, str], jemalloc: Path | None) -> dict[str, str]:
    """The environment variables to begin again with.

    Example:
        >>> settings({}, Path("/usr/lib/libjemalloc.so.2"))["LD_PRELOAD"]
        '/usr/lib/libjemalloc.so.2'
        >>> settings({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, None)
        {'GLIBC_TUNABLES': 'glibc.malloc.check=0:glibc.malloc.hugetlb=1'}
    """
    if jemalloc is not None:
        return {"LD_PRELOAD": str(jemalloc), "MALLOC_CONF": MALLOC_CONF}
    given = environment.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": f"{given}:{TUNABLE}=1" if given else f"{TUNABLE}=1"}


def find_jemalloc() -> Path | None:
    """The library, where a package of the system has put it."""
    machine = f"{platform.machine()}-linux-gnu"
    for folder in (folder / part for folder in _LIBRARIES for part in (machine, ".")):
        library = folder / "libjemalloc.so.2"
        if library.is_file():
            return library
    return None


def _is_wanted(environment: Mapping[str, str]) -> bool:
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    if TUNABLE in environment.get("GLIBC_TUNABLES", ""):
        return False
    if environment.get("LD_PRELOAD") or environment.get("MALLOC_CONF"):
        return False
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False
