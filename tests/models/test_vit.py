"""AdderViT: position embedding, layout, options."""

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
from jadder.models import AdderViT, create, get_family
from jadder.models.transformer import cut_patches
from jadder.models.vit import sincos_position_embedding
from jadder.nn import AdderKernel


def small(**options):
    sizes = {"image_size": 8, "features": 8, "depth": 1, "num_heads": 2, "mlp_features": 12}
    return AdderViT(5, **(sizes | {"rngs": nnx.Rngs(0)} | options))


def abstract(**options):
    return nnx.eval_shape(lambda: small(**options))


def images(batch=3, side=8):
    values = np.random.default_rng(0).normal(size=(batch, side, side, 3))
    return jnp.asarray(values, jnp.float32)


def count(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), quarter=st.integers(1, 8))
def test_position_embedding_is_the_literal_formula(height, width, quarter):
    embedding = sincos_position_embedding(height, width, 4 * quarter)
    assert embedding.shape == (height * width, 4 * quarter)
    for token, (row, column) in enumerate(np.ndindex(height, width)):
        for i in range(quarter):
            omega = 10000 ** -(i / max(quarter - 1, 1))
            expected = [
                math.sin(omega * column),
                math.cos(omega * column),
                math.sin(omega * row),
                math.cos(omega * row),
            ]
            np.testing.assert_allclose(embedding[token, i::quarter], expected, atol=1e-12)


@pytest.mark.parametrize("features", [6, 0, 3])
def test_position_embedding_needs_multiples_of_four(features):
    with pytest.raises(ValueError, match=f"multiple of 4 features, got {features}"):
        sincos_position_embedding(2, 2, features)


def test_number_of_parameters_of_adder_vits_network():
    """What the Adder-ViT repository's SimpleViT has with its CIFAR-10 settings, module by module.

    Its patches have 16 · 16 pixels. An adder layer there is W, E, F and a layer norm, without the
    bias of its README's formula, which is here in the MLP.
    """
    model = nnx.eval_shape(
        lambda: AdderViT(image_size=128, patch_size=16, family_parts="qkv,mlp", rngs=nnx.Rngs(0))
    )
    dim, pixels = 128, 16 * 16 * 3
    adder = dim * dim + 2 * dim + 2 * dim
    block = 2 * (2 * dim) + 5 * adder + dim * dim
    embedding = 2 * pixels + (pixels + 1) * dim + 2 * dim
    published = embedding + 4 * block + 2 * dim + (dim + 1) * 10
    assert count(model) == published + 4 * 2 * dim


def shapes(**options):
    state = nnx.to_flat_state(nnx.state(abstract(**options)))
    return {path: leaf.shape for path, leaf in state}


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("family_parts", ["all", "qkv,mlp_in", "out"])
def test_twins_differ_by_the_scales_only(norm, family_parts):
    """Norms are in the same places, which the parts decide and not the family."""
    options = {"norm": norm, "family_parts": family_parts}
    adder, conv, euclid = (shapes(family=name, **options) for name in ("adder", "conv", "euclid"))
    assert {path: adder[path] for path in conv} == conv
    assert euclid == conv
    assert shapes(family="adder", scales=False, **options) == conv
    scales = [path for path in adder if path not in conv]
    assert {path[-1] for path in scales} == {"input_scale", "output_scale"}
    normed = [path for path in conv if path[-2:] == ("norm", "scale")]
    assert len(scales) == 2 * len(normed) > 0
    in_batches = [path for path in conv if path[-2:] == ("norm", "mean")]
    assert len(in_batches) == (len(normed) if norm == "batch" else 0)


def test_scales_have_the_sizes_of_inputs_and_outputs():
    sizes = [math.prod(shape) for path, shape in shapes().items() if path[-1].endswith("_scale")]
    assert sum(sizes) == 4 * (8 + 8) + 2 * (8 + 12)


@pytest.mark.parametrize("norm", ["layer", "batch", "centered_batch"])
def test_logits_and_gradients_are_finite(layers, norm):
    assert_trains(small(family=layers, norm=norm))


