"""VGG-small."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jadder.models import VGGSmall
from jadder.nn import AdderKernel


def test_number_of_parameters():
    model = nnx.eval_shape(lambda: VGGSmall(rngs=nnx.Rngs(0)))
    widths = [128, 128, 256, 256, 512, 512]
    kernels = sum(9 * a * b for a, b in zip([3, *widths], widths, strict=False)) + 8192 * 10
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == kernels + 2 * (sum(widths) + 10)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 4_660_116


def test_logits_are_finite(layers):
    model = VGGSmall(
        7, image_size=(9, 17), channels=2, widths=(4, 6, 8), family=layers, rngs=nnx.Rngs(0)
    )
    images = np.random.default_rng(0).normal(size=(3, 9, 17, 2))
    logits = nnx.jit(lambda model, images: model(images))(model, jnp.asarray(images, jnp.float32))
    assert model.fc.kernel.shape == (1 * 2 * 8, 7)
    assert logits.shape == (3, 7)
    assert np.isfinite(logits).all()


def test_ends_multiply_as_published_and_add_on_request():
    def adder_kernels(**options):
        model = nnx.eval_shape(lambda: VGGSmall(widths=(4, 4, 4), rngs=nnx.Rngs(0), **options))
        return [path for path, _ in nnx.to_flat_state(nnx.state(model, AdderKernel))]

    inner = [("conv", index, "kernel") for index in range(1, 6)]
    assert adder_kernels() == inner
    assert adder_kernels(multiply_ends=False) == [
        ("conv", 0, "kernel"),
        *inner,
        ("fc", "kernel"),
    ]


def test_images_too_small_for_three_pools():
    with pytest.raises(ValueError, match="at least 8 x 8"):
        VGGSmall(image_size=7, rngs=nnx.Rngs(0))


def test_images_of_a_wrong_size():
    model = nnx.eval_shape(lambda: VGGSmall(widths=(4, 4, 4), family="conv", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\(batch, 32, 32, 3\), got \(2, 28, 28, 3\)"):
        model(jnp.ones((2, 28, 28, 3)))
