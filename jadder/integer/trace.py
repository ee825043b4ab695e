"""From a network's function to the graph of what it computes, by way of its jaxpr.

Parameters are constants then: whatever depends on them alone (a batch norm's factor, say) is
computed while tracing, and only what depends on the images is followed, as far as it is one of
the graph's operations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from jadder.integer.graph import (
    Add,
    Affine,
    Center,
    Clip,
    Flatten,
    Image,
    Node,
    Pool,
    ProductNode,
    Round,
)
from jadder.integer.grid import ROUND_TO_GRID, Grid
from jadder.integer.jaxprs import bind, call_of, layer_of
from jadder.integer.program import Shape

BATCH = 2


class NoIntegerForm(ValueError):
    """A part of a network that an integer program cannot compute."""


def trace(function: Callable[[Array], Array], image_shape: Shape) -> Node:
    """The graph of ``function``, from float images (batch, *image_shape) to its output.

    Raises:
      NoIntegerForm: an operation that has no integer form, with the layer that it is in.
    """
    images = jax.ShapeDtypeStruct((BATCH, *image_shape), jnp.float32)
    closed, result = jax.make_jaxpr(function, return_shape=True)(images)
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise NoIntegerForm("quantize: the network must return one array, its logits")
    shape = _image_shape(images.shape, "the images")
    image = Traced(Image(shape, (), "the images"), images.shape)
    with jax.ensure_compile_time_eval():
        (output,) = _Interpreter().run(closed.jaxpr, closed.consts, [image])
    if not isinstance(output, Traced):
        raise NoIntegerForm("quantize: the network's output does not depend on its images")
    if output.order is not None:
        raise NoIntegerForm("quantize: the network's output is transposed")
    return output.node


@dataclasses.dataclass(frozen=True)
class Traced:
    """A value that depends on the images: a node's elements under some shape.

    Attributes:
      node: what it holds.
      shape: its shape in the network, with the batch.
      order: for each of its elements, which of (batch, *node.shape) in row-major order it is; None
        if they are in that order.
      total: if not None, it is ``total`` times the node's sum over channels.
    """

    node: Node
    shape: tuple[int, ...]
    order: Any = None
    total: float | None = None

    def elements(self) -> Any:
        """``order``, spelt out."""
        if self.order is not None:
            return self.order
        return np.arange(math.prod(self.shape)).reshape(self.shape)

    def moved(self, move: Callable[[Any], Any]) -> "Traced":
        """What is left after a function that moves elements."""
        order = move(self.elements())
        flat = order.ravel()
        straight = flat.size == BATCH * math.prod(self.node.shape) and bool(
            (flat == np.arange(flat.size)).all()
        )
        return Traced(self.node, order.shape, None if straight else order)


class _Interpreter:
    """Evaluates a jaxpr in which some variables are constants and others traced."""

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)

        def read(variable: Any) -> Any:
            literal = isinstance(variable, core.Literal)
            return variable.val if literal else values[variable]

        for equation in jaxpr.eqns:
            operands = [read(variable) for variable in equation.invars]
            results = self.results(equation, operands)
            values |= zip(equation.outvars, results, strict=True)
        return [read(variable) for variable in jaxpr.outvars]

    def results(self, equation: Any, operands: list[Any]) -> list[Any]:
        name = equation.primitive.name
        traced = any(isinstance(each, Traced) for each in operands)
        if traced and equation.params.get("name") == ROUND_TO_GRID:
            return [_round(*operands, layer=layer_of(equation))]
        inner = call_of(equation)
        if inner is not None:
            return self.run(inner.jaxpr, inner.consts, operands)
        if not traced:
            return bind(equation, operands)
        rule = _RULES.get(name)
        context = _Context(name, layer_of(equation), equation)
        if rule is None:
            raise context.refused()
        return [rule(context, *operands)]


@dataclasses.dataclass(frozen=True)
class _Context:
    """One operation of the network while it is read."""

    name: str
    layer: str
    equation: Any

    @property
    def params(self) -> Mapping[str, Any]:
        params: Mapping[str, Any] = self.equation.params
        return params

    def refused(self, why: str = "") -> NoIntegerForm:
        reason = f" {why}" if why else ""
        return NoIntegerForm(
            f"quantize: {self.name!r}{reason} has no integer form; the network computes it in "
            f"{self.layer}"
        )

    def straight(self, x: Any) -> Traced:
        if not isinstance(x, Traced) or x.order is not None or x.total is not None:
            raise self.refused("of reordered values or of sums over channels")
        return x

    def node(self, x: Traced) -> Node:
        """The node whose channels are the last axis of x."""
        shape = _image_shape(x.shape, self.layer)
        if x.node.shape == shape:
            return x.node
        return Flatten(shape, (x.node,), self.layer)


def _image_shape(shape: tuple[int, ...], layer: str) -> Shape:
    """(height, width, channels) of one image's part of a value (batch, ...)."""
    own = list(shape)
    while len(own) > 1 and own[0] == 1 and own[1] % BATCH == 0 and own[0] != BATCH:
        own.pop(0)  # dimensions that a product put before the batch
    if not own or own[0] % BATCH or len(own) > 4:
        raise NoIntegerForm(
            f"quantize: {layer} computes a value of shape {shape}, not (batch, ...)"
        )
    rows = own[0] // BATCH
    own = [rows, *own[1:]] if rows > 1 else own[1:]
    if len(own) > 3:
        raise NoIntegerForm(f"quantize: {layer} computes a value of shape {shape}")
    height, width, channels = (*(1,) * (3 - len(own)), *own)
    return height, width, channels


