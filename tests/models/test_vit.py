"""AdderViT: position embedding, layout, options."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jadder
from jadder.models import AdderViT
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
        lambda: AdderViT(image_size=128, patch_size=16, multiply_out=True, rngs=nnx.Rngs(0))
    )
    dim, pixels = 128, 16 * 16 * 3
    adder = dim * dim + 2 * dim + 2 * dim
    block = 2 * (2 * dim) + 5 * adder + dim * dim
    embedding = 2 * pixels + (pixels + 1) * dim + 2 * dim
    published = embedding + 4 * block + 2 * dim + (dim + 1) * 10
    assert count(model) == published + 4 * 2 * dim


def test_twins_differ_by_the_scales_only():
    """Six products take E and F, of the sizes of their inputs and outputs."""

    def shapes(family):
        model = nnx.eval_shape(lambda: small(family=family, norm="layer"))
        return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}

    adder, conv = shapes("adder"), shapes("conv")
    assert {path: adder[path] for path in conv} == conv
    assert shapes("euclid") == conv
    scales = {path: shape for path, shape in adder.items() if path not in conv}
    assert {path[-1] for path in scales} == {"input_scale", "output_scale"}
    assert sum(size for (size,) in scales.values()) == 4 * (8 + 8) + 2 * (8 + 12)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_logits_and_gradients_are_finite(layers, norm):
    model = small(family=layers, norm=norm)

    @nnx.jit
    def gradients(model, images):
        return nnx.value_and_grad(lambda model: (model(images) ** 2).sum())(model)

    loss, grads = gradients(model, images())
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_evaluation_treats_each_image_alone(layers):
    model = small(family=layers, norm="batch")
    model.eval()
    together = logits_of(model, images())
    alone = logits_of(model, images()[:1])
    np.testing.assert_allclose(alone, together[:1], rtol=1e-4, atol=1e-4)


def logits_of(model, images):
    return nnx.jit(lambda model, images: model(images))(model, images)


def test_auto_norm_is_the_published_one():
    def norms(**options):
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract(**options), nnx.Param))]
        return sum(path[-2:] == ("norm", "scale") for path in paths)

    assert norms(family="adder") == 6
    assert norms(family="euclid") == 6
    assert norms(family="conv") == 0
    assert norms(family="adder", multiply_out=True) == 5
    assert norms(family="adder", multiply_ends=False) == 8


def test_which_products_add():
    def adder_modules(**options):
        state = nnx.state(abstract(**options), AdderKernel)
        return {path[-3] for path, _ in nnx.to_flat_state(state)}

    inner = {"query", "key", "value", "out", "mlp_in", "mlp_out"}
    assert adder_modules() == inner
    assert adder_modules(multiply_out=True) == inner - {"out"}
    assert adder_modules(multiply_ends=False) == inner | {"patch_embedding", "head"}
    assert adder_modules(family="conv") == set()


def test_projections_have_the_rule_of_adder_vit():
    model = abstract()
    assert model.blocks[0].mlp_in.product.dot_general.rule == jadder.ADDER_VIT
    assert model.blocks[0].attention.query.product.dot_general.rule == jadder.ADDER_VIT


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
    model = abstract(family="conv")
    whole = images(batch=2)
    patches = model._patches(whole)
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
        ({"norm": "group"}, "'auto', 'layer', 'batch' or 'none', got 'group'"),
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
