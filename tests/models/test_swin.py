"""Swin: windows, shifts, position biases, stages."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jadder
from jadder.models import Swin, create, get_family
from jadder.models.swin import (
    WindowAttention,
    join_windows,
    partition_windows,
    relative_position_index,
    shift_mask,
)
from jadder.models.transformer import choose_products
from jadder.nn import AdderKernel

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4))
quick = settings(max_examples=30, deadline=None)


def small(**options):
    sizes = {
        "image_size": 8,
        "patch_size": 1,
        "features": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "head_features": 8,
        "mlp_ratio": 2,
    }
    return Swin(5, **(sizes | {"rngs": nnx.Rngs(0)} | options))


def abstract(**options):
    return nnx.eval_shape(lambda: small(**options))


def images(batch=3, side=8):
    values = np.random.default_rng(0).normal(size=(batch, side, side, 3))
    return jnp.asarray(values, jnp.float32)


@quick
@given(windows=SIZES, window=SIZES, batch=st.integers(1, 2), features=st.integers(1, 3))
def test_windows_cut_and_joined_are_the_grid(windows, window, batch, features):
    grid = tuple(n * side for n, side in zip(windows, window, strict=True))
    x = np.arange(batch * math.prod(grid) * features).reshape(batch, *grid, features)
    cut = partition_windows(x, window)
    assert cut.shape == (batch, math.prod(windows), math.prod(window), features)
    np.testing.assert_array_equal(join_windows(cut, grid, window), x)
    for number, (i, j) in enumerate(np.ndindex(windows)):
        rows = slice(i * window[0], (i + 1) * window[0])
        columns = slice(j * window[1], (j + 1) * window[1])
        expected = x[:, rows, columns].reshape(batch, -1, features)
        np.testing.assert_array_equal(cut[:, number], expected)


@quick
@given(window=SIZES)
def test_relative_position_index_is_the_literal_one(window):
    index = relative_position_index(window)
    tokens = list(np.ndindex(window))
    offsets = {}
    for i, (row, column) in enumerate(tokens):
        for j, (other_row, other_column) in enumerate(tokens):
            offsets.setdefault(index[i, j], set()).add((row - other_row, column - other_column))
    assert all(len(found) == 1 for found in offsets.values())
    assert sorted(offsets) == list(range((2 * window[0] - 1) * (2 * window[1] - 1)))


@quick
@given(windows=SIZES, window=SIZES, data=st.data())
def test_shift_mask_separates_what_was_not_near(windows, window, data):
    """Tokens of a window see each other if they were less than a window apart in the image."""
    grid = tuple(n * side for n, side in zip(windows, window, strict=True))
    shift = tuple(
        data.draw(st.integers(0, side - 1)) if n > 1 else 0
        for n, side in zip(windows, window, strict=True)
    )
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)[None]
    shifted = np.roll(places, (-shift[0], -shift[1]), (1, 2))
    origins = partition_windows(shifted, window)[0]
    mask = shift_mask(grid, window, shift)
    assert mask.shape == (math.prod(windows), math.prod(window), math.prod(window))
    apart = np.abs(origins[:, :, None] - origins[:, None, :])
    np.testing.assert_array_equal(mask, (apart < np.array(window)).all(-1))


def window_attention(shift):
    products = choose_products(
        family="conv", norm="none", family_parts="all", multiply_ends=True, scales=True,
        kernel_std=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0),
    )  # fmt: skip
    sizes = {"grid": (4, 4), "window": (2, 2), "shift": shift}
    return WindowAttention(1, 2, None, **sizes, products=products, scores="dot", identity=False)


@pytest.mark.parametrize("shift", [(0, 0), (1, 1)])
def test_attention_sees_the_windows_of_the_shifted_grid(shift):
    """A token's result depends on those of its window, without what the shift brought round."""
    attention = window_attention(shift)

    @nnx.jit
    def jacobian(attention, x):
        return jax.jacrev(lambda x: attention(x)[0].sum(-1))(x)[:, :, 0]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
    depends = np.any(jacobian(attention, x) != 0, -1)
    places = list(np.ndindex(4, 4))
    windows = [((row + shift[0]) // 2, (column + shift[1]) // 2) for row, column in places]
    for place, window in zip(places, windows, strict=True):
        for other, its_window in zip(places, windows, strict=True):
            assert depends[(*place, *other)] == (window == its_window)


def test_blocks_shift_in_turns_where_there_is_room():
    model = abstract(image_size=(16, 8), depths=(3, 2), window_size=8)
    blocks = [layer.attention for layer in model.layers if hasattr(layer, "attention")]
    assert [block.shift for block in blocks] == [(0, 0), (4, 0), (0, 0), (0, 0), (0, 0)]
    assert [block.window for block in blocks] == [(8, 8)] * 3 + [(8, 4)] * 2


def test_position_bias_is_added_to_the_scores():
    """A bias of one offset that outweighs all scores: each token takes that neighbour's value."""
    attention = window_attention((0, 0))
    left_to_right = relative_position_index((2, 2))[0, 1]
    attention.position_bias[...] = attention.position_bias[...].at[left_to_right].set(1e4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), jnp.float32)
    values = attention.attention.out(attention.attention.value(x))
    np.testing.assert_allclose(attention(x)[:, :, ::2], values[:, :, 1::2], rtol=1e-4, atol=1e-6)


def test_number_of_parameters_of_swin_t():
    """torchvision's table has 28,288,354 for swin_t, of which attention's biases are not here."""
    swin_t = nnx.eval_shape(
        lambda: Swin(
            1000, image_size=224, patch_size=4, features=96, window_size=7, family="conv",
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(swin_t, nnx.Param)))
    biases = sum(
        4 * features * depth
        for features, depth in zip((96, 192, 384, 768), (2, 2, 6, 2), strict=True)
    )
    assert count == 28_288_354 - biases


def test_defaults_are_adder_vits_sizes():
    model = nnx.eval_shape(lambda: Swin(rngs=nnx.Rngs(0)))
    attentions = [layer.attention for layer in model.layers if hasattr(layer, "attention")]
    assert [a.grid[0] for a in attentions] == [16, 16, 8, 8, *[4] * 6, 2, 2]
    shapes = [a.attention.query.product.kernel.shape for a in attentions]
    assert shapes == [(80, 96)] * 2 + [(160, 192)] * 2 + [(320, 384)] * 6 + [(640, 768)] * 2


def test_shapes_of_every_family(layers):
    assert nnx.eval_shape(lambda: small(family=layers)(images())).shape == (3, 5)
    options = {"family": layers, "multiply_ends": False, "scores": "adder", "identity": True}
    assert nnx.eval_shape(lambda: small(**options)(images())).shape == (3, 5)


def test_training_and_evaluation():
    """Gradients reach every parameter; evaluation treats each image alone."""
    adder = dataclasses.replace(get_family("adder"), implementation="reference")
    model = small(family=adder, norm="batch")

    @nnx.jit
    def train(model, images):
        return nnx.grad(lambda model: (model(images) ** 2).sum())(model)

    for path, gradient in nnx.to_flat_state(train(model, images())):
        assert np.isfinite(gradient[...]).all(), path
        # A normalisation takes away the bias before it.
        assert np.any(gradient[...]) or path[-1] == "bias", path

    model.eval()
    evaluate = nnx.jit(lambda model, images: model(images))
    logits, among_others = evaluate(model, images()), evaluate(model, images().at[1:].set(0))
    np.testing.assert_allclose(among_others[0], logits[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(among_others[1], logits[1])


def test_which_products_add():
    def adder_modules(**options):
        state = nnx.state(abstract(**options), AdderKernel)
        return {path[-3] for path, _ in nnx.to_flat_state(state)}

    qkv, mlp = {"query", "key", "value"}, {"mlp_in", "mlp_out"}
    assert adder_modules() == qkv | mlp | {"out", "reduction"}
    assert adder_modules(family_parts="qkv,mlp") == qkv | mlp
    assert adder_modules(family_parts="merging") == {"reduction"}
    ends = {"patch_embedding", "head"}
    assert adder_modules(family_parts="none", multiply_ends=False) == ends
    assert adder_modules(family="conv") == set()


def test_options_of_the_command_line_are_plain_values():
    options = {"depths": (1,), "num_heads": (2,), "scales": False, "kernel_std": 2.0}
    model = nnx.eval_shape(lambda: create("swin", image_size=8, rngs=nnx.Rngs(0), **options))
    assert type(model.layers[0].mlp_in.product) is jadder.AdderLinear


def test_rule_and_implementation_reach_the_scores():
    family = dataclasses.replace(get_family("adder"), rule=jadder.SIGN, implementation="reference")
    product = abstract(family=family, scores="adder").layers[0].attention.attention.score_product
    assert product.rule == jadder.SIGN
    assert product.implementation == "reference"


def test_bfloat16_keeps_float32_parameters(layers):
    def variables_and_logits():
        model = small(family=layers, norm="batch", dtype=jnp.bfloat16)
        return nnx.state(model), model(images())

    state, logits = nnx.eval_shape(variables_and_logits)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}
    assert str(logits.dtype) == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9, "patch_size": 2}, r"patch_size \(2\) must divide .* \(9, 9\)"),
        ({"image_size": 12, "window_size": 5}, r"window_size \(5\) .* stage 1 has 12 x 12"),
        ({"image_size": (24, 32), "window_size": 8}, r"window_size \(8\) .* stage 2 has 12 x 16"),
        ({"image_size": 7, "window_size": 7}, "even numbers of tokens, but stage 1 of 2 has 7 x 7"),
        ({"window_size": 0}, "window_size must be a positive int, got 0"),
        ({"depths": (2, 2, 2)}, r"got \(2, 2, 2\) and \(1, 2\)"),
        ({"depths": ("2", "1")}, r"depths must be positive ints.*got \('2', '1'\)"),
        ({"depths": (), "num_heads": ()}, "depths must be positive ints"),
        ({"num_heads": (1, 3), "head_features": None}, r"\(16\) must be divisible by num_heads"),
        ({"family_parts": "ffn"}, "mlp_out, merging, mlp, all, none; got 'ffn'"),
        ({"norm": "group"}, "norm must be"),
        ({"scores": "cosine"}, "'dot' or 'adder', got 'cosine'"),
        ({"family": "shift"}, "unknown family 'shift'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        abstract(**options)


def test_images_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(batch, 8, 8, 3\), got \(3, 16, 16, 3\)"):
        abstract()(images(side=16))
