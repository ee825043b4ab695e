"""What a result was measured with: versions, hardware, memory."""

import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


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


def peak_memory() -> dict[str, int]:
    """The most memory this process has held so far, in bytes, on the host and on the device."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = {"peak_rss_bytes": rss if sys.platform == "darwin" else rss * 1024}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peaks["peak_device_bytes"] = stats["peak_bytes_in_use"]
    return peaks
