"""What transformers of any family are made of: normalised projections, attention, blocks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from flax import nnx
from jax import Array

from jadder.models.family import FAMILIES, Family, get_family
from jadder.models.normalization import BATCH_NORMS, LayerNorm
from jadder.nn import AdderAttention, AdderLinear, ScaledAdderLinear
from jadder.rules import ADDER_VIT

Norm = Literal["layer", "batch", "centered_batch", "none"]
Scores = Literal["dot", "adder"]
Parts = str | Sequence[str]

BLOCK_PARTS = ("qkv", "out", "mlp_in", "mlp_out")
"""The parts of a block that have products: three projections, the last one, and the MLP's two."""

_NORMS: Mapping[str, Callable[..., nnx.Module]] = {"layer": LayerNorm, **BATCH_NORMS}


class NormalizedProjection(nnx.Module):
    """A family's projection and the normalisation after it.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the result's last axis.
      family: of the projection.
      norm: 'layer', 'batch' (over all tokens of the batch), 'centered_batch' (the same, after each
        token's mean over the features is taken away) or 'none'.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """Which product each part of a transformer has, and what follows it.

    A part that takes the family has the norm after it. The others multiply and have none, whatever
    the norm, as ``nn.Linear`` has none in Adder-ViT. So twins of the same parts and norm have their
    norms in the same places, whatever their families.

    Attributes:
      family: of the parts.
      norm: after each of their products.
      parts: those that take the family.
      types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.
    """

    family: Family
    norm: Norm
    parts: frozenset[str]
    types: Mapping[str, Any]

    def projection(
        self, part: str, in_features: int, out_features: int, *, use_bias: bool = True
    ) -> NormalizedProjection:
        """The projection of a part, which multiplies if it does not take the family."""
        chosen = part in self.parts
        return NormalizedProjection(
            in_features,
            out_features,
            family=self.family if chosen else FAMILIES["conv"],
            norm=self.norm if chosen else "none",
            use_bias=use_bias,
            **self.types,
        )

    def layer_norm(self, features: int) -> LayerNorm:
        """A layer norm that belongs to the network, whatever its products."""
        return LayerNorm(features, **self.types)


def choose_products(
    *,
    family: str | Family,
    norm: Norm | Literal["auto"],
    family_parts: Parts,
    multiply_ends: bool,
    scales: bool,
    kernel_std: float | None,
    known: Sequence[str] = BLOCK_PARTS,
    **types: Any,
) -> Products:
    """Checks and resolves the arguments that transformers share.

    Args:
      family: of the products.
      norm: after each of them; 'auto': 'none' for 'conv', otherwise 'batch'.
      family_parts: a name, names joined by commas, or a sequence of names: parts of ``known``,
        'mlp' for both layers of the MLP, 'all' or 'none'.
      multiply_ends: whether 'embedding' and 'head' multiply.
      scales: whether adder projections have E and F.
      kernel_std: initial standard deviation of projections that do not multiply; None: theirs.
      known: the parts that the model has.
      **types: ``dtype``, ``param_dtype`` and ``rngs`` of the layers.

    Raises:
      ValueError: an unknown family, norm or part, or a standard deviation that is not positive.
    """
    if norm not in ("auto", "none", *_NORMS):
        raise ValueError(
            f"norm must be 'auto', {', '.join(map(repr, _NORMS))} or 'none', got {norm!r}"
        )
    layers = get_family(family)
    if norm == "auto":
        norm = "none" if layers.name == "conv" else "batch"
    parts = _parse_parts(family_parts, known)
    if not multiply_ends:
        parts |= {"embedding", "head"}
    layers = _vary_projections(layers, scales=scales, kernel_std=kernel_std)
    return Products(family=layers, norm=norm, parts=parts, types=types)


def _parse_parts(family_parts: Parts, known: Sequence[str]) -> frozenset[str]:
    names = family_parts.split(",") if isinstance(family_parts, str) else tuple(family_parts)
    groups: dict[str, tuple[str, ...]] = {part: (part,) for part in known}
    groups |= {"mlp": ("mlp_in", "mlp_out"), "all": tuple(known), "none": ()}
    for name in names:
        if name not in groups:
            raise ValueError(f"family_parts must be of {', '.join(groups)}; got {name!r}")
    return frozenset(part for name in names for part in groups[name])


def _vary_projections(family: Family, *, scales: bool, kernel_std: float | None) -> Family:
    """The family with other projections; a multiplying one has nothing that could vary."""
    if kernel_std is not None and not (math.isfinite(kernel_std) and kernel_std > 0):
        raise ValueError(f"kernel_std must be a positive number, got {kernel_std}")
    if family.projection_class is ScaledAdderLinear and not scales:
        rule = family.rule or ADDER_VIT
        family = dataclasses.replace(family, projection_class=AdderLinear, rule=rule)
    if family.projection_class is not nnx.Linear and kernel_std is not None:
        init = nnx.initializers.normal(kernel_std)
        family = dataclasses.replace(family, linear_init=init)
    return family


class Attention(AdderAttention):
    """`jadder.nn.AdderAttention` with projections of any family, which have no bias.

    Args:
      num_heads: heads that share the features.
      features: size of the last axis of the input and of the result.
      head_features: size of a head; None: features / num_heads.
      products: of the projections: 'qkv' and 'out'.
      project_out: whether there is a last projection. Without it, the heads are the result.
      scores: 'dot' or 'adder'.
      identity: whether each token's own value is added to its sum of values.

    Raises:
      ValueError: features that the heads do not divide, or heads that do not make up the result.
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        head_features: int | None = None,
        *,
        products: Products,
        project_out: bool = True,
        scores: Scores = "dot",
        identity: bool = False,
    ) -> None:
        qkv_features = features if head_features is None else num_heads * head_features
        if not project_out and qkv_features != features:
            raise ValueError(
                f"project_out=False needs heads of {features} features together, got "
                f"{num_heads} of {head_features}"
            )

        def projection(part: str) -> Callable[..., nnx.Module]:
            def make(into: int, out: int, *, rngs: nnx.Rngs) -> nnx.Module:
                del rngs  # the products have them
                return products.projection(part, into, out, use_bias=False)

            return make

        def nothing(into: int, out: int, *, rngs: nnx.Rngs) -> nnx.Module:
            del into, out, rngs
            return nnx.Sequential()

        super().__init__(
            num_heads,
            features,
            qkv_features,
            scores=scores,
            identity=identity,
            projection=projection("qkv"),
            out_projection=projection("out") if project_out else nothing,
            rule=products.family.rule or ADDER_VIT,
            implementation=products.family.implementation,
            rngs=products.types["rngs"],
        )


