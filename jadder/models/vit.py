"""AdderViT: SimpleViT (Beyer et al., 2022) as the Adder-ViT repository builds it."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family, end_family, get_family
from jadder.models.images import check_images, image_shape
from jadder.models.normalization import BatchNorm, LayerNorm
from jadder.nn import AdderAttention
from jadder.rules import ADDER_VIT

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
        y: Array = self.product(x)
        y = y if self.norm is None else self.norm(y)
        return y if self.dtype is None else y.astype(self.dtype)


class Attention(AdderAttention):
    """`jadder.nn.AdderAttention` with projections of any family.

    Args:
      num_heads: heads that share the features.
      features: size of the last axis of the input and of the result.
      family: of the four projections, which have no bias.
      norm: what follows each projection.
      multiply_out: whether the last projection multiplies whatever the family, without norm.
      scores: 'dot' or 'adder'.
      identity: whether each token's own value is added to its sum of values.
      **types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        *,
        family: Family,
        norm: Norm,
        multiply_out: bool = False,
        scores: Literal["dot", "adder"] = "dot",
        identity: bool = False,
        **types: Any,
    ) -> None:
        def projection(
            into: int, out: int, *, family: Family = family, norm: Norm = norm, rngs: nnx.Rngs
        ) -> NormalizedProjection:
            del rngs  # one of ``types``
            return NormalizedProjection(
                into, out, family=family, norm=norm, use_bias=False, **types
            )

        multiplying = functools.partial(projection, family=get_family("conv"), norm="none")
        super().__init__(
            num_heads,
            features,
            scores=scores,
            identity=identity,
            projection=projection,
            out_projection=multiplying if multiply_out else projection,
            rule=family.rule or ADDER_VIT,
            implementation=family.implementation,
            rngs=types["rngs"],
        )


class EncoderBlock(nnx.Module):
    """Layer norm and attention, then layer norm and MLP with GELU, each added to its input.

    Args:
      features: size of the tokens.
      num_heads: heads of the attention.
      mlp_features: size of the hidden layer.
      family: of the projections and the MLP.
      norm: what follows each of their products.
      attention: the remaining arguments of ``Attention``.
      **types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_features: int,
        *,
        family: Family,
        norm: Norm,
        attention: Mapping[str, Any],
        **types: Any,
    ) -> None:
        kind: dict[str, Any] = {"family": family, "norm": norm} | types
        self.attention_norm = LayerNorm(features, **types)
        self.attention = Attention(num_heads, features, **kind, **attention)
        self.mlp_norm = LayerNorm(features, **types)
        self.mlp_in = NormalizedProjection(features, mlp_features, **kind)
        self.mlp_out = NormalizedProjection(mlp_features, features, **kind)

    def __call__(self, x: Array) -> Array:
        """(batch, tokens, features) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x)), approximate=False))


class AdderViT(nnx.Module):
    """A vision transformer whose projections and MLP are the family's.

    Patches pass through layer norm, linear, layer norm; a fixed sine-cosine position embedding is
    added; pre-norm encoder blocks and a layer norm follow; the mean of the tokens goes to a linear
    head. With family 'adder' a projection is F ⊙ ((E ⊙ x) ⊕ W) + b (`jadder.nn.ScaledAdderLinear`)
    and the rule ``ADDER_VIT``. The defaults are those of Adder-ViT on CIFAR-10: 64 tokens of 128
    features, four blocks of four heads. It enlarges the images to 128 x 128 and takes patches of
    16 x 16, which are the patches of 4 x 4 here; and it multiplies in the attention's last
    projection, as ``multiply_out=True`` does.

    Args:
      num_classes: size of the logits.
      image_size: int or (height, width), multiples of ``patch_size``.
      patch_size: side of a patch.
      channels: channels of the images.
      features: size of the tokens, a multiple of 4 and of ``num_heads``.
      depth: number of encoder blocks.
      num_heads: heads of the attention.
      mlp_features: size of the MLP's hidden layer.
      family: of the projections and the MLP.
      norm: after each of their products: 'layer', 'batch' (over all tokens of the batch), 'none',
        or 'auto': 'none' for the family 'conv', where products need none, otherwise 'layer', as
        published. A fair comparison gives both families the same.
      multiply_ends: whether patch embedding and head multiply whatever the family, as published;
        otherwise they are projections with ``norm`` after them.
      multiply_out: whether the attention's last projection multiplies whatever the family.
      scores: of the attention: 'dot' for q·k / √d, 'adder' for -Σ|q - k| / √d.
      identity: whether each token's own value is added to its sum of values.
      dtype: of the computation; None: that of the parameters and images, promoted.
      param_dtype: of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown family, norm or kind of scores, or sizes that do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = AdderViT(depth=1, family="conv", norm="batch", rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        channels: int = 3,
        features: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_features: int = 128,
        family: str | Family = "adder",
        norm: Norm | Literal["auto"] = "auto",
        multiply_ends: bool = True,
        multiply_out: bool = False,
        scores: Literal["dot", "adder"] = "dot",
        identity: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.image_shape = image_shape(image_size)
        self.patch_size = patch_size
        self.channels = channels
        if patch_size < 1 or any(side % patch_size for side in self.image_shape):
            raise ValueError(
                f"patch_size ({patch_size}) must divide the image's sides {self.image_shape}"
            )
        if features % 4:
            raise ValueError(f"features must be a multiple of 4, got {features}")
        if norm not in ("auto", "none", *_NORMS):
            raise ValueError(f"norm must be 'auto', 'layer', 'batch' or 'none', got {norm!r}")
        layers = get_family(family)
        if norm == "auto":
            norm = "none" if layers.name == "conv" else "layer"

        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        ends: dict[str, Any] = {
            "family": end_family(layers, multiply_ends=multiply_ends),
            "norm": "none" if multiply_ends else norm,
        } | types
        patch_features = patch_size * patch_size * channels
        self.patch_norm = LayerNorm(patch_features, **types)
        self.patch_embedding = NormalizedProjection(patch_features, features, **ends)
        self.embedding_norm = LayerNorm(features, **types)
        attention = {"multiply_out": multiply_out, "scores": scores, "identity": identity}
        self.blocks = nnx.List(
            EncoderBlock(
                features,
                num_heads,
                mlp_features,
                family=layers,
                norm=norm,
                attention=attention,
                **types,
            )
            for _ in range(depth)
        )
        self.encoder_norm = LayerNorm(features, **types)
        self.head = NormalizedProjection(features, num_classes, **ends)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating.
        """
        check_images(images, self.channels, self.image_shape)
        x = self.patch_embedding(self.patch_norm(self._patches(images)))
        x = self.embedding_norm(x)
        rows, columns = (side // self.patch_size for side in self.image_shape)
        x = x + jnp.asarray(sincos_position_embedding(rows, columns, x.shape[-1]), x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.encoder_norm(x).mean(1))

    def _patches(self, images: Array) -> Array:
        """(batch, height, width, channels) to (batch, patches, pixels of a patch), row by row."""
        batch, height, width, _ = images.shape
        size = self.patch_size
        grid = images.reshape(batch, height // size, size, width // size, size, self.channels)
        return grid.swapaxes(2, 3).reshape(batch, -1, size * size * self.channels)
