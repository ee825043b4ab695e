"""AdderNet's adaptive scaling as an optax transformation, and whole recipes around it.

Adder networks have kernel gradients whose size falls from layer to layer: batch normalisation
divides by the standard deviation of a sum of K distances. AdderNet gives each layer's kernel a step
of the same relative size instead,

    α_l = η √k / ‖∂L/∂F_l‖₂,   k = number of elements of the layer's kernel F_l

(CVPR 2020, eqs. 11-13; η = 0.1 in the paper and 0.2 in its code). Weight decay and momentum come
after it, as in the published code.

Which leaves are adder kernels is found out when a transformation is initialised: from the type of
the variables, if it is given an ``nnx.State`` (``nnx.Optimizer`` does that), or else from ``mask``,
a tree of bools or a function that makes one from the parameters, as in ``optax.masked``;
`jadder.nn.adder_mask` makes it for a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from jadder.nn import AdderKernel

Mask = Any | Callable[[optax.Params], Any]


class AdderKernelState(NamedTuple):
    """Which leaves are adder kernels: a tree of scalar bools, like the parameters."""

    is_adder: Any


def scale_by_adder(eta: float = 0.2, *, mask: Mask | None = None) -> optax.GradientTransformation:
    """Gives every adder kernel's gradient the norm η√k; other leaves pass unchanged.

    g ← η √k g / ‖g‖₂ over the whole kernel, in at least float32. A gradient of zeros stays zeros.

    Args:
      eta: the size of the step, before the learning rate, relative to a kernel of N(0, 1).
      mask: which leaves are adder kernels; None takes it from the variables' types (see the
        module's docstring).

    Returns:
      A ``GradientTransformation``. Its ``init`` raises ValueError if it cannot tell adder kernels,
      or if there are none.

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
    """

    def scale(update: Array, param: Array | None) -> Array:
        del param
        wide = update.astype(jnp.promote_types(update.dtype, jnp.float32))
        largest = jnp.max(jnp.abs(wide))  # dividing by it first, the squares cannot underflow
        wide = wide / jnp.where(largest > 0, largest, 1)
        norm = jnp.linalg.norm(wide.ravel())
        return (eta * update.size**0.5 / jnp.where(norm > 0, norm, 1) * wide).astype(update.dtype)

    return _by_kind("scale_by_adder", mask, adder=scale, other=_unchanged)


def adder_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = 0.9,
    *,
    nesterov: bool = False,
    weight_decay: float = 5e-4,
    eta: float = 0.2,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    """AdderNet's optimizer: adaptive scaling, then weight decay on all parameters, then SGD.

    Args:
      learning_rate: a number, or a function of the step.
      momentum: decay of the momentum, or None for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: added to the gradient as weight_decay · parameter.
      eta: as in `scale_by_adder`.
      mask: which leaves are adder kernels, as in `scale_by_adder`.

    Returns:
      A ``GradientTransformation``.

    Examples:
      >>> from flax import nnx
      >>> from jadder.nn import AdderLinear
      >>> model = AdderLinear(2, 3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, adder_sgd(0.1), wrt=nnx.Param)
    """
    return optax.chain(
        scale_by_adder(eta, mask=mask),
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
    ``adder_learning_rate_multiplier`` times the rate instead.

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

    def enlarge(update: Array, param: Array | None) -> Array:
        del param
        return adder_learning_rate_multiplier * update

    def decay(update: Array, param: Array | None) -> Array:
        if param is None:
            raise ValueError("adder_adamw: update needs the parameters, for the weight decay")
        return update + weight_decay * param

    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        _by_kind("adder_adamw", mask, adder=enlarge, other=decay),
        optax.scale_by_learning_rate(learning_rate),
    )


UpdateLeaf = Callable[[Array, Array | None], Array]


def _by_kind(
    name: str, mask: Mask | None, *, adder: UpdateLeaf, other: UpdateLeaf
) -> optax.GradientTransformation:
    """Updates adder kernels with one function and all else with another."""

    def init(params: optax.Params) -> AdderKernelState:
        return AdderKernelState(_adder_leaves(name, params, mask))

    def update(
        updates: optax.Updates, state: AdderKernelState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdderKernelState]:
        leaves, structure = jax.tree.flatten(updates)
        marks = jax.tree.leaves(state.is_adder)
        values = [None] * len(leaves) if params is None else jax.tree.leaves(params)
        updated = [
            jax.lax.cond(mark, adder, other, leaf, value)
            for leaf, mark, value in zip(leaves, marks, values, strict=True)
        ]
        return jax.tree.unflatten(structure, updated), state

    return optax.GradientTransformation(init, update)


def _unchanged(update: Array, param: Array | None) -> Array:
    del param
    return update


def _adder_leaves(name: str, params: optax.Params, mask: Mask | None) -> Any:
    """A tree of scalar bool arrays like ``params``."""
    if mask is None:
        marks = jax.tree.map(
            lambda leaf: isinstance(leaf, AdderKernel), params, is_leaf=_is_variable
        )
        if not any(jax.tree.leaves(marks)):
            raise ValueError(
                f"{name}: there is no AdderKernel among the parameters. Arrays do not tell what "
                "they are: for a tree of arrays, give mask=jadder.nn.adder_mask(model), or "
                "mask=True if every leaf is an adder kernel"
            )
        return jax.tree.map(jnp.asarray, marks)
    tree = mask(params) if callable(mask) else mask

    def spread(mark: bool, below: Any) -> Any:
        return jax.tree.map(lambda _: jnp.asarray(mark, bool), below, is_leaf=_is_variable)

    return jax.tree.map(spread, tree, params)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
