"""AdderNet's adaptive scaling as an optax transformation, and whole recipes around it.

Adder networks have kernel gradients whose size falls from layer to layer: batch normalisation
divides by the standard deviation of a sum of K distances. AdderNet gives each layer's kernel a step
of the same relative size instead,

    α_l = η √k / ‖∂L/∂F_l‖₂,   k = number of elements of the layer's kernel F_l

(CVPR 2020, eqs. 11-13; η = 0.1 in the paper and 0.2 in its code). Weight decay and momentum come
after it, as in the published code.

Which leaves are adder kernels, and which of their axes number layers, is found out when a
transformation is initialised (`jadder.masks` decides it for all of them):

- ``nnx.Optimizer``, or whoever initialises with an ``nnx.State``, needs no ``mask``: the types of
  the variables tell. A model without adder kernels is then trained by the recipe without scaling.
  Kernels of Flax's own layers that were given an adder product (``dot_general=``) are plain
  ``nnx.Param``: ``nnx.Optimizer`` raises and asks for ``mask=jadder.adder_mask(model)``, which
  looks at the layers. A state alone does not show them, so code that calls ``init`` itself on the
  state of such a model must give that mask.
- Arrays do not tell what they are. They need a ``mask``: `jadder.nn.adder_mask` makes it for a
  model in NNX or Linen, or a tree of bools, a prefix of one or a function that makes one, as in
  ``optax.masked``. Such a mask must mark something; that of `jadder.nn.adder_mask` need not.
- In a stack made by ``nnx.vmap``, ``nnx.scan`` or Linen's, each layer has a norm of its own. An
  `jadder.nn.AdderKernel` and `jadder.nn.adder_mask` know the shape of one layer's kernel, and the
  axes from ``transform_metadata`` or else by comparing shapes, leading axes first where several
  would do. With other masks a kernel is one layer unless ``stack_axes`` says otherwise.
- ``optax.inject_hyperparams`` takes every function for a schedule: give it
  ``static_args=("mask", "stack_axes")`` where these are functions, as `jadder.nn.adder_mask` is.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from jadder.adder_kernels import Axes
from jadder.masks import Mask, StackAxes, adder_leaves


class AdderKernelState(NamedTuple):
    """Which leaves are adder kernels: a tree of bools, like the parameters.

    Each is a scalar, or for a stack of layers an array with the kernel's rank whose axes are of
    size 1, except for those that number layers. Without parameters there is a single False.
    """

    is_adder: Any


def scale_by_adder(
    eta: float = 0.2, *, mask: Mask | None = None, stack_axes: StackAxes | None = None
) -> optax.GradientTransformation:
    """Gives every adder kernel's gradient the norm η√k; other leaves pass unchanged.

    g ← η √k g / ‖g‖₂ over the whole kernel of a layer, in at least float32. A gradient of zeros
    stays zeros, and NaN stays NaN. Sharded kernels are taken whole; in a ``jax.shard_map`` a kernel
    is what the function gets of it.

    Args:
      eta: the size of the step, before the learning rate, relative to a kernel of N(0, 1).
      mask: which leaves are adder kernels: `jadder.nn.adder_mask` of the model, a tree of bools
        like the parameters or a prefix of it, True for all, or a function from the parameters to
        such a tree. None takes it from the variables' types (see the module's docstring).
      stack_axes: which axes of a kernel number layers, each with a norm of its own: an integer or a
        tuple of them for all adder kernels, a tree of such with None where nothing is to be said
        (a prefix of the parameters), or a function from the parameters to one. None takes them
        from what `jadder.nn.AdderKernel` and `jadder.nn.adder_mask` know, and from nowhere for
        other masks.

    Returns:
      A ``GradientTransformation``. Its ``init`` raises ValueError if it cannot tell adder kernels,
      if the mask marks none, or if ``stack_axes`` are not a kernel's.

    References:
      Chen et al., `AdderNet: Do We Really Need Multiplications in Deep Learning?
      <https://arxiv.org/abs/1912.13200>`_, 2020

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"adder": jnp.zeros(4), "scale": jnp.zeros(2)}
      >>> tx = scale_by_adder(eta=0.2, mask={"adder": True, "scale": False})
      >>> grads = {"adder": jnp.array([3.0, 0.0, 4.0, 0.0]), "scale": jnp.array([5.0, 5.0])}
      >>> updates, _ = tx.update(grads, tx.init(params))
      >>> [round(float(u), 3) for u in updates["adder"]], updates["scale"].tolist()
      ([0.24, 0.0, 0.32, 0.0], [5.0, 5.0])

      Two layers in one array, of which the second has a gradient a thousand times as small:

      >>> tx = scale_by_adder(eta=1.0, mask=True, stack_axes=0)
      >>> stack = jnp.array([[3.0, 4.0], [0.003, 0.004]])
      >>> updates, _ = tx.update(stack, tx.init(stack))
      >>> [round(float(norm), 3) for norm in jnp.linalg.norm(updates, axis=1)]
      [1.414, 1.414]
    """

    def scale(update: Array, param: Array | None, axes: Axes) -> Array:
        del param
        return _with_norm(eta, update, axes)

    return _by_kind("scale_by_adder", mask, stack_axes, adder=scale, other=_unchanged)


def clip_adder_kernels(
    min: float | None = -0.25, max: float | None = 2.5, *, mask: Mask | None = None
) -> optax.GradientTransformation:
    """Keeps every element of the adder kernels between two bounds; other leaves pass unchanged.

    u ← clip(w + u, min, max) - w. Comes last in a chain, where updates are what is added.

    Adaptive scaling moves kernels by steps of one size whatever happens, so that they diffuse out
    of their inputs' range; there |x - w| does not bend any more, but is ±(x - w) for all x (see
    experiments/kernel_scale.py). An element may come back from just outside of the range at once,
    as the latent weights of binary networks may, which are clipped likewise (Courbariaux et al.,
    2015). For inputs that are not negative and of a normalisation's size, all elements below zero
    are one function, and so are those above every input: the default bounds take little but the
    distance of the way back. With them steps want to be smaller, eta = 0.1; whether a network gains
    by it is told in docs/experiments/recipe.md.

    Args:
      min: lower bound, or None for none.
      max: upper bound, or None for none.
      mask: which leaves are adder kernels, as in `scale_by_adder`.

    Returns:
      A ``GradientTransformation``, whose ``update`` needs the parameters.

    Raises:
      ValueError: bounds that are NaN, or the lower one above the upper one.

    References:
      Courbariaux et al., `BinaryConnect <https://arxiv.org/abs/1511.00363>`_, 2015, section 2.4

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"adder": jnp.array([0.0, 2.0]), "bias": jnp.array([2.0])}
      >>> tx = optax.chain(
      ...     optax.sgd(1.0), clip_adder_kernels(-0.25, 2.5, mask={"adder": True, "bias": False})
      ... )
      >>> grads = {"adder": jnp.array([1.0, -1.0]), "bias": jnp.array([-1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> {name: leaf.tolist() for name, leaf in optax.apply_updates(params, updates).items()}
      {'adder': [-0.25, 2.5], 'bias': [3.0]}
    """
    low: Any = -math.inf if min is None else min
    high: Any = math.inf if max is None else max
    # Numbers that optax.inject_hyperparams hands over are arrays, whose values may change.
    known = not isinstance(low, Array) and not isinstance(high, Array)
    if known and not low <= high:
        raise ValueError(f"clip_adder_kernels: min must be at most max, got {min} and {max}")

    def clip(update: Array, param: Array | None, axes: Axes) -> Array:
        del axes
        if param is None:
            raise ValueError("clip_adder_kernels: update needs the parameters, which it clips")
        return (jnp.clip(param + update, low, high) - param).astype(update.dtype)

    return _by_kind("clip_adder_kernels", mask, None, adder=clip, other=_unchanged)


def adder_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    *,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    eta: float = 0.2,
    mask: Mask | None = None,
    stack_axes: StackAxes | None = None,
) -> optax.GradientTransformation:
    """AdderNet's optimizer: adaptive scaling, then weight decay on all parameters, then SGD.

    Args:
      learning_rate: a number, or a function of the step.
      momentum: decay of the momentum, or None for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: added to the gradient as weight_decay · parameter.
      eta: as in `scale_by_adder`.
      mask: which leaves are adder kernels, as in `scale_by_adder`.
      stack_axes: which axes of a kernel number layers, as in `scale_by_adder`.

    Returns:
      A ``GradientTransformation``.

    Examples:
      >>> from flax import nnx
      >>> from jadder.nn import AdderLinear
      >>> model = AdderLinear(2, 3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, adder_sgd(0.1), wrt=nnx.Param)
    """
    return optax.chain(
        scale_by_adder(eta, mask=mask, stack_axes=stack_axes),
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov),
    )


def adder_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.05,
    adder_learning_rate_multiplier: float = 30.0,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """AdamW for networks with adder kernels, which take larger steps and no weight decay.

    Adam's step does not depend on the gradient's size, so that adaptive scaling before it would
    be void. A step of the learning rate is also small beside a kernel of N(0, 1), where a
    multiplying kernel has a standard deviation of 1/√fan_in: adder kernels take
    ``adder_learning_rate_multiplier`` times the rate instead. Each element has a step of its own,
    so that stacks of layers need no attention.

    Args:
      learning_rate: a number, or a function of the step.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: as in ``optax.adamw``.
      weight_decay: decoupled, on everything but adder kernels.
      adder_learning_rate_multiplier: the rate of adder kernels over that of the others; 30 is the
        best of 10, 30 and 100 in experiments/vit_recipe.py (see experiments/README.md).
      mask: which leaves are adder kernels, as in `scale_by_adder`.

    Returns:
      A ``GradientTransformation``.

    Examples:
      >>> from flax import nnx
      >>> from jadder.nn import AdderLinear
      >>> model = AdderLinear(2, 3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, adder_adamw(1e-3), wrt=nnx.Param)
    """

    def enlarge(update: Array, param: Array | None, axes: Axes) -> Array:
        del param, axes
        return (adder_learning_rate_multiplier * update).astype(update.dtype)

    def decay(update: Array, param: Array | None) -> Array:
        if param is None:
            raise ValueError("adder_adamw: update needs the parameters, for the weight decay")
        return (update + weight_decay * param).astype(update.dtype)

    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        _by_kind("adder_adamw", mask, None, adder=enlarge, other=decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _by_kind(
    name: str,
    mask: Mask | None,
    stack_axes: StackAxes | None,
    *,
    adder: Callable[[Array, Array | None, Axes], Array],
    other: Callable[[Array, Array | None], Array],
) -> optax.GradientTransformation:
    """Updates adder kernels with one function, given a layer's axes, and the rest with another."""

    def init(params: optax.Params) -> AdderKernelState:
        arrays = jax.tree.map(_value, params, is_leaf=_is_variable)
        leaves, structure = jax.tree.flatten(arrays)
        # optax.tree_map_params initialises with an empty placeholder, and takes what is then in
        # its place for copies of the parameters, which marks are not.
        if not leaves:
            return AdderKernelState(jnp.asarray(False))
        kernels = adder_leaves(name, params, mask, stack_axes)
        marks = [_mark(axes, jnp.shape(leaf)) for axes, leaf in zip(kernels, leaves, strict=True)]
        return AdderKernelState(jax.tree.unflatten(structure, marks))

    def update(
        updates: optax.Updates, state: AdderKernelState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdderKernelState]:
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        marks = jax.tree.leaves(state.is_adder)
        values = [None] * len(leaves) if params is None else jax.tree.leaves(params)
        if not len(leaves) == len(marks) == len(values):
            raise ValueError(
                f"{name}: initialised with {len(marks)} parameters, updated with {len(leaves)} "
                f"gradients and {len(values)} parameters"
            )
        updated = [
            leaf if jnp.size(leaf) == 0 else _update_leaf(adder, other, leaf, mark, value)
            for leaf, mark, value in zip(leaves, marks, values, strict=True)
        ]
        return jax.tree.unflatten(structure, updated), state

    return optax.GradientTransformation(init, update)


def _update_leaf(
    adder: Callable[[Array, Array | None, Axes], Array],
    other: Callable[[Array, Array | None], Array],
    update: Array,
    mark: Array,
    param: Array | None,
) -> Array:
    axes = tuple(axis for axis in range(update.ndim) if mark.ndim == 0 or mark.shape[axis] == 1)
    return jax.lax.cond(
        mark.any(), lambda u, p: adder(u, p, axes), lambda u, p: other(u, p), update, param
    )


def _mark(stack_axes: Axes | None, shape: tuple[int, ...]) -> Array:
    """What `AdderKernelState` has for a leaf: its shape tells a layer's axes from a stack's."""
    if stack_axes is None:
        return jnp.asarray(False)
    if not stack_axes:
        return jnp.asarray(True)
    return jnp.ones([n if axis in stack_axes else 1 for axis, n in enumerate(shape)], bool)


def _with_norm(eta: float, update: Array, axes: Axes) -> Array:
    """The update with the norm η√k over these axes, whatever its size."""
    wide = update if update.dtype.itemsize >= 4 else update.astype(jnp.float32)
    # Dividing by the largest first, squares cannot underflow; making that one smaller before,
    # neither can the reciprocal that XLA may turn the division into.
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    fits = largest <= 2.0**64
    wide = jnp.where(fits, wide, wide * 2.0**-64)
    largest = jnp.where(fits, largest, largest * 2.0**-64)
    wide = wide / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(jnp.abs(wide) ** 2, axis=axes, keepdims=True))
    elements = math.prod(update.shape[axis] for axis in axes)
    return (eta * elements**0.5 / jnp.where(norm > 0, norm, 1) * wide).astype(update.dtype)


def _unchanged(update: Array, param: Array | None) -> Array:
    del param
    return update


def _value(node: Any) -> Any:
    return node.get_value() if _is_variable(node) else node


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