class Block(nnx.Module):
    """Layer norm and attention, then layer norm and MLP with GELU, each added to its input.

    Args:
      features: size of the tokens.
      mlp_features: size of the MLP's hidden layer.
      attention: module from (..., features) to the same shape.
      products: of the MLP: 'mlp_in' and 'mlp_out'.
      mlp_layers: 2; with 1, the MLP is one product from tokens to tokens ('mlp_out') without GELU.

    Raises:
      ValueError: neither one nor two layers.
    """

    def __init__(
        self,
        features: int,
        mlp_features: int,
        *,
        attention: Callable[[Array], Array],
        products: Products,
        mlp_layers: int = 2,
    ) -> None:
        if mlp_layers not in (1, 2):
            raise ValueError(f"mlp_layers must be 1 or 2, got {mlp_layers!r}")
        hidden = features if mlp_layers == 1 else mlp_features
        self.attention_norm = products.layer_norm(features)
        self.attention = attention
        self.mlp_norm = products.layer_norm(features)
        self.mlp_in: NormalizedProjection | None = nnx.data(None)
        if mlp_layers == 2:
            self.mlp_in = products.projection("mlp_in", features, hidden)
        self.mlp_out = products.projection("mlp_out", hidden, features)

    def __call__(self, x: Array) -> Array:
        """(..., features) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        hidden = self.mlp_norm(x)
        if self.mlp_in is not None:
            hidden = jax.nn.gelu(self.mlp_in(hidden), approximate=False)
        return x + self.mlp_out(hidden)


def cut_patches(x: Array, size: int) -> Array:
    """(batch, height, width, channels) to (batch, rows, columns, size · size · channels).

    Patch (i, j) has the pixels from row size · i and column size · j on, row by row.
    """
    batch, height, width, channels = x.shape
    grid = x.reshape(batch, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, height // size, width // size, -1)


def check_patches(shape: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of images of that shape.

    Raises:
      ValueError: a patch size that does not divide the sides.
    """
    if patch_size < 1 or any(side % patch_size for side in shape):
        raise ValueError(f"patch_size ({patch_size}) must divide the image's sides {shape}")
    return shape[0] // patch_size, shape[1] // patch_size
