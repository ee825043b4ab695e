"""The products of a network: every one that it computes, with the very arguments that it is given.

A network is traced, without computing anything, with something in the place of each product that
remembers how it was called.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from experiments.studies.watch import Watched
from experiments.training import steps
from jadder.nn import AdderAttention

Struct = jax.ShapeDtypeStruct
Function = Callable[[Array, Array], Array]
INJECTED = ("dot_general", "conv_general_dilated", "score_product")
"""The attributes of layers, Flax's and jadder's, that hold a product."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a network.

    Attributes:
        path: of the layer, such as "layer1.0.conv1".
        function: of both operands; what else the layer gives is in it.
        lhs, rhs: shapes and dtypes of the operands; `rhs` is the kernel, where there is one.
        lhs_gradient, rhs_gradient: whether training needs the gradient for them. The first layer's
            input is the images, whose gradient nobody asks for.
        kernel: the type of the layer's kernel, which `rhs` is; None for other operands.
        signature: equal for products of which one is as quick as the other.
    """

    path: str
    function: Function
    lhs: Struct
    rhs: Struct
    lhs_gradient: bool
    rhs_gradient: bool
    kernel: type[Any] | None
    signature: str

    @property
    def shapes(self) -> str:
        """Such as "128x32x32x16, 3x3x16x16"."""
        return ", ".join("x".join(map(str, s.shape)) for s in (self.lhs, self.rhs))

    def passes(self) -> dict[str, Callable[..., Array]]:
        """The product, and the gradients that training needs, as functions of (lhs, rhs, g)."""

        def dx(x: Array, w: Array, g: Array) -> Array:
            return jax.vjp(lambda x: self.function(x, w), x)[1](g)[0]

        def dw(x: Array, w: Array, g: Array) -> Array:
            return jax.vjp(lambda w: self.function(x, w), w)[1](g)[0]

        wanted = {"forward": lambda x, w, g: self.function(x, w)}
        wanted |= {"∂x": dx} if self.lhs_gradient else {}
        return wanted | ({"∂w": dw} if self.rhs_gradient else {})


def products(model: nnx.Module, images: Struct) -> list[Product]:
    """Every product of a training step's forward pass, in the order of the calls.

    Layers with a product of their own (Flax's Linear and Conv, jadder's) and the two of attention,
    queries with keys and weights with values, are found; `jnp` calls elsewhere are not.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> [p.shapes for p in products(model, jax.ShapeDtypeStruct((8, 2), "float32"))]
        ['8x2, 2x3']
    """
    model = nnx.clone(model)
    calls: list[_Call] = []
    modules: list[tuple[tuple[Any, ...], Any]] = list(nnx.iter_modules(model))
    for path, layer in modules:
        name = ".".join(map(str, path))
        for attribute in INJECTED:
            product = getattr(layer, attribute, None)
            if product is not None:
                kernel = type(layer.kernel) if hasattr(layer, "kernel") else None
                role = name if kernel else f"{name}.scores"
                setattr(layer, attribute, _Recorder(role, product, kernel, calls))
        if isinstance(layer, AdderAttention):
            _watch_attention(name, layer, calls)
    graphdef, params, rest = steps.split(model)

    def total(params: Any, rest: Any, images: Array) -> Array:
        network: Any = nnx.merge(graphdef, params, rest)
        network.train()
        return network(images).sum()

    jax.eval_shape(jax.grad(total), params, rest, images)
    return [call.product() for call in calls]


@dataclasses.dataclass
class _Call:
    """A product's call, as it is being traced."""

    path: str
    function: Function
    operands: tuple[Struct, Struct]
    kernel: type[Any] | None
    what: Any
    differentiated: set[int] = dataclasses.field(default_factory=set)

    def product(self) -> Product:
        lhs, rhs = self.operands
        x, w = (place in self.differentiated for place in (0, 1))
        signature = repr((self.what, lhs, rhs, x, w, self.kernel))
        return Product(self.path, self.function, lhs, rhs, x, w, self.kernel, signature)

    def watch(self, *operands: Array) -> list[Array]:
        """The operands, whose gradients will be noticed if they are taken."""
        return [self._noticed(place)(operand) for place, operand in enumerate(operands)]

    def _noticed(self, place: int) -> Callable[[Array], Array]:
        @jax.custom_vjp
        def same(operand: Array) -> Array:
            return operand

        def forward(operand: Any) -> tuple[Array, None]:
            if operand.perturbed:
                self.differentiated.add(place)
            return operand.value, None

        same.defvjp(forward, lambda _, g: (g,), symbolic_zeros=True)
        return same


class _Recorder:
    """Stands in a product's place, remembers its calls and passes them on."""

    def __init__(
        self,
        path: str,
        product: Callable[..., Array],
        kernel: type[Any] | None,
        calls: list[_Call],
    ):
        self.path, self.product, self.kernel, self.calls = path, product, kernel, calls

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        def function(lhs: Array, rhs: Array) -> Array:
            return self.product(lhs, rhs, *args, **kwargs)

        what = (self.product, args, sorted(kwargs.items()))
        call = _Call(self.path, function, (_struct(lhs), _struct(rhs)), self.kernel, what)
        self.calls.append(call)
        return function(*call.watch(lhs, rhs))


def _watch_attention(path: str, attention: AdderAttention, calls: list[_Call]) -> None:
    """Notes the products that attention computes itself, when it comes to its last projection."""
    seen: dict[str, Struct] = {}

    def look(role: str) -> Callable[..., Any]:
        def call(layer: Any, x: Array) -> Array:
            y = layer(x)
            heads = (attention.num_heads, y.shape[-2], y.shape[-1] // attention.num_heads)
            seen[role] = Struct((*y.shape[:-2], *heads), y.dtype)
            return y

        return call

    def project(layer: Any, x: Array) -> Array:
        query, key, value = (seen[role] for role in ("query", "key", "value"))
        if attention.scores == "dot":  # the others have a product that is recorded
            calls.append(_both(f"{path}.scores", _scores, query, key))
        weights = Struct((*query.shape[:-1], key.shape[-2]), query.dtype)
        calls.append(_both(f"{path}.values", _values, weights, value))
        return layer(x)

    for role in ("query", "key", "value"):
        setattr(attention, role, Watched(getattr(attention, role), look(role)))
    attention.out = Watched(attention.out, project)


def _both(path: str, function: Function, lhs: Struct, rhs: Struct) -> _Call:
    """A product of activations, of which both need a gradient."""
    return _Call(path, function, (lhs, rhs), None, function.__name__, {0, 1})


def _scores(query: Array, key: Array) -> Array:
    return query @ key.swapaxes(-1, -2)


def _values(weights: Array, value: Array) -> Array:
    return weights @ value


def _struct(operand: Array) -> Struct:
    return Struct(operand.shape, operand.dtype)
