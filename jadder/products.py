"""The products as objects: what a Flax layer calls in place of its own, and where a model has them.

Each holds its rule and implementation. Unlike a ``functools.partial``, two of these with the same
fields are equal, so a model whose layers have one each compiles once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jadder import ops
from jadder.adder_kernels import AdderOperator
from jadder.implementations import Implementation, check_implementation
from jadder.rules import ADDERNET, GradientRule, check_rule


@dataclasses.dataclass(frozen=True)
class _Product(AdderOperator):
    rule: GradientRule = ADDERNET
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        check_rule(type(self).__name__, self.rule)
        check_implementation(type(self).__name__, self.implementation)


@dataclasses.dataclass(frozen=True)
class AdderDotGeneral(_Product):
    """`jadder.ops.adder_dot_general` with its rule and implementation, for ``nnx.Linear``.

    Raises:
      TypeError, ValueError: a rule or implementation that there is not.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 4, dot_general=AdderDotGeneral(), rngs=nnx.Rngs(0))
    """

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        kwargs |= {"rule": self.rule, "implementation": self.implementation}
        return ops.adder_dot_general(lhs, rhs, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class AdderConvGeneralDilated(_Product):
    """`jadder.ops.adder_conv_general_dilated` with its rule and implementation, for ``nnx.Conv``.

    Not for one with a ``mask``: ``nnx.Conv`` multiplies the kernel with it and does not hand it on,
    and an adder product sees the input under a kernel's zero. `jadder.AdderConv` takes masks.

    Raises:
      TypeError, ValueError: a rule or implementation that there is not.

    Example:
      >>> from flax import nnx
      >>> conv = AdderConvGeneralDilated(implementation="xla")
      >>> layer = nnx.Conv(3, 4, (3, 3), conv_general_dilated=conv, rngs=nnx.Rngs(0))
    """

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        kwargs |= {"rule": self.rule, "implementation": self.implementation}
        return ops.adder_conv_general_dilated(lhs, rhs, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class AdderEinsum(_Product):
    """`jadder.ops.adder_einsum` with its rule and implementation, for ``nnx.Einsum``.

    Raises:
      TypeError, ValueError: a rule or implementation that there is not.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Einsum("nta,ab->ntb", (2, 4), einsum_op=AdderEinsum(), rngs=nnx.Rngs(0))
    """

    def __call__(self, subscripts: str, x: Array, kernel: Array, **kwargs: Any) -> Array:
        kwargs |= {"rule": self.rule, "implementation": self.implementation}
        return ops.adder_einsum(subscripts, x, kernel, **kwargs)


AdderProduct = AdderDotGeneral | AdderConvGeneralDilated | AdderEinsum

_EUCLID: dict[type[Any], Any] = {
    AdderDotGeneral: ops.euclid_dot_general,
    AdderConvGeneralDilated: ops.euclid_conv_general_dilated,
    AdderEinsum: ops.euclid_einsum,
}


@dataclasses.dataclass(frozen=True)
class MixedProduct(AdderOperator):
    """-Σ(l1_share · |x - w| + (1 - l1_share) · (x - w)²/2), in place of an adder product.

    Its gradient with respect to the kernel is the full-precision rule's at any share, if that is
    the adder product's rule; that with respect to the input goes from w - x to ψ_x(w - x).

    Attributes:
      adder: the product whose place it takes.
      l1_share: between 0 and 1.
    """

    adder: AdderProduct
    l1_share: float

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        euclid = args
        adder = args
        kernel = 2 if isinstance(self.adder, AdderEinsum) else 1
        if self.l1_share >= _LEAST_SHARE and self.adder.rule.kernel == ADDERNET.kernel:
            # Both have the same gradient for the kernel: one of them gives all of it.
            euclid = _replaced(args, kernel, jax.lax.stop_gradient)
            adder = _replaced(args, kernel, lambda w: _scale_gradient(w, 1 / self.l1_share))
        of_euclid = kwargs | {"implementation": self.adder.implementation}
        y: Array = (0.5 * (1 - self.l1_share)) * _EUCLID[type(self.adder)](*euclid, **of_euclid)
        return y if self.l1_share == 0 else y + self.l1_share * self.adder(*adder, **kwargs)


_LEAST_SHARE = 1e-3  # whose reciprocal costs no digits, in half precision either


def _replaced(args: tuple[Any, ...], place: int, change: Callable[[Any], Any]) -> tuple[Any, ...]:
    return tuple(change(jnp.asarray(arg)) if i == place else arg for i, arg in enumerate(args))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scale_gradient(x: Array, factor: float) -> Array:
    return x


@_scale_gradient.defjvp
def _scale_gradient_jvp(
    factor: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return primals[0], factor * tangents[0]


_ADDER: dict[Any, type[AdderProduct]] = {
    ops.adder_dot_general: AdderDotGeneral,
    ops.adder_conv_general_dilated: AdderConvGeneralDilated,
    ops.adder_einsum: AdderEinsum,
}


class Place(NamedTuple):
    """Where a model has a product: an attribute of one of its modules.

    Attributes:
      path: of the module.
      module: whose attribute it is.
      attribute: its name.
      product: its value; for an adder product that was given as a function, the object.
    """

    path: tuple[Any, ...]
    module: Any
    attribute: str
    product: Any


def adder_products(model: nnx.Module) -> list[Place]:
    """The adder products of a model, those on their way from Euclid's distance included.

    Example:
      >>> import jadder
      >>> rngs = nnx.Rngs(0)
      >>> layers = nnx.Linear(2, 3, dot_general=jadder.adder_dot_general, rngs=rngs), nnx.relu
      >>> [(place.path, place.attribute) for place in adder_products(nnx.Sequential(*layers))]
      [(('layers', 0), 'dot_general')]
    """
    found = []
    for place in _callables(model):
        product = _as_object(place.product)
        if product is not None:
            found.append(place._replace(product=product))
    return found


def distance_products(model: nnx.Module) -> list[Place]:
    """The adder and Euclid products of a model."""
    adders = adder_products(model)
    known = tuple(_EUCLID.values())
    euclid = [
        place
        for place in _callables(model)
        if any(_function(place.product) is function for function in known)
    ]
    return adders + euclid


def _callables(model: nnx.Module) -> Iterator[Place]:
    for path, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if callable(value) and not isinstance(value, nnx.Pytree | nnx.Variable):
                yield Place(tuple(path), module, name, value)


def _function(product: Any) -> Any:
    while isinstance(product, functools.partial):
        product = product.func
    return product


def _as_object(product: Any) -> AdderProduct | MixedProduct | None:
    if isinstance(product, AdderProduct | MixedProduct):
        return product
    function = _function(product)
    kind = next((kind for known, kind in _ADDER.items() if known is function), None)
    if kind is None:
        return None
    options = product.keywords if isinstance(product, functools.partial) else {}
    known = options.keys() <= {"rule", "implementation"}
    return kind(**options) if known else None
