"""Which parameters are adder kernels, and which of their axes number layers.

Everything that treats adder kernels differently asks here: `jadder.optim` with `adder_leaves`,
users with `adder_mask`. There are three ways to know:

- *The type of a variable.* Adder layers keep their kernels in `jadder.nn.AdderKernel` variables,
  which also know the shape of one layer's kernel, so that stacks made by ``nnx.vmap`` and
  ``nnx.scan`` are told from larger layers.
- *The layers of a model.* Flax's own layers can be given an adder product as an argument
  (``dot_general=``, ``einsum_op=``, ``conv_general_dilated=``); their kernels are then ordinary
  parameters, and only who sees the layer knows. `adder_mask` looks at the layers.
- *A tree of bools*, where there are arrays and nothing else.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax
from flax import linen, nnx

from jadder.adder_kernels import (
    AdderKernel,
    Axes,
    Layer,
    Shape,
    has_adder_product,
    layer_of,
    layer_shape,
)

Mask = Any | Callable[[optax.Params], Any]
StackAxes = Any | Callable[[optax.Params], Any]
Path = tuple[str, ...]


class AdderMask:
    """What `adder_mask` returns: a mask that also knows the layers of the kernels it marks.

    Attributes:
      parameters: for the path of each parameter its layer, or None where it is no adder kernel.
    """

    def __init__(self, parameters: Mapping[Path, Layer | None]) -> None:
        self.parameters = dict(parameters)

    def __call__(self, params: Any) -> Any:
        """The bools that tell adder kernels, in a tree like ``params``."""
        if isinstance(params, np.integer | jax.Array) and np.ndim(params) == 0:
            raise ValueError(
                "adder_mask: called with a number in place of parameters. optax.inject_hyperparams "
                "takes every function for a schedule: name this one in its static_args='mask'"
            )
        layers = iter(self.layers(params))
        return jax.tree.map(lambda _: next(layers) is not None, params, is_leaf=_is_parameter)

    def layers(self, params: Any) -> list[Layer | None]:
        """The layer, or None, of each parameter in ``params``.

        Raises:
          ValueError: the model has adder kernels and the tree is not one of its parameters.
        """
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_parameter)
        kernels = [path for path, layer in self.parameters.items() if layer is not None]
        if not kernels:
            return [None] * len(leaves)
        for path, _ in leaves:
            if _names(path) not in self.parameters:
                raise ValueError(
                    "adder_mask: this tree of parameters is not the model's; "
                    f"the model has {'/'.join(min(kernels))}, the tree begins with "
                    f"{jax.tree_util.keystr(leaves[0][0])} and has {jax.tree_util.keystr(path)}"
                )
        return [self.parameters[_names(path)] for path, _ in leaves]


def adder_mask(model: Any, *inputs: Any, **kwargs: Any) -> AdderMask:
    """Marks a model's adder kernels in any tree of its parameters.

    These are the `AdderKernel` variables and the kernels of Flax's layers whose ``dot_general``,
    ``einsum_op`` or ``conv_general_dilated`` is an adder product: a function or an object of
    jadder's, or a ``functools.partial`` of one. A lambda around it is not seen through.

    Args:
      model: an NNX module or a tree of them; the state of one, in which types tell the kernels but
        no layer can be seen; or a Linen module.
      *inputs: for a Linen module, which has no parameters before, what its ``init`` takes after
        the random key: arrays, ``jax.ShapeDtypeStruct``, or anything else.
      **kwargs: the same by name.

    Returns:
      A function from a tree of parameters (an ``nnx.State``, its pure dict, Linen's dict,
      gradients of any of them) to the same tree of bools: the form that optax calls a mask. It
      raises ValueError where the model has adder kernels and the tree has parameters that the
      model has not, as happens when it is nested differently. `jadder.optim` also learns from it
      which axes are stacks of layers.

    Raises:
      ValueError: ``model`` has only arrays, which do not tell what they are, or a Linen module
        comes without inputs or inside an NNX module.

    Example:
      >>> from flax import nnx
      >>> from jadder import AdderLinear
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(AdderLinear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
      >>> mask = adder_mask(model)(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
      >>> mask["layers"][0]["kernel"], mask["layers"][1]["scale"]
      (True, False)

      >>> import jadder, jax.numpy as jnp
      >>> from flax import linen
      >>> dense = linen.Dense(3, dot_general=jadder.adder_dot_general)
      >>> adder_mask(dense, jnp.ones((1, 2)))({"kernel": 0, "bias": 0})
      {'bias': False, 'kernel': True}
    """
    if isinstance(model, linen.Module):
        return AdderMask(_linen_parameters(model, inputs, kwargs))
    if inputs or kwargs:
        raise ValueError("adder_mask: only a Linen module takes inputs")
    return AdderMask(_nnx_parameters(model))


def adder_leaves(
    caller: str, params: Any, mask: Mask | None, stack_axes: StackAxes | None = None
) -> list[Axes | None]:
    """For each leaf of ``params`` the axes that number layers, None where it is no adder kernel.

    Args:
      caller: whose name errors begin with.
      params: variables or arrays, abstract or not; ``optax.MaskedNode`` where they are left out.
      mask: which leaves are adder kernels, as in `jadder.optim.scale_by_adder`.
      stack_axes: which axes number layers, as there.

    Raises:
      ValueError: nothing tells which leaves are adder kernels, the mask marks none, or the axes
        are not the leaf's.
    """
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable)
    count = len(jax.tree.leaves(params))
    if not count:
        return []
    if mask is None:
        model = params if isinstance(params, nnx.Module) else _model_of_nnx_optimizer()
        layers = _layers_by_type(caller, nodes, model)
    elif isinstance(mask, AdderMask):
        layers = _for_each_leaf(params, mask.layers(params), _is_parameter)
    else:
        marks = _marks(caller, params, mask)
        known = _for_each_leaf(params, [layer_of(node) for _, node in nodes], _is_variable)
        layers = [
            (layer or Layer()) if mark else None for mark, layer in zip(marks, known, strict=True)
        ]
    given = _given_stack_axes(params, stack_axes)
    paths = _for_each_leaf(params, [path for path, _ in nodes], _is_variable)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    result: list[Axes | None] = []
    for layer, axes, path, shape in zip(layers, given, paths, shapes, strict=True):
        try:
            result.append(None if layer is None else _choose(layer, axes, shape))
        except ValueError as error:
            raise ValueError(f"{caller}: {jax.tree_util.keystr(path)}: {error}") from None
    return result


def _nnx_parameters(model: Any) -> dict[Path, Layer | None]:
    """The layer, or None, of each variable of NNX modules or states, by its path."""
    paths: dict[int, Path] = {}
    parameters: dict[Path, Layer | None] = {}
    arrays = 0
    for keys, node in nnx.iter_graph(model):
        path = tuple(map(str, keys))
        if isinstance(node, nnx.Variable):
            paths[id(node)] = path
            parameters[path] = layer_of(node)
        elif isinstance(node, nnx.Pytree):  # after its variables
            kernel = vars(node).get("kernel")
            if any(isinstance(value, linen.Module) for value in vars(node).values()):
                raise ValueError(
                    f"adder_mask: {type(node).__name__} at {'/'.join(path)!r} has a Linen module, "
                    "which does not show its layers; give a mask of your own"
                )
            if isinstance(kernel, nnx.Variable) and has_adder_product(node):
                of_kernel = paths[id(kernel)]
                parameters[of_kernel] = parameters[of_kernel] or Layer(layer_shape(node))
        elif isinstance(node, jax.Array | np.ndarray):
            arrays += 1
    if arrays and not parameters:
        raise ValueError(
            "adder_mask: there are only arrays, which do not tell whether they are adder kernels; "
            "expected an NNX module, its state, or a Linen module with its inputs"
        )
    return parameters


def _linen_parameters(
    module: linen.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[Path, Layer | None]:
    """The same for a Linen module, whose layers show themselves while it is initialised."""
    if not inputs and not kwargs:
        raise ValueError(
            f"adder_mask: {type(module).__name__} is a Linen module, which has no parameters "
            "before it is called: give what its init takes, adder_mask(module, inputs)"
        )
    kernels: dict[Path, Layer] = {}

    def look(
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        result = call(*args, **kwargs)
        layer = context.module
        if has_adder_product(layer) and layer.has_variable("params", "kernel"):
            kernel = linen.meta.unbox(layer.get_variable("params", "kernel"))
            kernels[(*layer.path, "kernel")] = Layer(kernel.shape)
        return result

    def init() -> Any:
        with linen.intercept_methods(look):
            return module.lazy_init(jax.random.key(0), *inputs, **kwargs)

    variables = jax.eval_shape(init)
    parameters: dict[Path, Layer | None] = {}
    leaves = jax.tree_util.tree_leaves_with_path(variables, is_leaf=_is_parameter)
    for keys, _ in leaves:
        collection, *path = _names(keys)
        layer = kernels.get(tuple(path)) if collection == "params" else None
        parameters[collection, *path] = layer
        if collection == "params":  # what optimizers get is most often this collection alone
            parameters[tuple(path)] = layer
    return parameters


def _layers_by_type(
    caller: str, nodes: Sequence[tuple[Any, Any]], model: Any
) -> list[Layer | None]:
    """The layer, or None, of each leaf of a tree of variables: those of the model, if known."""
    layers: list[Layer | None] = []
    for path, node in nodes:
        if not isinstance(node, nnx.Variable):
            raise ValueError(
                f"{caller}: there is no AdderKernel to be seen among arrays, as at "
                f"{jax.tree_util.keystr(path) or 'the root'}, which do not tell what they are: "
                "give mask=jadder.nn.adder_mask(model), or mask=True if every leaf is an adder "
                "kernel"
            )
        layers += [layer_of(node)] * len(jax.tree.leaves(node))
    kernels = {} if model is None else _nnx_parameters(model)
    for path, node in nodes:
        unmarked = not isinstance(node, AdderKernel) and jax.tree.leaves(node)
        if unmarked and kernels.get(_names(path)) is not None:
            raise ValueError(
                f"{caller}: {'/'.join(_names(path))} is the kernel of an adder product that was "
                "given to one of Flax's layers, so that its type does not tell: give "
                "mask=jadder.nn.adder_mask(model)"
            )
    return layers


def _model_of_nnx_optimizer() -> Any:
    """The model for which an ``nnx.Optimizer`` is being made further up the stack, or None.

    It hands its transformation the variables alone. Kernels of Flax's layers with an adder product
    are plain ``nnx.Param`` there, and the layers that could tell are nowhere but in its frame. They
    are looked at to refuse such kernels, never to find what is scaled.
    """
    code = inspect.unwrap(nnx.Optimizer.__init__).__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals.get("model")
        frame = frame.f_back
    return None


def _marks(caller: str, params: Any, mask: Mask) -> list[bool]:
    """The mask's bool for each leaf of ``params``."""
    tree = mask(params) if _is_function(mask) else mask
    # A function sees only what optax.masked and its like leave of the parameters.
    part = _is_function(mask) and any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))
    if not part and not any(map(bool, jax.tree.leaves(tree))):
        raise ValueError(
            f"{caller}: the mask marks no adder kernel. For a model that may have none, give "
            "mask=jadder.nn.adder_mask(model), which knows; under optax.inject_hyperparams a "
            "function needs static_args='mask'"
        )
    return _spread(tree, params)


