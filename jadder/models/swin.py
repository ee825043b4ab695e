"""Swin: the transformer with shifted windows (Liu et al., 2021, arXiv:2103.14030)."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import Array

from jadder.models.family import Family
from jadder.models.images import check_images, image_shape
from jadder.models.transformer import (
    BLOCK_PARTS,
    Attention,
    Block,
    Norm,
    Parts,
    Products,
    Scores,
    check_patches,
    choose_products,
    cut_patches,
)

Pair = tuple[int, int]
_Grid = TypeVar("_Grid", Array, np.ndarray)


def partition_windows(x: _Grid, window: Pair) -> _Grid:
    """(batch, rows, columns, features) to (batch, windows, tokens of a window, features).

    Windows and the tokens in them are in the order of reading. `join_windows` is the inverse.

    Example:
      >>> import jax.numpy as jnp
      >>> grid = jnp.arange(8).reshape(1, 2, 4, 1)
      >>> partition_windows(grid, (2, 2))[0, :, :, 0].tolist()
      [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    batch, rows, columns, features = x.shape
    high, wide = window
    grid = x.reshape(batch, rows // high, high, columns // wide, wide, features)
    return grid.swapaxes(2, 3).reshape(batch, -1, high * wide, features)


def join_windows(windows: Array, grid: Pair, window: Pair) -> Array:
    """The (batch, rows, columns, features) from which `partition_windows` made these windows."""
    batch, _, _, features = windows.shape
    (rows, columns), (high, wide) = grid, window
    x = windows.reshape(batch, rows // high, columns // wide, high, wide, features)
    return x.swapaxes(2, 3).reshape(batch, rows, columns, features)


def relative_position_index(window: Pair) -> np.ndarray:
    """Where a table of biases has those of two tokens of a window: (tokens, tokens), int.

    Token i at (row_i, column_i) sees token j with the bias of
    (row_i - row_j, column_i - column_j), of which there are (2 high - 1) (2 wide - 1).

    Example:
      >>> relative_position_index((1, 3)).tolist()
      [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    """
    high, wide = window
    rows, columns = np.divmod(np.arange(high * wide), wide)
    by_rows = rows[:, None] - rows + high - 1
    by_columns = columns[:, None] - columns + wide - 1
    return by_rows * (2 * wide - 1) + by_columns


def shift_mask(grid: Pair, window: Pair, shift: Pair) -> np.ndarray:
    """Which tokens may look at each other after a cyclic shift: (windows, tokens, tokens), bool.

    Tokens that the shift brought round from the other edge are in a window with some that were
    never their neighbours; those two groups do not attend to each other.

    Example:
      >>> shift_mask((1, 4), (1, 2), (0, 1))[1].tolist()
      [[True, False], [False, True]]
    """
    rows, columns = (np.arange(side) >= side - by for side, by in zip(grid, shift, strict=True))
    came_round = (2 * rows[:, None] + columns)[None, :, :, None]
    groups = partition_windows(came_round, window)[0, :, :, 0]
    return groups[:, :, None] == groups[:, None, :]


class WindowAttention(nnx.Module):
    """Attention among the tokens of each window, with a learned bias for relative positions.

    Args:
      num_heads: heads that share the features.
      features: size of the tokens.
      head_features: size of a head; None: features / num_heads.
      grid: rows and columns of tokens.
      window: rows and columns of a window, which divide the grid's.
      shift: by how many rows and columns the grid is shifted, cyclically, before it is cut.
      products: of the projections.
      scores: 'dot' or 'adder'.
      identity: whether each token's own value is added to its sum of values.
    """

    def __init__(
        self,
        num_heads: int,
        features: int,
        head_features: int | None,
        *,
        grid: Pair,
        window: Pair,
        shift: Pair,
        products: Products,
        scores: Scores,
        identity: bool,
    ) -> None:
        self.grid = grid
        self.window = window
        self.shift = shift
        self.attention = Attention(
            num_heads, features, head_features, products=products, scores=scores, identity=identity
        )
        positions = (2 * window[0] - 1) * (2 * window[1] - 1)
        init = nnx.initializers.truncated_normal(0.02)
        key, dtype = products.types["rngs"].params(), products.types["param_dtype"]
        self.position_bias = nnx.Param(init(key, (positions, num_heads), dtype))

    def __call__(self, x: Array) -> Array:
        """(batch, rows, columns, features) to the same shape."""
        bias = self.position_bias[...][relative_position_index(self.window)]
        shifted = any(self.shift)
        mask = None
        if shifted:
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
            mask = jnp.asarray(shift_mask(self.grid, self.window, self.shift))[:, None]
        windows = self.attention(
            partition_windows(x, self.window),
            mask=mask,
            bias=jnp.moveaxis(bias, -1, 0).astype(x.dtype),
        )
        x = join_windows(windows, self.grid, self.window)
        return jnp.roll(x, self.shift, (1, 2)) if shifted else x


class PatchMerging(nnx.Module):
    """Layer norm and a projection of each 2 x 2 tokens to one of twice the features.

    Args:
      features: size of the tokens that come in.
      products: of the projection, 'merging', which has no bias.
    """

    def __init__(self, features: int, *, products: Products) -> None:
        self.norm = products.layer_norm(4 * features)
        self.reduction = products.projection("merging", 4 * features, 2 * features, use_bias=False)

    def __call__(self, x: Array) -> Array:
        """(batch, rows, columns, features) to (batch, rows / 2, columns / 2, 2 features)."""
        return self.reduction(self.norm(cut_patches(x, 2)))


class Swin(nnx.Module):
    """The Swin transformer for small images, whose products are the family's.

    Patches pass through linear and layer norm. Then come the stages: pre-norm blocks whose
    attention is among the tokens of a window, with a learned bias for each relative position and
    head; every second block cuts its windows from the grid shifted by half a window. Between
    stages 2 x 2 tokens become one of twice the features. A layer norm, the mean of the tokens and
    a linear head end it. A window is never larger than its grid, and where one window is all there
    is along a side, nothing is shifted along it. There is no stochastic depth.

    Adder-ViT trained a "weakened" Swin on CIFAR-10. Its model file (github.com/MTDoven/Adder-ViT)
    has the features, depths and heads that are the defaults here. Swin-T has 96 features instead
    of 80; heads have 32 features in both, so those of the first stage have 96 together. The image,
    patch and window sizes of its runs are not published (those in the file, patches of 4 and
    windows of 7, need images of 224): patches of 2 and windows of 4 are our choice for 32 x 32.

    The network here is Liu et al.'s without biases in the attention's projections. Adder-ViT's
    differs: one table of biases for all heads, no layer norm before merging and after the
    embedding, one product and norm for query, key and value together, a shift even where there is
    one window. It adds in the embedding, which ``multiply_ends=False`` does together with the
    head, and multiplies in 'out', as ``family_parts="qkv,mlp,merging"`` does.

    Args:
      num_classes: size of the logits.
      image_size: int or (height, width), multiples of ``patch_size`` times 2 for each merging.
      patch_size: side of a patch.
      channels: channels of the images.
      features: size of the tokens of the first stage.
      depths: blocks of each stage.
      num_heads: heads in each stage.
      head_features: size of a head; None: that of the tokens divided by their heads.
      window_size: side of a window. It divides the grid of each stage, where that is larger.
      mlp_ratio: size of the MLP's hidden layer in sizes of the tokens.
      family: of the products.
      family_parts: which parts take the family, the others multiply: 'qkv', 'out', 'mlp_in',
        'mlp_out', 'mlp' for both, 'merging', 'all' or 'none'; several joined by commas, or as a
        tuple.
      norm: after each product of these parts: 'layer', 'batch' (over all tokens of the batch),
        'none', or 'auto': 'none' for the family 'conv', otherwise 'batch'.
      multiply_ends: whether patch embedding and head multiply whatever the family.
      scales: whether adder projections have the scales E and F, as in `AdderViT`.
      kernel_std: standard deviation of the family's kernels at the start, as in `AdderViT`.
      scores: of the attention: 'dot' for q·k / √d, 'adder' for -Σ|q - k| / √d.
      identity: whether each token's own value is added to its sum of values.
      dtype: of the computation; None: that of the parameters and images, promoted.
      param_dtype: of the parameters.
      rngs: source of the initial parameters.

    Raises:
      ValueError: an unknown family, part, norm or kind of scores, or sizes that do not divide.

    Example:
      >>> from flax import nnx
      >>> model = nnx.eval_shape(lambda: Swin(family="conv", rngs=nnx.Rngs(0)))  # shapes only
      >>> model.head.product.kernel.shape
      (640, 10)
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        channels: int = 3,
        features: int = 80,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        head_features: int | None = 32,
        window_size: int = 4,
        mlp_ratio: int = 4,
        family: str | Family = "adder",
        family_parts: Parts = "all",
        norm: Norm | Literal["auto"] = "auto",
        multiply_ends: bool = True,
        scales: bool = True,
        kernel_std: float | None = None,
        scores: Scores = "dot",
        identity: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.image_shape = image_shape(image_size)
        self.patch_size = patch_size
        self.channels = channels
        grids = _grids(self.image_shape, patch_size, window_size, depths, num_heads)
        products = choose_products(
            family=family,
            norm=norm,
            family_parts=family_parts,
            multiply_ends=multiply_ends,
            scales=scales,
            kernel_std=kernel_std,
            known=(*BLOCK_PARTS, "merging"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        patch_features = patch_size * patch_size * channels
        self.patch_embedding = products.projection("embedding", patch_features, features)
        self.embedding_norm = products.layer_norm(features)
        options: dict[str, Any] = {"products": products, "scores": scores, "identity": identity}
        layers: list[nnx.Module] = []
        for grid, depth, heads in zip(grids, depths, num_heads, strict=True):
            if layers:
                layers.append(PatchMerging(features, products=products))
                features *= 2
            for windows in itertools.islice(_alternate(grid, window_size), depth):
                within = WindowAttention(heads, features, head_features, **windows, **options)
                layers.append(
                    Block(features, mlp_ratio * features, attention=within, products=products)
                )
        self.layers = nnx.List(layers)
        self.final_norm = products.layer_norm(features)
        self.head = products.projection("head", features, num_classes)

    def __call__(self, images: Array) -> Array:
        """Logits (batch, num_classes) of images (batch, height, width, channels).

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating.
        """
        check_images(images, self.channels, self.image_shape)
        x = self.embedding_norm(self.patch_embedding(cut_patches(images, self.patch_size)))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final_norm(x).mean((1, 2)))


def _alternate(grid: Pair, window_size: int) -> Any:
    """The arguments of a stage's ``WindowAttention``s: windows as they are, then shifted ones."""
    window = tuple(min(window_size, side) for side in grid)
    half = tuple(w // 2 if side > w else 0 for side, w in zip(grid, window, strict=True))
    return itertools.cycle({"grid": grid, "window": window, "shift": by} for by in ((0, 0), half))


def _grids(
    shape: Pair, patch_size: int, window_size: int, depths: Sequence[int], num_heads: Sequence[int]
) -> list[Pair]:
    """Rows and columns of tokens in each stage, checked.

    Raises:
      ValueError: see ``Swin``.
    """
    for name, numbers in {"depths": depths, "num_heads": num_heads}.items():
        if not numbers or any(not isinstance(n, int) or n < 1 for n in numbers):
            raise ValueError(f"{name} must be positive ints, one for each stage, got {numbers}")
    if len(depths) != len(num_heads):
        raise ValueError(
            f"depths and num_heads must have a number for each stage, got {depths} and {num_heads}"
        )
    if window_size < 1:
        raise ValueError(f"window_size must be a positive int, got {window_size}")
    grids = [check_patches(shape, patch_size)]
    for stage in range(1, len(depths) + 1):
        grid = grids[-1]
        if any(side > window_size and side % window_size for side in grid):
            raise ValueError(
                f"window_size ({window_size}) must divide the tokens of each stage, but stage "
                f"{stage} has {grid[0]} x {grid[1]}"
            )
        if stage < len(depths):
            if any(side % 2 for side in grid):
                raise ValueError(
                    f"merging needs even numbers of tokens, but stage {stage} of {len(depths)} has "
                    f"{grid[0]} x {grid[1]} from images {shape}"
                )
            grids.append((grid[0] // 2, grid[1] // 2))
    return grids
