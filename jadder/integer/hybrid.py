"""Networks of which only the adder products are in bytes, the rest in floats.

What has no integer form (softmax, layer norms, GELU) stays as it is: the network's jaxpr is
evaluated, and each adder product with a kernel of parameters is computed from bytes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.typing import ArrayLike

from jadder.integer.calibrate import CHUNK, Moments, sample_of
from jadder.integer.grid import Grid
from jadder.integer.jaxprs import bind, call_of
from jadder.integer.pixels import Pixels
from jadder.kernels.spec import ConvSpec
from jadder.ops import adder_conv_general_dilated, adder_dot_general

Substitute = Callable[[Any, list[Any]], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ByteProduct:
    """An adder product in bytes, between floats: scale · Σ|q - k| + offset.

    Attributes:
      kernel: uint8, in the layout of the product that it stands for.
      spec: the convolution's geometry; None of a matmul.
      grid: of the input and the kernel.
      scale, offset: float32, of each feature.
    """

    kernel: Any
    spec: ConvSpec | None
    grid: Grid
    scale: Any
    offset: Any

    def sums(self, x: Array) -> Array:
        """Σ|q - k| in int32, for floats in the layout of the product."""
        q = jnp.asarray(self.grid.to_integers(x), jnp.uint8)
        kernel = jnp.asarray(self.kernel)
        if self.spec is None:
            batched = (((2,), (1,)), ((0,), (0,)))
            return -adder_dot_general(q, kernel, batched, preferred_element_type=jnp.int32)
        sides = ((0, 0), *self.spec.padding, (0, 0))
        q = jnp.pad(q, sides, constant_values=np.uint8(self.grid.zero_point))
        rank = q.ndim - 2
        last = (0, rank + 1, *range(1, rank + 1))
        layout = lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)
        return -adder_conv_general_dilated(
            q, kernel, self.spec.window_strides, [(0, 0)] * rank, None, self.spec.rhs_dilation,
            layout, self.spec.feature_group_count, preferred_element_type=jnp.int32,
        )  # fmt: skip

    def __call__(self, x: Array) -> Array:
        """The product, float32."""
        return self.sums(x).astype(jnp.float32) * self.scale + self.offset


@dataclasses.dataclass(frozen=True, eq=False)
class HybridProgram:
    """A network with its adder products in bytes and all else in floats.

    Attributes:
      function: the network, from float images to logits.
      products: the adder products in bytes, in the order in which the network computes them.
      mean, std: where it takes uint8 pixels, what they are normalised with.
    """

    function: Callable[[Any], Any]
    products: tuple[ByteProduct, ...]
    mean: Any = None
    std: Any = None

    def __call__(self, images: ArrayLike) -> Array:
        """Logits of images as in calibration, uint8 pixels or floats."""
        return self._compiled(jnp.asarray(images))

    @functools.cached_property
    def _compiled(self) -> Callable[[Array], Array]:
        return jax.jit(self._run)

    def _run(self, images: Array) -> Array:
        remaining = iter(self.products)
        x = images
        if self.mean is not None:
            x = (x / np.float32(255) - self.mean) / self.std
        return _evaluate(self.function, x, lambda equation, operands: next(remaining)(operands[0]))


def quantize_products(function: Callable[[Any], Any], source: Pixels, bits: int) -> HybridProgram:
    """A network's adder products in bytes, calibrated one after the other on ``source``.

    Raises:
      ValueError: a network that has none.
    """
    floats = [
        jnp.asarray(source.floats()[start : start + CHUNK])
        for start in range(0, len(source.images), CHUNK)
    ]
    observer = _Observer()
    for chunk in floats:
        observer.run(function, chunk)
    if not observer.found:
        raise ValueError("quantize: the network has no adder product with a kernel of its own")
    products = tuple(_quantized(each, 2**bits - 1) for each in observer.found)
    mean, std = (None if each is None else each.astype(np.float32) for each in
                 (source.mean, source.std))  # fmt: skip
    return HybridProgram(function, products, mean, std)


@dataclasses.dataclass
class _Observed:
    """One adder product on the calibration images."""

    kernel: Any
    spec: ConvSpec | None
    inputs: list[Any]
    moments: list[Moments]


class _Observer:
    """Lets a network compute what it does, and keeps what its adder products meet."""

    def __init__(self) -> None:
        self.found: list[_Observed] = []
        self._position = 0

    def run(self, function: Callable[[Any], Any], images: Array) -> None:
        self._position = 0
        _evaluate(function, images, self)

    def __call__(self, equation: Any, operands: list[Any]) -> Any:
        (y,) = bind(equation, operands)
        if self._position == len(self.found):
            spec = dict(equation.params["product"].options).get("spec")
            self.found.append(_Observed(np.asarray(operands[1]), spec, [], []))
        observed = self.found[self._position]
        self._position += 1
        observed.inputs.append(np.asarray(operands[0]))
        observed.moments.append(Moments.of(y))
        return y


def _quantized(observed: _Observed, maximum: int) -> ByteProduct:
    sample = np.concatenate([sample_of(x) for x in observed.inputs])
    grid = Grid.fitted(sample, maximum)
    kernel = grid.to_integers(observed.kernel).astype(np.uint8)
    bare = ByteProduct(kernel, observed.spec, grid, None, None)
    sums = Moments.pooled([Moments.of(bare.sums(jnp.asarray(x))) for x in observed.inputs])
    floats = Moments.pooled(observed.moments)
    scale = -floats.deviation / np.where(sums.variance > 0, sums.deviation, np.inf)
    offset = floats.mean - scale * sums.mean
    return dataclasses.replace(
        bare, scale=scale.astype(np.float32), offset=offset.astype(np.float32)
    )


# -- Evaluation ------------------------------------------------------------------------------------


def _evaluate(function: Callable[[Any], Any], x: Array, substitute: Substitute) -> Any:
    """``function(x)`` with ``substitute`` in place of adder products of parameters."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(x)
    results = _evaluate_jaxpr(closed.jaxpr, closed.consts, [x], {0}, substitute)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _is_adder_product(equation: Any) -> bool:
    return equation.primitive.name == "adder_product" and equation.params["product"].is_adder


def _evaluate_jaxpr(
    jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], follow: Any, substitute: Substitute
) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    dependent = {jaxpr.invars[index] for index in follow}
    for equation in jaxpr.eqns:
        variables = equation.invars
        operands = [v.val if isinstance(v, core.Literal) else values[v] for v in variables]
        followed = {
            i for i, v in enumerate(variables) if not isinstance(v, core.Literal) and v in dependent
        }
        inner = call_of(equation)
        if _is_adder_product(equation) and followed == {0}:
            results = [substitute(equation, operands)]
        elif inner is not None:
            results = _evaluate_jaxpr(inner.jaxpr, inner.consts, operands, followed, substitute)
        else:
            results = bind(equation, operands)
        if followed:
            dependent |= set(equation.outvars)
        values |= zip(equation.outvars, results, strict=True)
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]
