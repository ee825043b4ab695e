"""AdderViT: SimpleViT (Beyer et al., 2022) as the Adder-ViT repository builds it, for any family."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family, end_family, get_family
from jadder.models.images import check_images, image_shape
from jadder.models.normalization import BatchNorm, LayerNorm

Norm = Literal["layer", "batch", "none"]
_NORMS = {"layer": LayerNorm, "batch": BatchNorm}


def sincos_position_embedding(height: int, width: int, features: int) -> np.ndarray:
    """Fixed 2-D position embedding, (height · width, features), float64.

    With ω_i = 10000^(-i / (features / 4 - 1)), the token at (row, column) gets
    sin(ω · column), cos(ω · column), sin(ω · row), cos(ω · row), in this order.

    Raises:
      ValueError: ``features`` is not a multiple of 4.

    Example:
      >>> sincos_position_embedding(1, 2, 8)[:, :2].round(4).tolist()
      [[0.0, 0.0], [0.8415, 0.0001]]
    """
    if features % 4 or features < 4:
        raise ValueError(f"position embeddings need a multiple of 4 features, got {features}")
    frequencies = 10000.0 ** -np.linspace(0, 1, features // 4)
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = [positions[:, None] * frequencies for positions in (columns, rows)]
    return np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)


class NormalizedProjection(nnx.Module):
    """A family's projection and the normalisation after it.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the result's last axis.
      family: of the projection.
      norm: 'layer', 'batch' (over all tokens of the batch) or 'none'.
      use_bias: whether the projection has a bias.
      **types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        family: Family,
        norm: Norm,
        use_bias: bool = True,
        **types: Any,
    ) -> None:
        self.product = family.projection(in_features, out_features, use_bias=use_bias, **types)
        self.norm = nnx.data(None if norm == "none" else _NORMS[norm](out_features, **types))
        self.dtype = types.get("dtype")

    def __call__(self, x: Array) -> Array:
        """(..., in_features) to (..., out_features)."""
        y = self.product(x)
        y = y if self.norm is None else self.norm(y)
        return y if self.dtype is None else y.astype(self.dtype)
