"""What an adder layer needs around it, and whether a model has it.

An adder product is a sum of one sign: it lies far from zero, in a trained ResNet-20 at -2600 with a
standard deviation of 4. Only a normalisation that takes the mean away makes something of it that a
ReLU, a softmax or another product can use. Without one nothing crashes: the network is at chance.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jadder.nn import MaskedConv
from jadder.products import Place, distance_products

Path = tuple[Any, ...]

_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm)
_PRODUCTS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)
_ACTIVATIONS = (
    *(jax.nn.celu, jax.nn.elu, jax.nn.gelu, jax.nn.glu, jax.nn.hard_sigmoid, jax.nn.hard_silu),
    *(jax.nn.hard_tanh, jax.nn.leaky_relu, jax.nn.log_sigmoid, jax.nn.log_softmax, jax.nn.mish),
    *(jax.nn.relu, jax.nn.relu6, jax.nn.selu, jax.nn.sigmoid, jax.nn.silu, jax.nn.soft_sign),
    *(jax.nn.softmax, jax.nn.softplus, jax.nn.squareplus, jax.nn.tanh, jnp.tanh),
)
FLAX_MOMENTUM = 0.99
_SHARE_KEPT = 0.02  # of the result's spread, that a shift taken away leaves by rounding


def check_model(model: nnx.Module, *inputs: Any, **kwargs: Any) -> dict[str, str]:
    """Runs a model once for each of its adder layers, to see whether they have what they need.

    A layer needs a normalisation after it that takes its mean away. Whether there is one is seen,
    whatever the model is made of, by adding a constant to the layer's results: the model's must not
    change. Also named are norms with Flax's fast variance, E[x²] - E[x]², or its momentum of 0.99;
    layers that round their results to half precision before a normalisation; and masks that an
    adder product given to ``nnx.Conv`` does not see. Euclid layers need the same.

    Args:
      model: any NNX module with initial or trained values; it is not changed. It runs in training
        mode (statistics of the batch), but without dropout.
      *inputs: what it is called with. Two examples do, of any content like the real one's.
      **kwargs: the same.

    Returns:
      What is missing or wrong, by the path of the layer; nothing for a model that has all it needs.

    Example:
      >>> import jadder, jax
      >>> rngs = nnx.Rngs(0)
      >>> layers = [jadder.AdderLinear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs)]
      >>> x = jax.random.normal(jax.random.key(0), (4, 2))
      >>> check_model(nnx.Sequential(*layers), x)
      {'layers/0': 'no normalisation takes the mean of its results away'}
      >>> layers.insert(1, jadder.models.BatchNorm(8, rngs=rngs))
      >>> check_model(nnx.Sequential(*layers), x)
      {}
    """
    model = nnx.clone(model)
    model.set_attributes(deterministic=True, use_running_average=False, raise_if_not_found=False)
    places = distance_products(model)
    if not places:
        return {}
    faults = _faults_seen(model, places, lambda model: model(*inputs, **kwargs))
    for path, module in nnx.iter_modules(model):
        if getattr(module, "use_fast_variance", False):
            faults.append((path, "use_fast_variance=True has no digits left far from zero"))
        if isinstance(module, nnx.BatchNorm) and module.momentum == FLAX_MOMENTUM:
            faults.append((path, f"momentum={FLAX_MOMENTUM} follows too slowly; 0.9 does not"))
    for path, module, _, _ in places:
        masked = isinstance(module, nnx.Conv) and module.mask is not None
        if masked and not isinstance(module, MaskedConv):
            faults.append((path, "nnx.Conv does not tell the product its mask; AdderConv does"))
    by_path: dict[str, list[str]] = {}
    for path, fault in faults:
        by_path.setdefault(_name(path), []).append(fault)
    return {name: "; ".join(found) for name, found in by_path.items()}


def missing_normalizations(model: nnx.Module) -> dict[Path, str]:
    """Adder and Euclid layers after which no normalisation comes, as far as structure tells.

    Returns:
      What comes after, by the path of the layer. A layer of whose surroundings a custom module or
      function decides is not in it, nor is a model that is one layer, to be put somewhere.
    """
    layers = {place.path: place.module for place in distance_products(model)}
    layers = {path: layer for path, layer in layers.items() if path and hasattr(layer, "kernel")}
    modules = [(tuple(path), module) for path, module in nnx.iter_modules(model)]
    faults: dict[Path, str] = {}
    if not any(isinstance(module, _NORMS) for _, module in modules):
        faults = dict.fromkeys(layers, "the model has no normalisation")
    for path, module in modules:
        inside = [other for other in layers if other[: len(path)] == path]
        if isinstance(module, nnx.RNNCellBase):
            faults |= dict.fromkeys(inside, "gates of a recurrent cell, which saturate, follow")
        elif isinstance(module, nnx.MultiHeadAttention):
            faults |= _attention_faults(path, module)
        elif isinstance(module, nnx.Sequential):
            faults |= _sequential_faults(path, module)
    return {path: fault for path, fault in faults.items() if path in layers}


def describe(faults: Mapping[Path, str]) -> str:
    """One warning's text."""
    listed = "".join(f"\n  {_name(path)}: {fault}" for path, fault in faults.items())
    return (
        "no normalisation comes after these layers. Sums of distances lie far from zero, and what "
        "follows them hardly learns: put a jadder.models.BatchNorm or LayerNorm after each "
        f"(jadder.AdderAttention has them), or leave layers out with `where`.{listed}"
    )


