"""AdderViT: SimpleViT (Beyer et al., 2022) as the Adder-ViT repository builds it.

Adder-ViT's README (github.com/MTDoven/Adder-ViT) names variants. Its code has the final one only,
so what a name means is known from one line each. In the arguments of ``AdderViT``, to which all but
multi add ``norm="layer"``, they are:

======== =========================================== ==========================================
name     what the README says                        arguments
======== =========================================== ==========================================
multi    the original multiplication                 family="conv"
qkv      to_qkv adds                                 family_parts="qkv"
1ffn     one adder layer for the two of the MLP      family_parts="mlp", mlp_layers=1
2ffn     two adder layers for the two of the MLP     family_parts="mlp"
adder    AdderNet's operation in MLP and to_qkv      family_parts="qkv,mlp", scales=False, and a
                                                     family with ``rule=ADDERNET``
euclider the L2 distance                             family="euclid", family_parts="qkv,mlp"
wopout   attention without its project_out           family_parts="qkv,mlp", project_out=False
noupdtm  no adaptive learning rate                   family_parts="qkv,mlp"; the optimizer differs
(final)  F ⊙ ((E ⊙ x) ⊕ W + b)                       family_parts="qkv,mlp"
======== =========================================== ==========================================

Our reading, where the README is silent: what a variant does not name multiplies; the one layer of
1ffn has no GELU; adder is without E and F; each adder layer has a layer norm after it, as in the
code; wopout, noupdtm and euclider are the final network otherwise. In the code ``to_out``
multiplies and an adder layer has no bias; the README's has one, and so has the MLP's here, outside
of F. The code's Euclid layer, x · W + Σx² + b, is not the distance that the README states; the
family 'euclid' is.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family
from jadder.models.images import check_images, image_shape
from jadder.models.transformer import (
    Attention,
    Block,
    Norm,
    Parts,
    Scores,
    check_patches,
    choose_products,
    cut_patches,
)


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


class AdderViT(nnx.Module):
    """A vision transformer whose projections and MLP are the family's.

    Patches pass through layer norm, linear, layer norm; a fixed sine-cosine position embedding is
    added; pre-norm encoder blocks and a layer norm follow; the mean of the tokens goes to a linear
    head. With family 'adder' a projection is F ⊙ ((E ⊙ x) ⊕ W) + b (`jadder.nn.ScaledAdderLinear`)
    and the rule ``ADDER_VIT``. The sizes are those of Adder-ViT on CIFAR-10: 64 tokens of 128
    features, four blocks of four heads. It enlarges the images to 128 x 128 and takes patches of
    16 x 16, which are the patches of 4 x 4 here; and it multiplies in the attention's last
    projection, as ``family_parts="qkv,mlp"`` does.

    Args:
      num_classes: size of the logits.
      image_size: int or (height, width), multiples of ``patch_size``.
      patch_size: side of a patch.
      channels: channels of the images.
      features: size of the tokens, a multiple of 4 and of ``num_heads``.
      depth: number of encoder blocks.
      num_heads: heads of the attention.
      mlp_features: size of the MLP's hidden layer.
      mlp_layers: 2; with 1, the MLP is one product from tokens to tokens without GELU.
      family: of the projections and the MLP.
      family_parts: which parts take the family, the others multiply: 'qkv', 'out', 'mlp_in',
        'mlp_out', 'mlp' for both, 'all' or 'none'; several joined by commas, or as a tuple.
      norm: after each product of these parts: 'layer' as published, 'batch' (over all tokens of
        the batch), 'none', or 'auto': 'none' for the family 'conv', where products need none,
        otherwise 'batch', with which adders learn faster (experiments/README.md). A fair
        comparison gives both families the same. Parts that do not take the family have none, as
        published.
      multiply_ends: whether patch embedding and head multiply whatever the family, as published;
        otherwise they are projections with ``norm`` after them.
      scales: whether adder projections have the scales E and F; without, they are -Σ|x - w| + b.
        Other families have none.
      kernel_std: standard deviation of the family's kernels at the start; None: its own, which is 1
        for adders and Euclid distances. A family that multiplies keeps its own.
      project_out: whether attention has its last projection, 'out'.
      scores: of the attention: 'dot' for q·k / √d, 'adder' for -Σ|q - k| / √d.
      identity: whether each token's own value is added to its sum of values.
      dtype: of the computation; None: that of the parameters and images, promoted.
      param_dtype: of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown family, part, norm or kind of scores, or sizes that do not divide.

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
        mlp_layers: int = 2,
        family: str | Family = "adder",
        family_parts: Parts = "all",
        norm: Norm | Literal["auto"] = "auto",
        multiply_ends: bool = True,
        scales: bool = True,
        kernel_std: float | None = None,
        project_out: bool = True,
        scores: Scores = "dot",
        identity: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.image_shape = image_shape(image_size)
        self.channels = channels
        self.patch_size = patch_size
        check_patches(self.image_shape, patch_size)
        if features % 4:
            raise ValueError(f"features must be a multiple of 4, got {features}")
        products = choose_products(
            family=family,
            norm=norm,
            family_parts=family_parts,
            multiply_ends=multiply_ends,
            scales=scales,
            kernel_std=kernel_std,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        attention: dict[str, Any] = {
            "products": products,
            "project_out": project_out,
            "scores": scores,
            "identity": identity,
        }
        patch_features = patch_size * patch_size * channels
        self.patch_norm = products.layer_norm(patch_features)
        self.patch_embedding = products.projection("embedding", patch_features, features)
        self.embedding_norm = products.layer_norm(features)
        self.blocks = nnx.List(
            Block(
                features,
                mlp_features,
                attention=Attention(num_heads, features, **attention),
                products=products,
                mlp_layers=mlp_layers,
            )
            for _ in range(depth)
        )
        self.encoder_norm = products.layer_norm(features)
        self.head = products.projection("head", features, num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating.
        """
        check_images(images, self.channels, self.image_shape)
        patches = cut_patches(images, self.patch_size)
        batch, rows, columns, _ = patches.shape
        x = self.patch_embedding(self.patch_norm(patches.reshape(batch, rows * columns, -1)))
        x = self.embedding_norm(x)
        x = x + jnp.asarray(sincos_position_embedding(rows, columns, x.shape[-1]), x.dtype)[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.encoder_norm(x).mean(1))
