"""Temporary memory of compiled programs: of the order of the operands, never of the product."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from benchmarks.shapes import MATMULS, RESNET20_CONVS, Conv, total_bytes
from jadder import GradientRule, adder_conv, adder_mask, adder_matmul, adder_sgd, models

CASES = [shape for shape in (*MATMULS, *RESNET20_CONVS) if shape.macs < 2**31]
PASSES = ("forward", "backward")


@pytest.mark.parametrize(
    "rule", [GradientRule(), GradientRule((4, 1), (4, 1))], ids=["published", "bounded"]
)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", CASES, ids=lambda shape: shape.name)
def test_temporaries_take_at_most_three_times_the_operands(shape, passes, rule):
    if isinstance(shape, Conv):
        product = functools.partial(adder_conv, strides=shape.stride, rule=rule)
        x_shape = (shape.batch, shape.size, shape.size, shape.channels)
        w_shape = (shape.window, shape.window, shape.channels, shape.features)
    else:
        product = functools.partial(adder_matmul, rule=rule)
        x_shape, w_shape = (shape.m, shape.k), (shape.k, shape.n)
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x_shape, w_shape))
    y = jax.eval_shape(product, x, w)
    if passes == "forward":
        program, operands = product, (x, w)
    else:
        program, operands = lambda x, w, g: jax.vjp(product, x, w)[1](g), (x, w, y)

    memory = jax.jit(program).lower(*operands).compile().memory_analysis()
    io = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert io >= total_bytes(x_shape, w_shape, y.shape)
    assert memory.temp_size_in_bytes <= 3 * io


def test_a_resnet20_training_step_at_batch_128_takes_less_than_1_5_gib():
    model = models.create("resnet20", rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    tx = adder_sgd(0.1, mask=adder_mask(model))

    def step(params, rest, state, images, labels):
        def loss(params):
            net = nnx.merge(graphdef, params, rest)
            cross = optax.softmax_cross_entropy_with_integer_labels(net(images), labels)
            return cross.mean(), nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))

        gradients, new_rest = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), new_rest, state

    images = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((128,), jnp.int32)
    lowered = jax.jit(step).lower(params, rest, tx.init(params), images, labels)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 1.5 * 2**30