@pytest.mark.parametrize(
    "options",
    [
        {"family_parts": "mlp", "mlp_layers": 1, "scales": False},
        {"family_parts": "qkv", "project_out": False, "kernel_std": 0.5},
    ],
)
def test_variants_train(options):
    adder = dataclasses.replace(get_family("adder"), implementation="reference")
    assert_trains(small(family=adder, **options))


def assert_trains(model):
    @nnx.jit
    def gradients(model, images):
        return nnx.value_and_grad(lambda model: (model(images) ** 2).sum())(model)

    loss, grads = gradients(model, images())
    assert np.isfinite(loss)
    for path, gradient in nnx.to_flat_state(grads):
        assert np.isfinite(gradient[...]).all(), path
        assert np.any(gradient[...]) or path[-1] == "bias", path


def test_evaluation_treats_each_image_alone(layers):
    model = small(family=layers, norm="batch")
    model.eval()
    together = logits_of(model, images())
    alone = logits_of(model, images()[:1])
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-4)


def logits_of(model, images):
    return nnx.jit(lambda model, images: model(images))(model, images)


def test_auto_norm_is_batch_norm_where_products_are_distances():
    def norms(**options):
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract(**options)))]
        return sum(path[-2:] == ("norm", "mean") for path in paths)

    assert norms(family="adder") == 6
    assert norms(family="euclid") == 6
    assert norms(family="conv") == 0
    assert norms(family="adder", family_parts="qkv,mlp") == 5
    assert norms(family="adder", family_parts="none") == 0
    assert norms(family="adder", multiply_ends=False) == 8


def adder_modules(**options):
    state = nnx.state(abstract(**options), AdderKernel)
    return {path[-3] for path, _ in nnx.to_flat_state(state)}


QKV = {"query", "key", "value"}
MLP = {"mlp_in", "mlp_out"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, QKV | {"out"} | MLP),
        ({"multiply_ends": False}, QKV | {"out"} | MLP | {"patch_embedding", "head"}),
        ({"family": "conv"}, set()),
        ({"family_parts": "none"}, set()),
        ({"family_parts": ()}, set()),
        ({"family_parts": "qkv"}, QKV),
        ({"family_parts": "out,mlp_in"}, {"out", "mlp_in"}),
        ({"family_parts": ("mlp_out", "qkv")}, QKV | {"mlp_out"}),
        ({"family_parts": "mlp"}, MLP),
        ({"family_parts": "mlp", "mlp_layers": 1}, {"mlp_out"}),
        ({"family_parts": "qkv,mlp", "project_out": False}, QKV | MLP),
        ({"family_parts": "qkv,mlp", "scales": False}, QKV | MLP),
    ],
)
def test_which_products_add(options, expected):
    assert adder_modules(**options) == expected


def test_options_of_the_command_line_are_plain_values():
    options = {"family_parts": "qkv,mlp", "scales": False, "kernel_std": 2.0, "project_out": False}
    model = nnx.eval_shape(lambda: create("vit", image_size=8, rngs=nnx.Rngs(0), **options))
    assert type(model.blocks[0].mlp_in.product) is jadder.AdderLinear


def test_one_layer_has_no_hidden_features_and_no_gelu():
    block = small(mlp_layers=1, family="conv").blocks[0]
    assert block.mlp_in is None
    assert block.mlp_out.product.kernel.shape == (8, 8)
    x = images(batch=1)[..., :1].reshape(1, 8, 8)
    block.attention = lambda tokens: jnp.zeros_like(tokens)
    np.testing.assert_allclose(block(x), x + block.mlp_out(block.mlp_norm(x)), rtol=1e-6)


