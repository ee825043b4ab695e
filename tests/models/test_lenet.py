"""LeNet-5-BN."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jadder.models import LeNet5
from jadder.nn import AdderKernel


def test_number_of_parameters_is_lecuns_with_norms_for_biases(layers):
    model = nnx.eval_shape(lambda: LeNet5(family=layers, rngs=nnx.Rngs(0)))
    kernels = 25 * 6 + 25 * 6 * 16 + 400 * 120 + 120 * 84 + 84 * 10
    norms = 2 * (6 + 16 + 120 + 84 + 10)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == kernels + norms


@pytest.mark.parametrize(
    ("image_size", "channels", "features"),
    [
        (28, 1, 400),
        (32, 3, 576),
        (8, 1, 64),
        (11, 1, 64),
        (12, 1, 16),
        ((28, 20), 1, 240),
        (4, 1, 16),
    ],
)
def test_image_sizes(image_size, channels, features):
    def kernel_and_logits():
        sizes = {"image_size": image_size, "channels": channels}
        model = LeNet5(7, family="conv", rngs=nnx.Rngs(0), **sizes)
        return model.fc1.kernel[...], model(jnp.zeros((3, *model.image_shape, channels)))

    kernel, logits = nnx.eval_shape(kernel_and_logits)
    assert kernel.shape == (features, 120)
    assert logits.shape == (3, 7)


@pytest.mark.parametrize("image_size", [8, 28])
def test_logits_are_finite(layers, image_size):
    model = LeNet5(image_size=image_size, family=layers, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).normal(size=(4, image_size, image_size, 1))
    logits = nnx.jit(lambda model, images: model(images))(model, jnp.asarray(images, jnp.float32))
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()


def test_ends_multiply_as_published_and_add_on_request():
    def adder_layers(model):
        return {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, AdderKernel))}

    assert adder_layers(nnx.eval_shape(lambda: LeNet5(rngs=nnx.Rngs(0)))) == {"conv2", "fc1", "fc2"}
    model = nnx.eval_shape(lambda: LeNet5(multiply_ends=False, rngs=nnx.Rngs(0)))
    assert adder_layers(model) == {"conv1", "conv2", "fc1", "fc2", "fc3"}


@pytest.mark.parametrize("image_size", [3, (28, 3)])
def test_images_too_small_for_two_pools(image_size):
    with pytest.raises(ValueError, match="at least 4 x 4"):
        LeNet5(image_size=image_size, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("image_size", [0, (28,), (28, 28, 1), (28.0, 28), "28"])
def test_image_size_that_is_none(image_size):
    with pytest.raises(ValueError, match="positive int or a pair of them, got"):
        LeNet5(image_size=image_size, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(2, 28, 28, 3), (2, 32, 32, 1), (28, 28, 1), (2, 784)])
def test_images_of_a_wrong_shape(shape):
    model = nnx.eval_shape(lambda: LeNet5(family="conv", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\(batch, 28, 28, 1\), got \(.*\)"):
        model(jnp.ones(shape))
