"""Models by name."""

import jax.numpy as jnp
import pytest
from flax import nnx

from jadder import models
from jadder.nn import AdderKernel


def test_names_are_those_of_the_registry():
    assert set(models.names()) == set(models.MODELS)
    assert {"lenet5", "vgg_small", "resnet20", "resnet50", "swin", "vit"} <= set(models.names())


@pytest.mark.parametrize("name", models.names())
def test_every_model_is_made_with_the_same_arguments(name):
    side = 32 if name == "swin" else 28  # whose three mergings halve it three times

    def logits():
        model = models.create(
            name, family="euclid", num_classes=7, image_size=side, channels=1, rngs=nnx.Rngs(0)
        )
        return model(jnp.zeros((2, side, side, 1)))

    assert nnx.eval_shape(logits).shape == (2, 7)


def test_options_reach_the_model():
    model = nnx.eval_shape(
        lambda: models.create("lenet5", multiply_ends=False, image_size=8, rngs=nnx.Rngs(0))
    )
    assert isinstance(model.conv1, models.get_family("adder").conv_class)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown model 'resnet19'; the models are lenet5, .*vit"):
        models.create("resnet19", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown family 'shift'"):
        models.create("lenet5", family="shift", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="depth"):
        models.create("lenet5", depth=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("multiply_ends", [True, False])
@pytest.mark.parametrize("name", ["lenet5", "vgg_small", "resnet20", "resnet50", "swin", "vit"])
def test_centered_norms_follow_the_adders(name, multiply_ends):
    options = {"norm": "centered_batch", "multiply_ends": multiply_ends}
    model = nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))
    norms = [norm for _, norm in nnx.iter_graph(model) if isinstance(norm, models.BatchNorm)]
    adders = nnx.to_flat_state(nnx.state(model, AdderKernel))
    assert sum(norm.center_features for norm in norms) == len(adders) > 0


@pytest.mark.parametrize("name", ["lenet5", "vgg_small", "resnet20", "swin", "vit"])
def test_unknown_norms(name):
    with pytest.raises(ValueError, match=r"norm must be .*'centered_batch'.*, got 'group'"):
        models.create(name, norm="group", rngs=nnx.Rngs(0))
