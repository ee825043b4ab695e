"""Whole models: another product for Flax's layers, another implementation for adder layers."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Initializer

from jadder.adder_kernels import AdderKernel, mark_kernel
from jadder.checks import FLAX_MOMENTUM, describe, missing_normalizations
from jadder.implementations import Implementation, check_implementation
from jadder.models.normalization import BatchNorm, LayerNorm
from jadder.nn import (
    AdderConv,
    AdderConvTranspose,
    AdderLinear,
    EuclidConv,
    EuclidConvTranspose,
    EuclidLinear,
    promote_to_float32,
)
from jadder.products import (
    AdderConvGeneralDilated,
    AdderDotGeneral,
    AdderEinsum,
    AdderProduct,
    MixedProduct,
    adder_products,
)
from jadder.rules import GradientRule, check_rule
from jadder.warning import AdderWarning

Where = Callable[[tuple[Any, ...], nnx.Module], bool]

_PRODUCTS: dict[type[nnx.Module], tuple[str, type[AdderProduct]]] = {
    nnx.Linear: ("dot_general", AdderDotGeneral),
    nnx.LinearGeneral: ("dot_general", AdderDotGeneral),
    nnx.Einsum: ("einsum_op", AdderEinsum),
    nnx.Conv: ("conv_general_dilated", AdderConvGeneralDilated),
    nnx.ConvTranspose: ("conv_general_dilated", AdderConvGeneralDilated),
}
_LAYERS: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.Linear: AdderLinear,
    nnx.Conv: AdderConv,
    nnx.ConvTranspose: AdderConvTranspose,
    EuclidLinear: AdderLinear,
    EuclidConv: AdderConv,
    EuclidConvTranspose: AdderConvTranspose,
}


def adderize(
    model: nnx.Module,
    where: Where | None = None,
    *,
    rule: GradientRule | None = None,
    implementation: Implementation | None = None,
    kernel_init: Initializer | None = None,
    convert_norms: bool = True,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """A copy of ``model`` whose products are adder products.

    ``nnx.Linear``, ``LinearGeneral``, ``Einsum``, ``Conv``, ``ConvTranspose`` and everything made
    of them (``nnx.MultiHeadAttention``'s projections, recurrent cells) change; so do subclasses
    that keep Flax's ``__call__``. Parameters, biases and the rest of the model stay, except for:

    * Flax's normalisations, since adder products lie far from zero, where E[x²] - E[x]², the fast
      variance, has no digits left, and shift so much while they train that running averages must
      follow quickly. ``nnx.BatchNorm`` and ``nnx.LayerNorm`` become `jadder.models.BatchNorm` and
      ``LayerNorm``, with their values, epsilon and dtype; other norms lose ``use_fast_variance``;
      Flax's default momentum of 0.99 becomes 0.9, any other stays. ``convert_norms=False`` leaves
      them alone. The statistics are still those of the model given: train, or call
      `jadder.models.update_statistics`.
    * The results of layers that compute in bfloat16 or float16, which become float32 where the
      layer does not say otherwise (``preferred_element_type``): half precision has no digits left
      either. The normalisation rounds to its ``dtype``. Recurrent cells and
      ``nnx.MultiHeadAttention``, which want one dtype throughout, keep theirs.

    An adder layer without a normalisation after it hardly learns: relu makes -Σ|x - w| zero, and
    gates and softmaxes saturate. Where the structure of the model says so (``nnx.Sequential``,
    recurrent cells, ``nnx.MultiHeadAttention``, no normalisation at all), a `jadder.AdderWarning`
    names the layers; `jadder.check_model` finds the others by running the model. To train the copy
    from scratch, give ``kernel_init`` and ``rngs``: adder kernels want to be of the inputs' size.

    Args:
      model: any NNX module, abstract ones included; it is not changed.
      where: ``where(path, layer)`` says whether a layer changes; default every layer. The path is
        empty if the model itself is the layer.
      rule: how the products differentiate; None: `jadder.ADDERNET`, and layers that are adders
        already keep theirs.
      implementation: which kernels compute them, as in `jadder.ops`; None: the best, and layers
        that are adders already keep theirs. See `jadder.set_implementation`.
      kernel_init: draws new kernels for the layers that change, in their dtype; default keep them.
      convert_norms: whether normalisations change.
      rngs: what ``kernel_init`` draws from.

    Raises:
      ValueError: no layer would change, ``kernel_init`` without ``rngs``, or a layer that has no
        adder form.
      TypeError: a rule that is none.

    Warns:
      AdderWarning: adder layers after which no normalisation comes.

    Example:
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> first, last = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
      >>> mlp = nnx.Sequential(first, nnx.BatchNorm(8, rngs=rngs), nnx.relu, last)
      >>> half = adderize(mlp, lambda path, layer: layer.out_features > 1)
      >>> [type(half.layers[i]).__name__ for i in (0, 1, 3)], half.layers[1].momentum
      (['AdderLinear', 'BatchNorm', 'Linear'], 0.9)
    """
    if kernel_init is not None and rngs is None:
        raise ValueError("adderize: kernel_init needs rngs to draw from")
    if rule is not None:
        check_rule("adderize", rule)
    check_implementation("adderize", implementation)
    model = nnx.clone(model)
    options: dict[str, Any] = {"rule": rule, "implementation": implementation}
    chosen = {name: value for name, value in options.items() if value is not None}
    modules: list[tuple[tuple[Any, ...], Any]] = list(nnx.iter_modules(model))
    selected = {}
    for path, layer in modules:
        kind = next((kind for kind in _PRODUCTS if isinstance(layer, kind)), None)
        if kind is not None and _selects(where, path, layer):
            selected[path] = (layer, *_PRODUCTS[kind])
    held = [place for place in adder_products(model) if chosen or place.path in selected]
    held = [place for place in held if place.path in selected or _selects(where, *place[:2])]
    if not selected and not held:
        raise ValueError("adderize: no product of the model was selected; nothing to change")

    of_one_dtype = _inside_of(model, nnx.MultiHeadAttention, nnx.RNNCellBase)
    for path, (layer, name, product) in selected.items():
        _change_class(path, layer)
        setattr(layer, name, product(**chosen))
        if getattr(layer, "dot_general_cls", None) is not None:
            layer.dot_general_cls = None
        if path not in of_one_dtype and not isinstance(layer.kernel, AdderKernel):
            _widen_result(layer)
        if kernel_init is not None and rngs is not None:
            _draw_kernel(layer, kernel_init, rngs)
        mark_kernel(layer)
    for _, module, name, product in held:
        setattr(module, name, _replace(product, **chosen))
    if convert_norms:
        for _, module in modules:
            _convert_norm(module)
    faults = missing_normalizations(model)
    faults = {path: fault for path, fault in faults.items() if path in selected}
    if faults:
        warnings.warn(f"adderize: {describe(faults)}", AdderWarning, stacklevel=2)
    return model


def set_implementation(model: nnx.Module, implementation: Implementation | None) -> int:
    """Sets which kernels compute a model's adder products, in all of its layers.

    Rules, parameters and shares (`jadder.set_l1_share`) stay. A jitted step compiles anew. A model
    without adder products, like a multiplying twin, stays as it is.

    Args:
      model: any NNX module; it is changed.
      implementation: as in `jadder.ops`; None takes the best.

    Returns:
      How many products there are.

    Raises:
      ValueError: an unknown name. Whether the implementation can do it is seen at the next call.

    Example:
      >>> import jadder
      >>> from flax import nnx
      >>> model = jadder.AdderAttention(2, 4, scores="adder", rngs=nnx.Rngs(0))
      >>> set_implementation(model, "xla")  # four projections and the scores
      5
    """
    check_implementation("set_implementation", implementation)
    places = adder_products(model)
    for _, module, name, product in places:
        setattr(module, name, _replace(product, implementation=implementation))
    return len(places)


def _selects(where: Where | None, path: tuple[Any, ...], layer: nnx.Module) -> bool:
    if where is None:
        return True
    try:
        return bool(where(path, layer))
    except IndexError as error:
        if path:
            raise
        raise ValueError(
            "adderize: the model itself is a layer, for which where(path, layer) was called with "
            f"the empty path () and raised IndexError ({error}); a condition like "
            "`'head' not in path` holds for every path"
        ) from error


def _inside_of(model: nnx.Module, *kinds: type[nnx.Module]) -> set[tuple[Any, ...]]:
    """The paths of all modules inside of one of those kinds."""
    paths = {tuple(path): module for path, module in nnx.iter_modules(model)}
    outer = [path for path, module in paths.items() if isinstance(module, kinds)]
    return {path for path in paths if any(path[: len(other)] == other for other in outer)}


def _change_class(path: tuple[Any, ...], layer: nnx.Module) -> None:
    """Makes a layer of Flax one of this package, which a mask or a transposed product needs."""
    if type(layer) in _LAYERS:
        object.__setattr__(layer, "__class__", _LAYERS[type(layer)])
    own = isinstance(layer, tuple(_LAYERS.values()))
    transposed = isinstance(layer, nnx.ConvTranspose)
    masked = isinstance(layer, nnx.Conv) and layer.mask is not None
    if not own and (transposed or masked):
        kind, reason = ("ConvTranspose", "product") if transposed else ("Conv", "mask")
        verb = "replaced" if transposed else "taken over"
        raise ValueError(
            f"adderize: {type(layer).__name__} at {'/'.join(map(str, path))} is a subclass of "
            f"nnx.{kind}, whose {reason} cannot be {verb}; leave it out with `where`"
        )


def _replace(product: Any, **chosen: Any) -> Any:
    """An adder product with another rule or implementation, at the share that it has."""
    if isinstance(product, MixedProduct):
        return dataclasses.replace(product, adder=_replace(product.adder, **chosen))
    return dataclasses.replace(product, **chosen)


def _widen_result(layer: Any) -> None:
    dtype = jnp.dtype(layer.kernel.dtype if layer.dtype is None else layer.dtype)
    if layer.preferred_element_type is None and jnp.promote_types(dtype, jnp.float32) != dtype:
        layer.preferred_element_type = jnp.promote_types(dtype, jnp.float32)


def _draw_kernel(layer: Any, kernel_init: Initializer, rngs: nnx.Rngs) -> None:
    old = layer.kernel.get_value()
    if not isinstance(old, jax.ShapeDtypeStruct):  # of an abstract kernel nothing can be drawn
        layer.kernel[...] = kernel_init(rngs.params(), old.shape, old.dtype)


def _convert_norm(layer: Any) -> None:
    """Gives a normalisation of Flax the arithmetic of `jadder.models`, values and epsilon kept."""
    kind = type(layer)
    if isinstance(layer, BatchNorm | LayerNorm) or not hasattr(layer, "use_fast_variance"):
        return
    layer.use_fast_variance = False
    if isinstance(layer, nnx.BatchNorm) and layer.momentum == FLAX_MOMENTUM:
        layer.momentum = 0.9
    if layer.promote_dtype is dtypes.promote_dtype:
        layer.promote_dtype = promote_to_float32
    if kind is nnx.BatchNorm:
        layer.center_features = False
        object.__setattr__(layer, "__class__", BatchNorm)
    elif kind is nnx.LayerNorm:
        object.__setattr__(layer, "__class__", LayerNorm)