# -- Arithmetic ------------------------------------------------------------------------------------


def _affine(context: _Context, x: Any, scale: Any, offset: Any) -> Traced:
    """scale · x + offset, for constants of one value, or of one for each channel."""
    if x.total is not None and np.ndim(scale) == 0 and np.all(offset == 0):
        return dataclasses.replace(x, total=x.total * float(scale))
    factors = [_channelwise(context, x, each) for each in (scale, offset)]
    if x.order is not None and all(len(each) == 1 for each in factors):
        straight = _affine(context, dataclasses.replace(x, order=None), scale, offset)
        return dataclasses.replace(straight, order=x.order)
    x = context.straight(x)
    inner = x.node if all(len(each) == 1 for each in factors) else context.node(x)
    channels = inner.shape[2]
    scale, offset = (np.broadcast_to(each, (channels,)) for each in factors)
    if isinstance(inner, Affine):
        scale, offset = scale * inner.scale, scale * inner.offset + offset
        inner = inner.inputs[0]
    return Traced(Affine(inner.shape, (inner,), context.layer, scale, offset), x.shape)


def _channelwise(context: _Context, x: Traced, constant: Any) -> Any:
    """A constant that broadcasts against x, as one value or one for each of its channels."""
    array = np.asarray(constant, np.float64)
    if array.size == 1:
        return array.reshape(1)
    if array.shape[-1] == x.shape[-1] and array.size == x.shape[-1]:
        return array.reshape(-1)
    first = array.reshape(-1, array.shape[-1])[:1]
    if array.shape[-1] == x.shape[-1] and bool((array == first).all()):
        return first.reshape(-1)
    if bool((array == array.flat[0]).all()):
        return array.reshape(-1)[:1]
    raise context.refused(f"with a constant of shape {array.shape}, not one for each channel")


def _add(context: _Context, x: Any, y: Any) -> Traced:
    if not isinstance(x, Traced):
        x, y = y, x
    if not isinstance(y, Traced):
        return _affine(context, x, 1.0, np.asarray(y, np.float64))
    x, y = context.straight(x), context.straight(y)
    if x.shape != y.shape:
        raise context.refused(f"of shapes {x.shape} and {y.shape}")
    nodes = context.node(x), context.node(y)
    return Traced(Add(nodes[0].shape, nodes, context.layer), x.shape)


