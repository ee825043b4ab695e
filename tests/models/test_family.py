"""Families: what the layers are, and how options reach them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder.models import FAMILIES, get_family


@pytest.mark.parametrize(
    ("name", "conv", "linear", "projection"),
    [
        (
            "adder",
            jadder.nn.AdderConv,
            jadder.nn.AdderLinear,
            jadder.nn.ScaledAdderLinear,
        ),
        ("conv", nnx.Conv, nnx.Linear, nnx.Linear),
        (
            "euclid",
            jadder.nn.EuclidConv,
            jadder.nn.EuclidLinear,
            jadder.nn.EuclidLinear,
        ),
    ],
)
def test_layers_of_a_family(name, conv, linear, projection):
    family = get_family(name)
    rngs = nnx.Rngs(0)
    assert type(family.conv(2, 3, (3, 3), rngs=rngs)) is conv
    assert type(family.linear(2, 3, rngs=rngs)) is linear
    assert type(family.projection(2, 3, rngs=rngs)) is projection
    assert family.conv(2, 3, (3, 3), rngs=rngs).bias is None
    assert family.linear(2, 3, rngs=rngs).bias is None
    assert family.projection(2, 3, rngs=rngs).bias is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_twins_have_kernels_of_one_shape(name):
    conv = get_family(name).conv(2, 3, (5, 5), 2, padding=1, rngs=nnx.Rngs(0))
    assert conv.kernel.shape == (5, 5, 2, 3)
    assert conv(jnp.ones((1, 9, 9, 2))).shape == (1, 4, 4, 3)


def test_adder_kernels_are_standard_normal_and_marked():
    kernel = get_family("adder").conv(64, 64, (3, 3), rngs=nnx.Rngs(0)).kernel
    assert isinstance(kernel, jadder.nn.AdderKernel)
    np.testing.assert_allclose(np.std(kernel[...]), 1.0, rtol=0.02)


def test_multiplying_convolutions_start_as_published():
    kernel = get_family("conv").conv(16, 64, (3, 3), rngs=nnx.Rngs(0)).kernel
    assert not isinstance(kernel, jadder.nn.AdderKernel)
    np.testing.assert_allclose(np.std(kernel[...]), np.sqrt(2 / (64 * 9)), rtol=0.03)


def test_multiplying_linear_layers_start_as_pytorchs():
    kernel = get_family("conv").linear(64, 256, rngs=nnx.Rngs(0)).kernel
    np.testing.assert_allclose(np.abs(kernel[...]).max(), 1 / 8, rtol=0.01)
    np.testing.assert_allclose(np.std(kernel[...]), 1 / 8 / np.sqrt(3), rtol=0.02)


def rules_of_layers(family):
    """Rule and implementation of the family's convolution, linear layer and projection."""
    products = (
        family.conv(2, 3, (3, 3), rngs=nnx.Rngs(0)).conv_general_dilated,
        family.linear(2, 3, rngs=nnx.Rngs(0)).dot_general,
        family.projection(2, 3, rngs=nnx.Rngs(0)).dot_general,
    )
    return [(product.rule, product.implementation) for product in products]


def test_rule_and_implementation_reach_every_adder_layer():
    family = dataclasses.replace(get_family("adder"), rule=jadder.SIGN, implementation="reference")
    assert rules_of_layers(family) == [(jadder.SIGN, "reference")] * 3


def test_without_a_rule_each_layer_has_its_published_one():
    expected = [(jadder.ADDERNET, None), (jadder.ADDERNET, None), (jadder.ADDER_VIT, None)]
    assert rules_of_layers(get_family("adder")) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_initializer_reaches_linear_layers_and_projections(name):
    family = dataclasses.replace(get_family(name), linear_init=nnx.initializers.constant(0.5))
    for layer in (family.linear, family.projection):
        np.testing.assert_array_equal(layer(2, 3, rngs=nnx.Rngs(0)).kernel[...], 0.5)
    assert np.std(family.conv(2, 3, (3, 3), rngs=nnx.Rngs(0)).kernel[...]) > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_products_in_bfloat16_come_in_float32(name):
    family = get_family(name)
    options = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    x = jnp.ones((2, 4, 4, 8), jnp.bfloat16)
    assert family.conv(8, 3, (3, 3), **options)(x).dtype == jnp.float32
    assert family.linear(8, 3, **options)(x).dtype == jnp.float32
    assert family.projection(8, 3, **options)(x).dtype == jnp.float32


def test_a_family_is_its_own_family():
    mine = dataclasses.replace(get_family("adder"), name="mine")
    assert get_family(mine) is mine
    assert hash(mine) != hash(get_family("adder"))


@pytest.mark.parametrize("unknown", ["shift", "", None, 3])
def test_unknown_family(unknown):
    with pytest.raises(ValueError, match="the families are adder, conv, euclid"):
        get_family(unknown)


@pytest.mark.parametrize("name", ["conv", "euclid"])
@pytest.mark.parametrize("option", [{"rule": jadder.SIGN}, {"implementation": "xla"}])
def test_only_adders_have_rules_and_implementations(name, option):
    with pytest.raises(ValueError, match=f"'{name}': .*Conv takes no {next(iter(option))}"):
        dataclasses.replace(get_family(name), **option)
