"""Calibration images: pixels as bytes, or the floats that a network takes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jadder.integer.grid import Grid
from jadder.integer.program import Activation

PerChannel = ArrayLike | Sequence[float]

_BYTE = 255


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Calibration images, and how they become what the network takes."""

    images: Any
    mean: Any
    std: Any

    @classmethod
    def of(
        cls, name: str, images: ArrayLike, mean: PerChannel | None, std: PerChannel | None
    ) -> "Pixels":
        """Checked; ``name`` is the caller's.

        Raises:
          ValueError, TypeError: images or moments of the wrong kind.
        """
        array = np.asarray(images)
        if array.ndim not in (2, 3, 4) or 0 in array.shape:
            raise ValueError(
                f"{name}: images (batch, height, width, channels) expected, got {array.shape}"
            )
        array = array.reshape(len(array), *(1,) * (4 - array.ndim), *array.shape[1:])
        if array.dtype == np.uint8:
            if mean is None or std is None:
                raise TypeError(f"{name}: uint8 images need mean and std, those of the training")
            channels = array.shape[-1]
            for what, each in (("mean", mean), ("std", std)):
                if np.shape(each) not in ((), (1,), (channels,)):
                    raise ValueError(
                        f"{name}: {what} must be a number or one for each of the {channels} "
                        f"channels, got shape {np.shape(each)}"
                    )
            own_mean, own_std = (
                np.broadcast_to(np.asarray(each, np.float64), (channels,)) for each in (mean, std)
            )
            if not (own_std > 0).all() or not np.isfinite(own_mean).all():
                raise ValueError(f"{name}: finite means and positive deviations expected")
            return cls(array, own_mean, own_std)
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"{name}: images must be uint8 or floats, got {array.dtype}")
        if mean is not None or std is not None:
            raise TypeError(f"{name}: mean and std belong to uint8 images, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: the images have values that are not finite")
        return cls(array.astype(np.float32), None, None)

    @property
    def shape(self) -> Any:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def floats(self) -> Any:
        """What the network takes."""
        if self.mean is None:
            return self.images
        return ((self.images / 255 - self.mean) / self.std).astype(np.float32)

    def activation(self) -> tuple[Activation, Any]:
        """The image's grid, and its zero in each channel before it is rounded."""
        if self.mean is None:
            grid = Grid.fitted(self.images, _BYTE)
            return Activation(self.shape, (grid.scale,), (grid.zero_point,)), grid.zero_point
        zero = 255 * self.mean
        rounded = tuple(int(z) for z in np.clip(np.rint(zero), 0, 255))
        scale = tuple(float(s) for s in 1 / (255 * self.std))
        return Activation(self.shape, scale, rounded), zero