def _given_stack_axes(params: Any, stack_axes: Any) -> list[Any]:
    tree = stack_axes(params) if _is_function(stack_axes) else stack_axes

    def is_leaf(node: Any) -> bool:
        integers = isinstance(node, tuple) and all(isinstance(axis, int) for axis in node)
        return node is None or (integers and not isinstance(node, optax.MaskedNode))

    return _spread(tree, params, is_leaf)


def _choose(layer: Layer, given: Any, shape: Shape) -> Axes:
    """The axes that were given, or else the layer's."""
    if given is None:
        return layer.stack_axes_of(shape)
    axes = (given,) if isinstance(given, int) else tuple(given)
    normalized = sorted(axis % len(shape) for axis in axes if -len(shape) <= axis < len(shape))
    if len(set(normalized)) != len(axes):
        raise ValueError(f"stack_axes must be different axes of the shape {shape}, got {given}")
    return tuple(normalized)


def _spread(tree: Any, params: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """The leaf of ``tree``, a prefix of ``params``, for each leaf of ``params``."""
    values: list[Any] = []

    def extend(value: Any, below: Any) -> None:
        values.extend([value] * len(jax.tree.leaves(below)))

    jax.tree.map(extend, tree, params, is_leaf=is_leaf)
    return values


def _for_each_leaf(params: Any, values: Sequence[Any], is_node: Callable[[Any], bool]) -> list[Any]:
    """``values``, which are those of nodes, for each leaf of ``params``."""
    nodes = jax.tree.leaves(params, is_leaf=is_node)
    pairs: Iterator[tuple[Any, Any]] = zip(nodes, values, strict=True)
    return [value for node, value in pairs for _ in jax.tree.leaves(node)]


def _is_function(tree: Any) -> bool:
    """Not so a tree that can be called, as modules can."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(map(callable, leaves))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, nnx.Variable | linen.meta.AxisMetadata)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _names(path: Sequence[Any]) -> Path:
    """The keys of a tree path, whatever kinds of containers it goes through."""
    return tuple(
        str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))
        for key in path
    )
