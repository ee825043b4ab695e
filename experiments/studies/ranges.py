"""Where the kernels of a model's adder layers lie beside the inputs that they meet.

|x - w| has a bend at w, and away from it only a slope of ±1: an element that lies outside of all
inputs of its channel bends nowhere, and is a binary weight.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

from jadder.adder_kernels import AdderOperator
from jadder.products import adder_products


class Range(NamedTuple):
    """One adder layer's kernel w and its input x. Shares are of the kernel's elements.

    Attributes:
        kernel_rms: √mean(w²).
        input_rms: √mean(x²).
        input_max: the largest x.
        below: share that lies below all inputs of its channel.
        above: share that no input of its channel exceeds.
        bending: share with P(x > w) between 1 and 99 %, over the inputs of its channel.
        bending_well: share with P(x > w) between 10 and 90 %.
    """

    kernel_rms: float
    input_rms: float
    input_max: float
    below: float
    above: float
    bending: float
    bending_well: float


def range_of(x: Array, kernel: Array) -> Range:
    """The range of a kernel (..., channels, features) and its input (..., channels).

    Raises:
        ValueError: they differ in their channels, as in a grouped convolution.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.linspace(0, 1, 101)[:, None]
        >>> seen = range_of(x, jnp.array([[-1.0, 0.05, 0.5, 2.0]]))
        >>> seen.below, seen.bending_well, seen.bending, seen.above
        (0.25, 0.25, 0.5, 0.25)
    """
    channels = x.shape[-1]
    if kernel.shape[-2] != channels:
        raise ValueError(
            f"the kernel must be (..., channels, features) with {channels} channels, "
            f"got {kernel.shape}"
        )
    inputs = np.asarray(x, np.float32).reshape(-1, channels)
    w = np.asarray(kernel, np.float32).reshape(-1, channels, kernel.shape[-1])
    ordered = np.sort(inputs, axis=0)
    not_above = [np.searchsorted(ordered[:, c], w[:, c], side="right") for c in range(channels)]
    beyond = 1 - np.stack(not_above, axis=1) / len(inputs)  # P(x > w) of each element

    return Range(
        kernel_rms=float(np.sqrt(np.mean(np.square(w)))),
        input_rms=float(np.sqrt(np.mean(np.square(inputs)))),
        input_max=float(inputs.max()),
        below=float(np.mean(beyond == 1)),
        above=float(np.mean(beyond == 0)),
        bending=float(np.mean((beyond > 0.01) & (beyond < 0.99))),
        bending_well=float(np.mean((beyond > 0.1) & (beyond < 0.9))),
    )


@dataclasses.dataclass(frozen=True)
class _Looking(AdderOperator):
    """Calls a product, and hands its operands to a function before."""

    product: Callable[..., Array]
    look: Callable[[Array, Array], None]

    def __call__(self, x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        self.look(x, kernel)
        y: Array = self.product(x, kernel, *args, **kwargs)
        return y


def ranges(model: nnx.Module, images: Array) -> dict[str, Range]:
    """Of every adder layer by its path, when the model is called with the images.

    Layers are in the order in which they are called. In training mode each is given what batches'
    own statistics make of these images. The model's parameters and statistics stay.
    """
    copy = nnx.clone(model)
    seen: dict[str, Range] = {}

    def looking(name: str, product: Any) -> _Looking:
        def look(x: Array, kernel: Array) -> None:
            if not isinstance(x, jax.core.Tracer):
                seen[name] = range_of(x, kernel)

        return _Looking(product, look)

    for path, module, attribute, product in adder_products(copy):
        name = "/".join(str(part) for part in path if part != "product")
        setattr(module, attribute, looking(name, product))
    copy(images)
    return seen