def _sub(context: _Context, x: Any, y: Any) -> Traced:
    if isinstance(x, Traced) and isinstance(y, Traced) and y.total is not None:
        x = context.straight(x)
        node = context.node(x)
        mean = y.node is node and math.isclose(y.total * node.shape[2], 1, rel_tol=1e-5)
        if not mean:
            raise context.refused("of a sum over channels that is not the value's own mean")
        return Traced(Center(node.shape, (node,), context.layer), x.shape)
    if not isinstance(y, Traced):
        return _affine(context, x, 1.0, -np.asarray(y, np.float64))
    return _add(context, x, _affine(context, y, -1.0, np.zeros(1)))


def _mul(context: _Context, x: Any, y: Any) -> Traced:
    if isinstance(x, Traced) and isinstance(y, Traced):
        raise context.refused("of two values that depend on the images")
    if not isinstance(x, Traced):
        x, y = y, x
    return _affine(context, x, np.asarray(y, np.float64), np.zeros(1))


def _div(context: _Context, x: Any, y: Any) -> Traced:
    if isinstance(y, Traced):
        raise context.refused("by a value that depends on the images")
    return _affine(context, x, 1 / np.asarray(y, np.float64), np.zeros(1))


def _neg(context: _Context, x: Any) -> Traced:
    return _affine(context, x, -1.0, np.zeros(1))


def _max(context: _Context, x: Any, y: Any) -> Traced:
    return _clipped(context, x, y, upper=False)


def _min(context: _Context, x: Any, y: Any) -> Traced:
    return _clipped(context, x, y, upper=True)


def _clamp(context: _Context, low: Any, x: Any, high: Any) -> Traced:
    return _min(context, _max(context, x, low), high)


def _clipped(context: _Context, x: Any, y: Any, *, upper: bool) -> Traced:
    if isinstance(x, Traced) and isinstance(y, Traced):
        raise context.refused("of two values that depend on the images")
    if not isinstance(x, Traced):
        x, y = y, x
    bound = np.asarray(y, np.float64)
    if x.total is not None or not (bound == bound.flat[0]).all():
        raise context.refused("with more than one bound")
    low, high = (-math.inf, float(bound.flat[0])) if upper else (float(bound.flat[0]), math.inf)
    inner = x.node
    if isinstance(inner, Clip):
        low, high = max(low, inner.low), min(high, inner.high)
        inner = inner.inputs[0]
    node = Clip(inner.shape, (inner,), context.layer, low, high)
    return Traced(node, x.shape, x.order)


def _round(x: Any, scale: Any, zero_point: Any, maximum: Any, *, layer: str) -> Traced:
    grid = Grid(float(scale), int(zero_point), int(maximum))
    return Traced(Round(x.node.shape, (x.node,), layer, grid), x.shape, x.order)


# -- Shapes ----------------------------------------------------------------------------------------


def _same(context: _Context, x: Traced) -> Traced:
    return x


def _convert(context: _Context, x: Traced) -> Traced:
    if not jnp.issubdtype(context.params["new_dtype"], jnp.floating):
        raise context.refused(f"to {context.params['new_dtype']}")
    return x


def _reshape(context: _Context, x: Traced, *_: Any) -> Traced:
    return _reshaped(x, context.equation.outvars[0].aval.shape)


def _reshaped(x: Traced, shape: tuple[int, ...]) -> Traced:
    order = None if x.order is None else x.order.reshape(shape)
    return dataclasses.replace(x, shape=tuple(shape), order=order)


def _transpose(context: _Context, x: Traced) -> Traced:
    if x.total is not None:
        raise context.refused("of a sum over channels")
    return x.moved(lambda order: order.transpose(context.params["permutation"]))


def _broadcast(context: _Context, x: Traced, *_: Any) -> Traced:
    shape = context.equation.outvars[0].aval.shape
    if x.total is not None:
        return dataclasses.replace(x, shape=shape)
    if math.prod(shape) != math.prod(x.shape):
        raise context.refused(f"from {x.shape} to {shape}")
    return _reshaped(x, shape)


# -- Sums and pools --------------------------------------------------------------------------------


