"""Adder products on their way from Euclid's distance: an easier beginning for a network's training.

The squared distance has gradients that know how far x is from w, the adder's hardly more than on
which side of it. A network that begins with the one and ends with the other needs, once trained,
what any adder network needs.
"""

import dataclasses
import math
from typing import Any

from flax import nnx
from jax import Array

from jadder import ops
from jadder.adder_kernels import AdderOperator
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral, AdderEinsum

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
        y: Array = (0.5 * (1 - self.l1_share)) * _EUCLID[type(self.adder)](*args, **kwargs)
        return y if self.l1_share == 0 else y + self.l1_share * self.adder(*args, **kwargs)


def set_l1_share(model: nnx.Module, l1_share: float) -> None:
    """Sets the distance that a model's adder products compute, in all of its layers.

    Each y = -Σ|x - w| becomes -Σ(l1_share · |x - w| + (1 - l1_share) · (x - w)²/2), which takes a
    matrix product beside the adder's where the share is below 1. Training in stages from 0 to 1 is
    a way from Euclid's distance to the adder's, as the ℓp norm with p from 2 to 1 is in Universal
    Adder Neural Networks (Chen et al., 2021, arXiv:2105.14202); experiments/README.md has what it
    gains. Change the share between steps: a jitted step compiles once for each.

    Args:
      model: any NNX module; it is changed. Its parameters stay.
      l1_share: between 0, squared distances, and 1, the adder products themselves.

    Raises:
      ValueError: a share that is not between 0 and 1, or a model without adder products.

    Example:
      >>> import jadder, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jadder.AdderLinear(1, 1, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
      >>> for l1_share in (0.0, 0.5, 1.0):  # 4²/2, the mean of it and 4, and 4
      ...     set_l1_share(layer, l1_share)
      ...     print(float(layer(jnp.array([4.0]))[0]))
      -8.0
      -6.0
      -4.0
    """
    if not (math.isfinite(l1_share) and 0 <= l1_share <= 1):
        raise ValueError(f"l1_share must be between 0 and 1, got {l1_share}")
    changed = 0
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if not isinstance(value, AdderProduct | MixedProduct):
                continue
            adder = value.adder if isinstance(value, MixedProduct) else value
            setattr(module, name, adder if l1_share == 1 else MixedProduct(adder, l1_share))
            changed += 1
    if not changed:
        raise ValueError("set_l1_share: the model has no adder products")