def test_without_last_projection_the_heads_are_the_result():
    with_projection = small(family="conv", features=8).blocks[0].attention
    without = small(family="conv", features=8, project_out=False).blocks[0].attention
    x = images(batch=1)[..., :1].reshape(1, 8, 8)
    projected = without(x) @ with_projection.out.product.kernel[...]
    for name in ("query", "key", "value"):
        kernel = getattr(without, name).product.kernel[...]
        getattr(with_projection, name).product.kernel.set_value(kernel)
    np.testing.assert_allclose(with_projection(x), projected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scales", [True, False])
def test_standard_deviation_of_the_kernels_at_the_start(scales):
    model = small(features=64, family_parts="mlp_in", kernel_std=0.25, scales=scales)
    kernel = model.blocks[0].mlp_in.product.kernel[...]
    np.testing.assert_allclose(np.std(kernel), 0.25, rtol=0.1)
    multiplied = model.blocks[0].mlp_out.product.kernel[...]
    assert np.abs(multiplied).max() <= 1 / np.sqrt(12)


def test_the_multiplying_twin_keeps_its_start():
    twins = [small(family="conv", kernel_std=std, scales=std is None) for std in (None, 3.0)]
    leaves = [jax.tree.leaves(nnx.state(twin)) for twin in twins]
    for leaf, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("scales", [True, False])
def test_projections_have_the_rule_of_adder_vit(scales):
    def rules(**options):
        block = abstract(scales=scales, **options).blocks[0]
        return {layer.product.dot_general.rule for layer in (block.mlp_in, block.attention.query)}

    assert rules() == {jadder.ADDER_VIT}
    original = dataclasses.replace(get_family("adder"), rule=jadder.ADDERNET)
    assert rules(family=original) == {jadder.ADDERNET}


def test_attention_of_the_multiplying_twin_is_flaxs():
    attention = small(family="conv").blocks[0].attention
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8)), jnp.float32)
    flax_attention = nnx.MultiHeadAttention(2, 8, use_bias=False, decode=False, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value"):
        kernel = getattr(attention, name).product.kernel[...]
        getattr(flax_attention, name).kernel.set_value(kernel.reshape(8, 2, 4))
    flax_attention.out.kernel.set_value(attention.out.product.kernel[...].reshape(2, 4, 8))
    np.testing.assert_allclose(attention(x), flax_attention(x), rtol=1e-5, atol=1e-6)


def test_adder_scores_and_identity_change_the_result():
    logits = [
        logits_of(small(family="conv", **options), images())
        for options in ({}, {"scores": "adder"}, {"identity": True})
    ]
    assert all(np.isfinite(logit).all() for logit in logits)
    assert not np.allclose(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])


def test_patches_are_cut_row_by_row():
    whole = images(batch=2)
    patches = cut_patches(whole, 4).reshape(2, 4, -1)
    expected = [
        whole[:, row : row + 4, column : column + 4].reshape(2, -1)
        for row in (0, 4)
        for column in (0, 4)
    ]
    np.testing.assert_array_equal(patches, jnp.stack(expected, axis=1))


def dtypes_of(**options):
    """The dtypes of all variables, and of the logits, without computing them."""

    def variables_and_logits():
        model = small(**options)
        logits = model(jnp.ones((2, 8, 8, 3), options.get("param_dtype", jnp.float32)))
        return nnx.state(model), logits

    state, logits = nnx.eval_shape(variables_and_logits)
    return {str(leaf.dtype) for leaf in jax.tree.leaves(state)}, str(logits.dtype)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_every_layer_takes_the_dtypes(layers, norm):
    with jax.enable_x64(True):
        options = {"param_dtype": jnp.float64, "family": layers, "norm": norm}
        assert dtypes_of(**options) == ({"float64"}, "float64")
    options = {"dtype": jnp.bfloat16, "family": layers, "norm": norm}
    assert dtypes_of(**options) == ({"float32"}, "bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, r"patch_size \(4\) must divide the image's sides \(10, 10\)"),
        ({"patch_size": 0}, r"patch_size \(0\) must divide"),
        ({"features": 10}, "multiple of 4, got 10"),
        ({"num_heads": 3}, r"divisible by num_heads \(3\)"),
        ({"mlp_layers": 3}, "mlp_layers must be 1 or 2, got 3"),
        ({"family_parts": "qkv,ffn"}, "qkv, out, mlp_in, mlp_out, mlp, all, none; got 'ffn'"),
        ({"kernel_std": 0.0}, "kernel_std must be a positive number, got 0.0"),
        ({"kernel_std": math.nan}, "kernel_std must be a positive number, got nan"),
        ({"norm": "group"}, "'layer', 'batch', 'centered_batch' or 'none', got 'group'"),
        ({"scores": "cosine"}, "'dot' or 'adder', got 'cosine'"),
        ({"family": "shift"}, "unknown family 'shift'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(batch, 8, 8, 3\), got \(3, 16, 16, 3\)"):
        abstract()(images(side=16))