def _reduce_sum(context: _Context, x: Any) -> Traced:
    x = context.straight(x)
    axes = tuple(context.params["axes"])
    shape = tuple(size for d, size in enumerate(x.shape) if d not in axes)
    if axes == (len(x.shape) - 1,):
        return Traced(context.node(x), shape, None, 1.0)
    return _global_pool(context, x, axes, maximum=False)


def _reduce_max(context: _Context, x: Any) -> Traced:
    return _global_pool(context, context.straight(x), context.params["axes"], maximum=True)


def _global_pool(context: _Context, x: Traced, axes: Any, *, maximum: bool) -> Traced:
    if tuple(axes) != tuple(range(1, len(x.shape) - 1)):
        raise context.refused(f"over axes {tuple(axes)} of {x.shape}")
    node = context.node(x)
    height, width, channels = node.shape
    window = (height, width)
    pooled = Pool(
        (1, 1, channels), (node,), context.layer, maximum, window, window, ((0, 0), (0, 0))
    )
    return Traced(pooled, (x.shape[0], channels))


def _window_sum(context: _Context, x: Any) -> Traced:
    return _window_pool(context, x, maximum=False)


def _window_max(context: _Context, x: Any) -> Traced:
    return _window_pool(context, x, maximum=True)


def _window_pool(context: _Context, x: Any, *, maximum: bool) -> Traced:
    x = context.straight(x)
    params = context.params
    window, strides = params["window_dimensions"], params["window_strides"]
    dilated = any(d != 1 for key in ("base_dilation", "window_dilation") for d in params[key])
    if dilated or len(window) != 4 or {window[0], window[3], strides[0], strides[3]} != {1}:
        raise context.refused(f"over windows {tuple(window)} of {x.shape}")
    padding = params["padding"]
    (top, bottom), (left, right) = ((int(a), int(b)) for a, b in padding[1:3])
    if min(top, bottom, left, right) < 0 or any(side for pair in padding[::3] for side in pair):
        raise context.refused(f"with padding {tuple(padding)}")
    shape = context.equation.outvars[0].aval.shape
    node = Pool(
        tuple(shape[1:]), (context.node(x),), context.layer, maximum,
        (window[1], window[2]), (strides[1], strides[2]), ((top, bottom), (left, right)),
    )  # fmt: skip
    return Traced(node, shape)


# -- Products --------------------------------------------------------------------------------------


def _dot(context: _Context, x: Any, w: Any) -> Traced:
    (contracted, kernel_axes), batched = context.params["dimension_numbers"]
    if not isinstance(x, Traced) or isinstance(w, Traced) or any(batched):
        raise context.refused("of two values that depend on the images, or of a kernel first")
    axes = tuple(range(len(x.shape) - len(contracted), len(x.shape)))
    if tuple(contracted) != axes or tuple(kernel_axes) != tuple(range(len(kernel_axes))):
        raise context.refused(f"over axes {tuple(contracted)}")
    depth = math.prod(x.shape[len(x.shape) - len(contracted) :])
    kernel = np.asarray(w, np.float32).reshape(depth, -1)
    rows = _reshaped(x, (*x.shape[: len(x.shape) - len(contracted)], depth))
    return _linear(context, rows, kernel, context.equation.outvars[0].aval.shape, "multiply")


def _linear(
    context: _Context, x: Traced, kernel: Any, shape: tuple[int, ...], product: Any
) -> Traced:
    """A product of the last axis, whatever the order in which x has its elements."""
    if x.total is not None:
        raise context.refused("of a sum over channels")
    if x.order is None:
        node = context.node(x)
    else:
        node, kernel = _in_order(context, x, kernel)
    height, width, _ = node.shape
    product_node = ProductNode(
        (height, width, kernel.shape[1]), (node,), context.layer, product, kernel[None, None]
    )
    return Traced(product_node, shape)


