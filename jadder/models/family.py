"""Families of layers: what a model's products are made of."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jadder.implementations import Implementation, check_implementation
from jadder.nn import AdderConv, AdderLinear, EuclidConv, EuclidLinear, ScaledAdderLinear
from jadder.rules import GradientRule, check_rule

KAIMING_NORMAL: Initializer = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2 / fan_out), with which the published ResNets start their convolutions."""

PYTORCH_UNIFORM: Initializer = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/√fan_in, 1/√fan_in), with which PyTorch starts layers unless told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The layers that a model is built from. A model names layers, a family says which product.

    Attributes:
      name: 'adder', 'conv' or 'euclid', or your own.
      conv_class: class with the arguments of ``nnx.Conv``.
      linear_class: class with the arguments of ``nnx.Linear``.
      projection_class: class with the arguments of ``nnx.Linear``, for a transformer's
        projections and MLP.
      conv_init: initializer of convolution kernels; None: the class's own.
      linear_init: initializer of linear and projection kernels; None: the class's own.
      rule: gradient rule of every adder product; None: each class's own (``ADDER_VIT`` for
        projections, ``ADDERNET`` elsewhere).
      implementation: which kernels compute the adder products, as in `jadder.ops`; None: the best
        for the platform.

    Raises:
      ValueError: a rule or implementation for classes that take none, or an unknown one.
      TypeError: a rule that is none.

    Example:
      >>> import dataclasses, jadder
      >>> sign = dataclasses.replace(get_family("adder"), rule=jadder.SIGN)
      >>> sign.conv(3, 16, (3, 3), rngs=nnx.Rngs(0)).kernel.shape
      (3, 3, 3, 16)
    """

    name: str
    conv_class: type[Any]
    linear_class: type[Any]
    projection_class: type[Any]
    conv_init: Initializer | None = None
    linear_init: Initializer | None = None
    rule: GradientRule | None = None
    implementation: Implementation | None = None

    def __post_init__(self) -> None:
        if self.rule is not None:
            check_rule(f"family {self.name!r}", self.rule)
        check_implementation(f"family {self.name!r}", self.implementation)
        chosen = {"rule": self.rule, "implementation": self.implementation}
        for option, value in chosen.items():
            for layer in (self.conv_class, self.linear_class, self.projection_class):
                if value is not None and option not in inspect.signature(layer.__init__).parameters:
                    raise ValueError(
                        f"family {self.name!r}: {layer.__name__} takes no {option}, got {value!r}"
                    )

    def conv(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, ...],
        strides: int = 1,
        *,
        use_bias: bool = False,
        **options: Any,
    ) -> Any:
        """A convolution, without bias by default; ``options`` are those of ``nnx.Conv``."""
        options = self._options(self.conv_init, **options)
        return self.conv_class(
            in_features, out_features, kernel_size, strides, use_bias=use_bias, **options
        )

    def linear(
        self, in_features: int, out_features: int, *, use_bias: bool = False, **options: Any
    ) -> Any:
        """A linear layer, without bias by default; ``options`` are those of ``nnx.Linear``."""
        options = self._options(self.linear_init, **options)
        return self.linear_class(in_features, out_features, use_bias=use_bias, **options)

    def projection(
        self, in_features: int, out_features: int, *, use_bias: bool = True, **options: Any
    ) -> Any:
        """A transformer's linear layer, with bias by default; ``options`` as for ``linear``."""
        options = self._options(self.linear_init, **options)
        return self.projection_class(in_features, out_features, use_bias=use_bias, **options)

    def _options(
        self, kernel_init: Initializer | None, *, dtype: Dtype | None = None, **options: Any
    ) -> dict[str, Any]:
        chosen = {
            "kernel_init": kernel_init,
            "rule": self.rule,
            "implementation": self.implementation,
        }
        options = {key: value for key, value in chosen.items() if value is not None} | options
        # An adder product lies far from zero, where half precision has no digits left: it is
        # rounded to dtype by the normalisation that follows, not before.
        wide = None if dtype is None else jnp.promote_types(dtype, jnp.float32)
        return options | {"dtype": dtype, "preferred_element_type": wide}


FAMILIES: Mapping[str, Family] = {
    "adder": Family(
        name="adder",
        conv_class=AdderConv,
        linear_class=AdderLinear,
        projection_class=ScaledAdderLinear,
    ),
    "conv": Family(
        name="conv",
        conv_class=nnx.Conv,
        linear_class=nnx.Linear,
        projection_class=nnx.Linear,
        conv_init=KAIMING_NORMAL,
        linear_init=PYTORCH_UNIFORM,
    ),
    "euclid": Family(
        name="euclid",
        conv_class=EuclidConv,
        linear_class=EuclidLinear,
        projection_class=EuclidLinear,
    ),
}
"""The families by name, which are adders, their multiplying twin, and Euclidean distances."""


def get_family(family: str | Family) -> Family:
    """The family of that name; a ``Family`` is returned as it is.

    Raises:
      ValueError: an unknown name.

    Example:
      >>> get_family("conv").conv_class.__name__
      'Conv'
    """
    if isinstance(family, Family):
        return family
    try:
        return FAMILIES[family]
    except (KeyError, TypeError):
        raise ValueError(
            f"unknown family {family!r}; the families are {', '.join(sorted(FAMILIES))}"
        ) from None


def end_family(family: Family, *, multiply_ends: bool) -> Family:
    """The family of a model's first and last product: 'conv', or ``family`` if they add too."""
    return FAMILIES["conv"] if multiply_ends else family
