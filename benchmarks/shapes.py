"""The shapes that tests and benchmarks share."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Matmul:
    """x (m, k) times kernel (k, n)."""

    m: int
    k: int
    n: int

    @property
    def name(self) -> str:
        return f"matmul {self.m}x{self.k}x{self.n}"

    @property
    def macs(self) -> int:
        """Terms |x - w| of the forward product; each gradient has as many."""
        return self.m * self.k * self.n


@dataclasses.dataclass(frozen=True)
class Conv:
    """A square SAME convolution of (batch, size, size, channels), channels last."""

    batch: int
    size: int
    channels: int
    features: int
    window: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        extra = f" /{self.stride}" * (self.stride > 1) + f" g{self.groups}" * (self.groups > 1)
        size = f"{self.batch}x{self.size}x{self.size}"
        return f"conv {size}x{self.channels}->{self.features} {self.window}x{self.window}{extra}"

    @property
    def out_size(self) -> int:
        return -(-self.size // self.stride)

    @property
    def macs(self) -> int:
        """Terms |x - w| of the forward product, padding included."""
        terms = self.window**2 * self.channels // self.groups
        return self.batch * self.out_size**2 * self.features * terms


MATMULS = (
    Matmul(32768, 144, 16),
    Matmul(8192, 288, 32),
    Matmul(2048, 576, 64),
    Matmul(4096, 512, 512),
    Matmul(6304, 192, 768),
)
"""A ResNet-20's three stages as matrices, a square one, and a vision transformer's MLP."""

RESNET20_CONVS = (
    Conv(128, 32, 16, 16),
    Conv(128, 16, 32, 32),
    Conv(128, 8, 64, 64),
    Conv(128, 32, 16, 32, stride=2),
    Conv(128, 16, 32, 64, stride=2),
)
"""A CIFAR ResNet-20's three stages and its strided layers, at batch 128."""

RESNET18_CONVS = (
    Conv(8, 224, 3, 64, window=7, stride=2),
    Conv(8, 56, 64, 64),
    Conv(8, 56, 64, 128, stride=2),
    Conv(8, 28, 128, 128),
    Conv(8, 14, 256, 256),
    Conv(8, 7, 512, 512),
)
"""An ImageNet ResNet-18's stem, stages and one strided layer, at batch 8."""

SINGLE_IMAGE_CONVS = (
    Conv(1, 32, 16, 16),
    Conv(1, 16, 32, 32),
    Conv(1, 8, 64, 64),
    Conv(1, 56, 64, 64),
    Conv(1, 28, 128, 128),
    Conv(1, 14, 256, 256),
    Conv(1, 7, 512, 512),
)
"""The stages of both networks for one image."""

SMALL_MATMULS = (
    Matmul(1, 1, 1),
    Matmul(5, 7, 3),
    Matmul(33, 16, 17),
    Matmul(4, 40, 2),
    Matmul(20, 35, 40),
    Matmul(77, 520, 33),
)
SMALL_CONVS = (
    Conv(2, 5, 3, 4),
    Conv(1, 7, 17, 18),
    Conv(2, 6, 4, 6, stride=2),
    Conv(2, 5, 3, 5, window=1, stride=2),
    Conv(2, 6, 6, 6, groups=6),
    Conv(1, 6, 4, 8, window=4, stride=3, groups=2),
    Conv(3, 4, 1, 1, window=5),
    Conv(2, 9, 20, 40),
    Conv(2, 5, 34, 34, stride=2, groups=2),
)
"""Odd sizes, single elements, remainders of every chunk and tile: what tests run on."""


def total_bytes(*shapes: tuple[int, ...], itemsize: int = 4) -> int:
    """The bytes that arrays of these shapes take."""
    return itemsize * sum(math.prod(shape) for shape in shapes)
