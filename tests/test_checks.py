"""What adder layers need around them, seen by running models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder import check_model

X = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
MISSING = "no normalisation takes the mean of its results away"

TRANSFORMER = {"features": 8, "num_heads": 2, "mlp_features": 8, "depth": 1, "image_size": 8}
SWIN = {"features": 8, "depths": (1,), "num_heads": (2,), "head_features": 4, "image_size": 8}
VGG = {"widths": (4, 4, 4), "image_size": 8}


def resnet(stage_sizes=(0, 1), **options):
    """A block with a shortcut of its own, or one without."""
    return jadder.models.ResNet(stage_sizes, jadder.models.BasicBlock, width=4, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (resnet, {"dtype": jnp.bfloat16}),
        (resnet, {"norm": "centered_batch", "multiply_ends": False, "stage_sizes": (1,)}),
        (resnet, {"family": "euclid"}),
        ("vgg_small", {**VGG, "multiply_ends": False}),
        ("vit", {**TRANSFORMER, "multiply_ends": False, "scores": "adder"}),
        ("vit", {**TRANSFORMER, "norm": "centered_batch", "family": "euclid"}),
        ("vit", {**TRANSFORMER, "norm": "none", "family": "conv"}),
        ("swin", {**SWIN, "norm": "layer", "dtype": jnp.bfloat16}),
    ],
)
def test_models_of_this_package_have_what_they_need(make, options):
    if isinstance(make, str):
        make = functools.partial(jadder.models.create, make)
    model = make(rngs=nnx.Rngs(0), **options)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    assert check_model(model, X) == {}
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_attention_has_its_norms():
    attention = jadder.AdderAttention(2, 4, scores="adder", rngs=nnx.Rngs(0))
    assert check_model(attention, X.reshape(4, -1, 4)) == {}


def test_a_transformer_asked_to_have_none_has_none():
    model = jadder.models.create("vit", norm="none", rngs=nnx.Rngs(0), **TRANSFORMER)
    faults = check_model(model, X)
    assert faults["blocks/0/mlp_in/product"] == MISSING


class Net(nnx.Module):
    """Where what follows a layer is decided in a method."""

    def __init__(self, norm, rngs, **options):
        self.conv = jadder.AdderConv(3, 4, (3, 3), rngs=rngs, **options)
        self.norm = norm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.dropout(self.conv(x))))
        return {"logits": self.head(x.mean((1, 2))), "ignored": jnp.arange(3)}


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.BatchNorm, jadder.models.BatchNorm])
def test_flax_s_defaults_are_named(norm):
    faults = check_model(Net(norm, nnx.Rngs(0)), X)
    if norm is jadder.models.BatchNorm:
        assert faults == {}
    else:
        assert faults.keys() == {"norm"}
        assert "use_fast_variance=True" in faults["norm"]
        assert ("momentum=0.99" in faults["norm"]) == (norm is nnx.BatchNorm)


@pytest.mark.parametrize("norm", [nnx.RMSNorm, lambda features, rngs: lambda x: x])
def test_norms_that_keep_the_mean_are_none(norm):
    assert MISSING in check_model(Net(norm, nnx.Rngs(0)), X)["conv"]


def test_half_precision():
    faults = check_model(Net(jadder.models.BatchNorm, nnx.Rngs(0), dtype=jnp.bfloat16), X)
    assert faults == {"conv": "bfloat16 results: give preferred_element_type=float32"}


def test_recurrent_cells_and_functions_given_to_flax_s_layers():
    rngs = nnx.Rngs(0)
    with pytest.warns(jadder.AdderWarning):
        rnn = jadder.adderize(nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs)))
    assert MISSING in check_model(rnn, 0.1 * X.reshape(4, -1, 4)[:, :3])["cell/dense_i"]
    linear = nnx.Linear(3, 4, dot_general=jadder.euclid_dot_general, rngs=rngs)
    assert check_model(linear, X) == {"the model itself": MISSING}


def test_a_mask_that_is_not_seen():
    product = jadder.adder_conv_general_dilated
    options = {"mask": jnp.ones((1, 1, 3, 4)), "conv_general_dilated": product}
    conv = nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0), **options)
    model = nnx.Sequential(conv, jadder.models.LayerNorm(4, rngs=nnx.Rngs(0)))
    assert check_model(model, X).keys() == {"layers/0"}
    assert "AdderConv" in check_model(model, X)["layers/0"]


def test_a_model_that_multiplies_is_not_run():
    assert check_model(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "nothing to call it with") == {}