def _attention_faults(path: Path, attention: nnx.MultiHeadAttention) -> dict[Path, str]:
    faults = {"value": "a weighted sum and the next projection follow"}
    if not attention.normalize_qk:
        faults |= dict.fromkeys(
            ("query", "key"), "scores and their softmax, which saturates, follow"
        )
    return {(*path, name): fault for name, fault in faults.items()}


def _sequential_faults(path: Path, sequential: nnx.Sequential) -> dict[Path, str]:
    chain = list(_flatten(path, sequential))
    faults = {}
    for index, (place, _) in enumerate(chain):
        for _, after in chain[index + 1 :]:
            if isinstance(after, nnx.Dropout):
                continue
            if isinstance(after, (*_PRODUCTS, nnx.RMSNorm)):
                faults[place] = f"{type(after).__name__} follows"
            elif any(after is activation for activation in _ACTIVATIONS):
                faults[place] = f"{after.__name__} follows"
            break
        else:
            if not path:
                faults[place] = "nothing follows"
    return faults


def _flatten(path: Path, sequential: nnx.Sequential) -> Iterator[tuple[Path, Any]]:
    for index, layer in enumerate(sequential.layers):
        place = (*path, "layers", index)
        if type(layer) is nnx.Sequential:
            yield from _flatten(place, layer)
        else:
            yield place, layer


class _Recorded:
    """A product that notes the dtype of its results."""

    def __init__(self, place: Place, dtypes: dict[Path, Any]) -> None:
        self.place = place
        self.dtypes = dtypes

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        y: Array = self.place.product(*args, **kwargs)
        self.dtypes[self.place.path] = y.dtype
        return y


class _Shifted:
    """A product that adds ``share`` of its results' mean magnitude to all of them."""

    def __init__(self, place: Place, share: Array) -> None:
        self.place = place
        self.share = share

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        y: Array = self.place.product(*args, **kwargs)
        return y + (self.share * jnp.mean(jnp.abs(y), dtype=jnp.float32)).astype(y.dtype)


def _in_float32(model: nnx.Module) -> nnx.Module:
    """A copy that computes in at least float32, where rounding does not pass for a shift."""
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        for name in ("dtype", "preferred_element_type"):
            dtype = getattr(module, name, None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                setattr(module, name, jnp.promote_types(dtype, jnp.float32))
    return model


def _faults_seen(
    model: nnx.Module, places: Sequence[Place], call: Callable[[Any], Any]
) -> list[tuple[Path, str]]:
    """What a run shows: shifts of products that reach the results, and half precision."""
    dtypes: dict[Path, Any] = {}

    def record(model: Any) -> None:
        for place in distance_products(model):
            setattr(place.module, place.attribute, _Recorded(place, dtypes))
        call(model)

    nnx.eval_shape(record, model)
    graphdef, state = nnx.split(_in_float32(model))

    @jax.jit
    def run(state: Any, shares: Array) -> list[Array]:
        model = nnx.merge(graphdef, state)
        for place, share in zip(distance_products(model), shares, strict=True):
            setattr(place.module, place.attribute, _Shifted(place, share))
        leaves = map(jnp.asarray, jax.tree.leaves(call(model)))
        return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def shifted_by(shares: Any) -> list[Any]:
        results = run(state, jnp.asarray(shares, jnp.float32))
        return [np.asarray(result, np.float64) for result in results]

    nothing = shifted_by(np.zeros(len(places)))
    faults = []
    for place, shares in zip(places, np.eye(len(places)), strict=True):
        if any(map(_differ, shifted_by(shares), nothing)):
            faults.append((place.path, "no normalisation takes the mean of its results away"))
        dtype = dtypes.get(place.path, jnp.float32)
        if jnp.promote_types(dtype, jnp.float32) != dtype:
            faults.append((place.path, f"{dtype} results: give preferred_element_type=float32"))
    return faults


def _differ(one: Any, other: Any) -> bool:
    spread = np.abs(other - other.mean()).max(initial=0) + 1e-6 * np.abs(other).max(initial=0)
    return bool(np.abs(one - other).max(initial=0) > _SHARE_KEPT * spread)


def _name(path: Path) -> str:
    return "/".join(map(str, path)) or "the model itself"
