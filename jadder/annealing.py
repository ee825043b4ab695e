"""Adder products on their way from Euclid's distance: an easier beginning for a network's training.

The squared distance has gradients that know how far x is from w, the adder's hardly more than on
which side of it. A network that begins with the one and ends with the other needs, once trained,
what any adder network needs.
"""

import math

from flax import nnx

from jadder.products import MixedProduct as MixedProduct
from jadder.products import adder_products


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
    places = adder_products(model)
    if not places:
        raise ValueError("set_l1_share: the model has no adder products")
    for _, module, attribute, product in places:
        adder = product.adder if isinstance(product, MixedProduct) else product
        setattr(module, attribute, adder if l1_share == 1 else MixedProduct(adder, l1_share))
