"""Training with the grid in place: adder products whose operands are rounded as bytes will be."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jadder.adder_kernels import AdderOperator
from jadder.integer.calibrate import CHUNK, sample_of
from jadder.integer.grid import Grid
from jadder.integer.pixels import PerChannel, Pixels
from jadder.models import update_statistics
from jadder.products import AdderEinsum, AdderProduct, MixedProduct, adder_products


@dataclasses.dataclass(frozen=True)
class RoundedProduct(AdderOperator):
    """An adder product of operands that are rounded to one grid first.

    Rounding does not show in the gradients: they are those of the adder product at the operands as
    they were, the kernel not clipped to the grid's range (straight-through). What clipping a
    kernel takes away from the sums is a constant for each feature, and is left away: the
    normalisation after the product takes it up.

    Attributes:
      adder: the product whose place it takes.
      grid: of both operands.
    """

    adder: AdderProduct
    grid: Grid

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        subscripts, operands, others = _split(self.adder, args)
        function: Callable[..., Array] = self.adder

        def adder(x: Array, w: Array) -> Array:
            return function(*subscripts, x, w, *others, **kwargs)

        @jax.custom_vjp
        def product(x: Array, w: Array) -> Array:
            return adder(self.grid.round_to_grid(x), self.grid.round_to_grid(w))

        def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
            return product(x, w), (x, w)

        def backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, ...]:
            # Of this second forward pass nothing is used, and XLA drops it.
            gradients: tuple[Array, ...] = jax.vjp(adder, *residuals)[1](g)
            return gradients

        product.defvjp(forward, backward)
        y: Array = product(*operands)
        return y


def fake_quantize(
    model: nnx.Module,
    images: ArrayLike,
    *,
    bits: int = 3,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
) -> Any:
    """A copy of a network whose adder products compute on the grids that `quantize` will use.

    It is trained like any other: a few hundred steps at a low rate make good most of what few bits
    lose. Its gradients are the gradient rule's, at operands that are not rounded. The statistics of
    its batch norms are taken anew from ``images``. `jadder.quantize` finds the grids in the trained
    network, and gives a program that computes the same function.

    Args:
      model: a trained network with adder products; it is not changed.
      images, mean, std: as in `jadder.quantize`: the range of each product's inputs is that of
        these images.
      bits: of both operands of every adder product, 2 to 8.

    Returns:
      The copy, in the model's own class.

    Raises:
      ValueError: a network without adder products, or with products on their way from Euclid's
        distance; bits or images out of range.
      TypeError: as in `jadder.quantize`.

    Example:
      >>> import jadder, jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> layer = jadder.AdderLinear(2, 3, rngs=nnx.Rngs(0))
      >>> x = np.linspace(0, 1, 8, dtype=np.float32).reshape(4, 2)
      >>> layer = fake_quantize(layer, x, bits=2)
      >>> layer.dot_general.grid.maximum
      3
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"fake_quantize: bits must be an integer from 2 to 8, got {bits!r}")
    source = Pixels.of("fake_quantize", images, mean, std)
    model = nnx.clone(model)
    recorders = _replace_products(model, lambda product: _Recorder(_adder_of(product), []))
    if not recorders:
        raise ValueError("fake_quantize: the model has no adder products")
    floats = source.floats()
    chunks = [jnp.asarray(floats[at : at + CHUNK]) for at in range(0, len(floats), CHUNK)]
    model.eval()
    for chunk in chunks:
        model(chunk)
    _replace_products(model, lambda recorder: recorder.rounded(2**bits - 1))
    update_statistics(model, chunks)
    model.train()
    return model


@dataclasses.dataclass(eq=False)
class _Recorder(AdderOperator):
    """An adder product that keeps a sample of its inputs."""

    adder: AdderProduct
    samples: list[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        _, (x, _), _ = _split(self.adder, args)
        self.samples.append(sample_of(np.asarray(x)))
        return self.adder(*args, **kwargs)

    def rounded(self, maximum: int) -> RoundedProduct:
        if not self.samples:
            return RoundedProduct(self.adder, Grid.between(0.0, 1.0, maximum))
        return RoundedProduct(self.adder, Grid.fitted(np.concatenate(self.samples), maximum))


def _replace_products(model: nnx.Module, replacement: Callable[[Any], Any]) -> list[Any]:
    """Puts something else in place of every adder product of a model, rounded ones included."""
    places = [(place.module, place.attribute, place.product) for place in adder_products(model)]
    for _, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, RoundedProduct | _Recorder):
                places.append((module, name, value))
    replaced = []
    for module, name, product in places:
        replaced.append(replacement(product))
        setattr(module, name, replaced[-1])
    return replaced


def _adder_of(product: Any) -> AdderProduct:
    if isinstance(product, MixedProduct):
        raise ValueError(
            "fake_quantize: the model has products on their way from Euclid's distance to the "
            "adder's; jadder.set_l1_share(model, 1.0) ends that way"
        )
    adder: AdderProduct = product.adder if isinstance(product, RoundedProduct) else product
    return adder


def _split(adder: AdderProduct, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """An einsum's subscripts, the two operands, and the arguments after them."""
    first = 1 if isinstance(adder, AdderEinsum) else 0
    return args[:first], args[first : first + 2], args[first + 2 :]
