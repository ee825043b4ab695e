"""What a result was measured with: versions, hardware, memory."""

import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.errors import UserError


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("jadder", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The processor, the cores this process may use, and the devices of the run."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        cores = os.cpu_count() or 1
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "devices": [device.device_kind for device in devices],
        "processes": jax.process_count(),
        "platform": jax.default_backend(),
    }


def check_memory(size: int, what: str) -> None:
    """Raises UserError if `what`, of `size` bytes, is more than this process may ever have."""
    memory = total_memory()
    if memory is not None and size > memory:
        raise UserError(f"{what} would take {size / 2**30:,.0f} GiB of {memory / 2**30:,.0f} GiB")


def total_memory() -> int | None:
    """Bytes that the machine, or the container, has; None where the system does not say it."""
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # there it says "max" where there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def peak_memory() -> dict[str, int]:
    """The most memory this process has held so far, in bytes, on the host and on the device.

    Without the host's where the system does not say it, as on Windows.
    """
    peaks = {}
    try:
        import resource
    except ImportError:
        pass
    else:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["peak_rss_bytes"] = rss if sys.platform == "darwin" else rss * 1024
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peaks["peak_device_bytes"] = stats["peak_bytes_in_use"]
    return peaks