def _in_order(context: _Context, x: Traced, kernel: Any) -> tuple[Node, Any]:
    """Of a flattened image the elements in their own order, and the kernel's rows likewise."""
    size = math.prod(x.node.shape)
    order = np.asarray(x.order).reshape(BATCH, -1)
    permutation = order[0]
    whole = order.shape[1] == size and x.shape[-1] == size
    if not whole or (order - permutation != np.arange(BATCH)[:, None] * size).any():
        raise context.refused("of reordered values that are not one image's")
    rows = np.empty_like(kernel)
    rows[permutation] = kernel
    return Flatten((1, 1, size), (x.node,), context.layer), rows


def _conv(context: _Context, x: Any, w: Any) -> Traced:
    params = context.params
    if not isinstance(x, Traced) or isinstance(w, Traced):
        raise context.refused("of two values that depend on the images")
    numbers = params["dimension_numbers"]
    rank = len(x.shape) - 2
    last = (0, rank + 1, *range(1, rank + 1))
    if (numbers.lhs_spec, numbers.out_spec) != (last, last):
        raise context.refused("with channels that are not last")
    out, into, *window = numbers.rhs_spec
    kernel = np.asarray(w, np.float32).transpose(*window, into, out)
    if params["batch_group_count"] != 1:
        raise context.refused("with a batch_group_count")
    return _convolution(
        context, x, kernel, "multiply", params["window_strides"], params["padding"],
        params["lhs_dilation"], params["rhs_dilation"], params["feature_group_count"],
    )  # fmt: skip


def _convolution(
    context: _Context,
    x: Any,
    kernel: Any,
    product: Any,
    strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    groups: int,
) -> Traced:
    x = context.straight(x)
    node = context.node(x)
    rank = len(strides)
    if rank > 2 or rank != len(x.shape) - 2:
        raise context.refused(f"of {rank} spatial dimensions")
    if any(d != 1 for d in lhs_dilation) or any(side < 0 for pair in padding for side in pair):
        raise context.refused("with input dilation or negative padding")
    missing = 2 - rank
    ones = (1,) * missing
    sides: Any = (*((0, 0),) * missing, *((int(a), int(b)) for a, b in padding))
    shape = context.equation.outvars[0].aval.shape
    product_node = ProductNode(
        _image_shape(shape, context.layer), (node,), context.layer, product,
        kernel.reshape(*ones, *kernel.shape),
        (*ones, *strides), sides, (*ones, *rhs_dilation), groups,
    )  # fmt: skip
    return Traced(product_node, shape)


def _adder_product(context: _Context, x: Any, w: Any) -> Traced:
    product = context.params["product"]
    if not product.is_adder:
        raise context.refused("of squared differences")
    if not isinstance(x, Traced) or isinstance(w, Traced) or product.mapped:
        raise context.refused("of two values that depend on the images")
    kernel = np.asarray(w, np.float32)
    shape = context.equation.outvars[0].aval.shape
    if product.function == "matmul":
        if kernel.shape[0] != 1:
            raise context.refused("in batches")
        return _linear(context, x, kernel[0], shape, "adder")
    spec = dict(product.options)["spec"]
    return _convolution(
        context, x, kernel, "adder", spec.window_strides, spec.padding, spec.lhs_dilation,
        spec.rhs_dilation, spec.feature_group_count,
    )  # fmt: skip


_RULES: Mapping[str, Callable[..., Traced]] = {
    "add": _add,
    "add_any": _add,
    "adder_product": _adder_product,
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "conv_general_dilated": _conv,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "div": _div,
    "dot_general": _dot,
    "expand_dims": _reshape,
    "max": _max,
    "min": _min,
    "mul": _mul,
    "name": _same,
    "neg": _neg,
    "optimization_barrier": _same,
    "reduce_max": _reduce_max,
    "reduce_sum": _reduce_sum,
    "reduce_window_max": _window_max,
    "reduce_window_sum": _window_sum,
    "reshape": _reshape,
    "reshard": _same,
    "sharding_constraint": _same,
    "squeeze": _reshape,
    "stop_gradient": _same,
    "sub": _sub,
    "transpose": _transpose,
}
