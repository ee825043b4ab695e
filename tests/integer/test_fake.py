"""Training with the grid in place: its forward pass, its gradients, and the program made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jadder
from jadder.integer import Convolution, Grid, RoundedProduct
from jadder.integer.fake import fake_quantize
from tests.integer.test_quantize import MEAN, STD, normalized, pixels, relative_error, trained


def test_the_forward_pass_is_that_of_rounded_operands_and_the_gradients_are_not():
    grid = Grid.between(0.0, 1.5, 3)
    adder = jadder.nn.AdderDotGeneral()
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.uniform(keys[0], (5, 6)), jax.random.normal(keys[1], (6, 4))
    g = jax.random.normal(keys[2], (5, 4))
    numbers = (((1,), (0,)), ((), ()))
    y, pull = jax.vjp(lambda x, w: RoundedProduct(adder, grid)(x, w, numbers), x, w)
    steps = np.arange(4) * 0.5

    def nearest(a):
        return steps[abs(np.asarray(a)[..., None] - steps).argmin(-1)]

    expected = -abs(nearest(x)[:, :, None] - nearest(w)).sum(1)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    _, pull_exact = jax.vjp(lambda x, w: adder(x, w, numbers), x, w)
    for ours, exact in zip(pull(g), pull_exact(g), strict=True):
        np.testing.assert_array_equal(ours, exact)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_program_computes_the_function_that_was_trained(bits):
    images = pixels()
    floats = normalized(images)
    model = fake_quantize(trained(), images, bits=bits, mean=MEAN, std=STD)
    optimizer = nnx.Optimizer(model, jadder.adder_sgd(0.01), wrt=nnx.Param)
    labels = jnp.arange(len(images)) % 10

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(floats)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    program = jadder.quantize(model, images, bits=8, mean=MEAN, std=STD)
    adders = [
        each
        for each in program.operations
        if isinstance(each, Convolution) and each.product == "adder"
    ]
    assert {program.values[each.input].maximum for each in adders} == {2**bits - 1}
    # What is left is the eight bits of all that is no adder product.
    assert relative_error(program, model, images, floats) < 0.15
    coarse = jadder.quantize(trained(), images, bits=bits, mean=MEAN, std=STD)
    ours = relative_error(program, model, images, floats)
    assert ours < relative_error(coarse, trained(), images, floats)


def test_the_model_that_is_given_is_not_changed():
    model = trained()
    copy = fake_quantize(model, pixels(), bits=3, mean=MEAN, std=STD)
    assert isinstance(copy.layer1[0].conv1.conv_general_dilated, RoundedProduct)
    assert not isinstance(model.layer1[0].conv1.conv_general_dilated, RoundedProduct)
    again = fake_quantize(copy, pixels(), bits=2, mean=MEAN, std=STD)
    assert again.layer1[0].conv1.conv_general_dilated.grid.maximum == 3


def test_refusals():
    images, moments = pixels(4), {"mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 1"):
        fake_quantize(trained(), images, bits=1, **moments)
    with pytest.raises(ValueError, match="has no adder products"):
        fake_quantize(trained("conv"), images, **moments)
    model = trained()
    jadder.set_l1_share(model, 0.5)
    with pytest.raises(ValueError, match="on their way from Euclid's distance"):
        fake_quantize(model, images, **moments)
