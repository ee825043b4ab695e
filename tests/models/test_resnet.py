"""ResNets: layout, published sizes, training and evaluation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jadder.models import (
    BasicBlock,
    Bottleneck,
    ResNet,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
)
from jadder.nn import AdderKernel


def count(model, kind=nnx.Param):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, kind)))


def small(**options):
    options = {"width": 4, "family": "conv", "rngs": nnx.Rngs(0)} | options
    return ResNet((1, 1), options.pop("block", BasicBlock), 5, **options)


# Kernel elements and those of normalisation: ResNet-8 77,360 and 692, ResNet-20 270,896 and 1,588.
# ImageNet: torchvision's published 11,689,512, 21,797,672 and 25,557,032, and 2 · 1000 for
# the normalisation of the logits.
@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (resnet8, 78_052),
        (resnet20, 272_484),
        (resnet32, 466_916),
        (resnet18, 11_691_512),
        (resnet34, 21_799_672),
        (resnet50, 25_559_032),
    ],
)
def test_number_of_parameters(make, parameters):
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert count(model) == parameters


@pytest.mark.parametrize(
    ("make", "multiplying", "products"),
    [(resnet8, 2, 10), (resnet20, 2, 22), (resnet32, 2, 34), (resnet18, 2, 21), (resnet50, 2, 54)],
)
def test_all_products_but_the_ends_are_the_familys(make, multiplying, products):
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    kernels = nnx.to_flat_state(nnx.state(model, AdderKernel))
    assert len(kernels) == products - multiplying
    assert not {("conv1", "kernel"), ("fc", "kernel")} & {path for path, _ in kernels}
    model = nnx.eval_shape(lambda: make(multiply_ends=False, rngs=nnx.Rngs(0)))
    assert len(nnx.to_flat_state(nnx.state(model, AdderKernel))) == products


def multiply_accumulates(jaxpr):
    """Multiply-accumulates of the convolutions and matrix products in a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += out * math.prod(kernel) // kernel[features]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            total += multiply_accumulates(inner) if hasattr(inner, "eqns") else 0
    return total


# Millions, of one image: torchvision's model table; for CIFAR with 1 x 1 shortcuts by hand.
@pytest.mark.parametrize(
    ("make", "side", "millions"),
    [
        (resnet8, 32, 12.50),
        (resnet20, 32, 40.81),
        (resnet18, 224, 1814.07),
        (resnet34, 224, 3663.76),
        (resnet50, 224, 4089.18),
    ],
)
def test_number_of_multiply_accumulates(make, side, millions):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(family="conv", rngs=nnx.Rngs(0))))

    def logits(state, images):
        model = nnx.merge(graph, state)
        model.eval()
        return model(images)

    traced = jax.make_jaxpr(logits)(state, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    assert multiply_accumulates(traced.jaxpr) / 1e6 == pytest.approx(millions, abs=0.01)


def test_twins_have_parameters_of_the_same_shapes(layers):
    def shapes(family):
        model = nnx.eval_shape(lambda: resnet20(family=family, rngs=nnx.Rngs(0)))
        return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}

    assert shapes(layers) == shapes("conv")


def abstract(**options):
    return nnx.eval_shape(lambda: small(**options))


def random_images(batch=4, side=8):
    values = np.random.default_rng(0).normal(size=(batch, side, side, 3))
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"norm": "centered_batch"},
        {"block": Bottleneck, "stem": "imagenet"},
        {"block": Bottleneck, "norm": "centered_batch"},
    ],
)
def test_logits_and_gradients_are_finite(layers, variant):
    model = small(family=layers, **variant)

    @nnx.jit
    def gradients(model, images):
        return nnx.value_and_grad(lambda model: model(images)[:, 0].sum() ** 2)(model)

    loss, grads = gradients(model, random_images(side=12))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_centering_tells_the_features_of_adders_apart():
    """At the start they are much alike, because all sums |x - w| grow with x."""

    def likeness(norm):
        model = small(family="adder", width=16, norm=norm)
        block = model.layer1[0]
        y = block.bn1(block.conv1(nnx.relu(model.bn1(model.conv1(random_images())))))
        return np.abs(np.corrcoef(y.reshape(-1, 16).T) - np.eye(16)).sum() / (16 * 15)

    assert likeness("batch") > 2 * likeness("centered_batch")


def logits_of(model, images):
    return nnx.jit(lambda model, images: model(images))(model, images)


def test_training_normalises_by_the_batch(layers):
    model = small(family=layers)
    before = nnx.clone(model)
    logits = logits_of(model, random_images(batch=8))
    np.testing.assert_allclose(logits.mean(0), np.zeros(5), atol=1e-5)
    changed = jax.tree.map(
        lambda old, new: (old != new).any(),
        nnx.state(before, nnx.BatchStat),
        nnx.state(model, nnx.BatchStat),
    )
    assert all(jax.tree.leaves(changed))


def test_evaluation_treats_each_image_alone(layers):
    model = small(family=layers)
    model.eval()
    before = nnx.clone(model)
    images = random_images()
    together = logits_of(model, images)
    np.testing.assert_allclose(logits_of(model, images[:1]), together[:1], rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(before), nnx.state(model))


def dtypes_of(**options):
    """The dtypes of all variables, and of the logits, without computing them."""

    def variables_and_logits():
        model = small(**options)
        logits = model(jnp.ones((2, 8, 8, 3), options.get("param_dtype", jnp.float32)))
        return nnx.state(model), logits

    state, logits = nnx.eval_shape(variables_and_logits)
    return {str(leaf.dtype) for leaf in jax.tree.leaves(state)}, str(logits.dtype)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_every_layer_takes_the_dtypes(layers, block):
    with jax.enable_x64(True):
        options = {"param_dtype": jnp.float64, "family": layers, "block": block}
        assert dtypes_of(**options) == ({"float64"}, "float64")
    options = {"dtype": jnp.bfloat16, "family": layers, "block": block}
    assert dtypes_of(**options) == ({"float32"}, "bfloat16")


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (8, 8, 3), (2, 3, 8, 8), (1, 2, 8, 8, 3)])
def test_images_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"\(batch, height, width, 3\), got \(.*\)"):
        abstract()(jnp.ones(shape))


def test_images_of_a_wrong_dtype():
    with pytest.raises(TypeError, match=r"floating dtype.*uint8"):
        abstract()(jnp.ones((2, 8, 8, 3), jnp.uint8))


def test_unknown_stem():
    with pytest.raises(ValueError, match="'cifar' or 'imagenet', got 'tiny'"):
        small(stem="tiny")
