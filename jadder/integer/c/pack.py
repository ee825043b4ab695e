"""Kernels in the order in which they are read."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[Any]


def with_pitch(kernel: Bytes, pitch: int, fill: int) -> Bytes:
    """A kernel (height, width, channels, features) with ``pitch`` channels: of the value ``fill``
    where there were none."""
    missing = pitch - kernel.shape[2]
    return np.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=fill)


def filters(kernel: Bytes) -> Bytes:
    """(height, width, channels, features) as (features, height · width · channels)."""
    return kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1)


def runs(kernel: Bytes, pitch: int, dilation: int, fill: int) -> Bytes:
    """(features, taps, run): neighbouring bytes as one run, whole rows of it where taps touch."""
    height, width, _, features = kernel.shape
    padded = with_pitch(kernel, pitch, fill)
    if dilation == 1:
        # The last tap's channels end the run: what lies behind them is not read.
        row = padded.reshape(height, width * pitch, features)
        return row[:, : (width - 1) * pitch + kernel.shape[2]].transpose(2, 0, 1)
    return kernel.reshape(height * width, -1, features).transpose(2, 0, 1)


def tiled(run: Bytes, chunk: int) -> Bytes:
    """(features, taps, run) as (features / 4, taps, run / chunk, 4, chunk), both rounded up and
    filled with zeros."""
    features, taps, length = run.shape
    padded = np.pad(run, ((0, -features % 4), (0, 0), (0, -length % chunk)))
    split = padded.reshape(padded.shape[0] // 4, 4, taps, -1, chunk)
    return split.transpose(0, 2, 3, 1, 4)
