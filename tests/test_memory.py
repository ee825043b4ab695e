"""Temporary memory of compiled programs: of the order of the operands, never of the product."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.shapes import MATMULS, RESNET20_CONVS, Conv, total_bytes
from benchmarks.step import training_step
from jadder import GradientRule, adder_conv, adder_matmul
from jadder.models import get_family

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
    step, operands = training_step("resnet20", get_family("adder"), batch=128, size=32)
    memory = jax.jit(step).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 1.5 * 2**30
