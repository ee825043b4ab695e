"""The graph of a network computes what the network computes, and says what it cannot follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder.integer.graph import evaluate, topological
from jadder.integer.quantize import in_evaluation
from jadder.integer.trace import NoIntegerForm, trace

MODELS = [
    ("lenet5", {"image_size": 12, "channels": 1}),
    ("resnet20", {"norm": "centered_batch"}),
    ("vgg_small", {"image_size": 16}),
    ("resnet18", {"width": 4}),
    ("resnet50", {"width": 2}),
]


def model_and_images(name, family, options, size=16):
    rngs = nnx.Rngs(0)
    model = jadder.models.create(name, family=family, rngs=rngs, **options)
    side = options.get("image_size", size)
    x = jax.random.normal(rngs.params(), (4, side, side, options.get("channels", 3)))
    model(x)  # in training mode: running statistics of their own
    return model, x


def graph_of(model, x):
    output = trace(in_evaluation(model), x.shape[1:])
    return evaluate(topological(output), x)[output]


def assert_same(model, x):
    expected = in_evaluation(model)(x)
    actual = graph_of(model, x).reshape(expected.shape)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(actual, expected, atol=2e-3 * scale)


@pytest.mark.parametrize("family", ["adder", "conv"])
@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
def test_the_graph_computes_what_the_model_does(name, options, family):
    assert_same(*model_and_images(name, family, options))


class Own(nnx.Module):
    """A network of a user's own, with what the library's do not have."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), padding="VALID", kernel_dilation=2, rngs=rngs)
        self.depthwise = jadder.AdderConv(
            8, 8, (3, 3), feature_group_count=4, use_bias=True, rngs=rngs
        )
        self.pointwise = nnx.Linear(8, 6, dot_general=jadder.adder_dot_general, rngs=rngs)
        self.norm = jadder.models.BatchNorm(6, rngs=rngs)
        self.last = nnx.Linear(3 * 3 * 6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x)) - 0.25
        y = nnx.relu6(self.norm(self.pointwise(0.1 * self.depthwise(x) + 2 * x)))
        y = jnp.maximum(nnx.avg_pool(y, (2, 2), strides=(2, 2)), 0.1)
        y = nnx.max_pool(y, (2, 2), strides=(2, 2), padding="SAME")
        return jax.nn.relu(self.last(y.transpose(0, 3, 1, 2).reshape(len(x), -1)))


def test_a_network_of_ones_own():
    model = Own(nnx.Rngs(0))
    assert_same(model, jax.random.normal(jax.random.key(0), (4, 16, 16, 3)))


def test_one_spatial_dimension_and_none():
    rngs = nnx.Rngs(0)
    conv = jadder.AdderConv(3, 4, (3,), strides=2, rngs=rngs)
    x = jax.random.normal(rngs.params(), (4, 9, 3))
    output = trace(lambda x: conv(x[:, 0]), (1, 9, 3))
    actual = evaluate(topological(output), x[:, None])[output]
    np.testing.assert_allclose(actual.reshape(4, 5, 4), conv(x), rtol=1e-5)
    dense = nnx.Sequential(jadder.AdderLinear(6, 4, rngs=rngs), nnx.relu)
    x = jax.random.normal(rngs.params(), (4, 6))
    output = trace(lambda x: dense(x.reshape(-1, 6)), (1, 1, 6))
    actual = evaluate(topological(output), x.reshape(4, 1, 1, 6))[output]
    np.testing.assert_allclose(actual.reshape(4, 4), dense(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: jax.nn.gelu(x).sum((1, 2)), "tanh|erf|mul|integer_pow"),
        (lambda x: jax.nn.softmax(x.mean((1, 2))), "exp|reduce_max|sub"),
        (lambda x: x * x, "mul"),
        (lambda x: x.transpose(0, 3, 1, 2) + jnp.arange(4.0), "add"),
        (lambda x: x.mean(0, keepdims=True), "reduce_sum"),
        (lambda x: jnp.sort(x), "sort"),
        (lambda x: nnx.LayerNorm(3, rngs=nnx.Rngs(0))(x), "sub|square|mul|reduce_sum"),
        (lambda x: jnp.zeros((2, 10)), "does not depend"),
        (lambda x: (x, x), "one array"),
    ],
)
def test_what_has_no_integer_form_is_named_with_its_place(function, named):
    with pytest.raises(NoIntegerForm, match=named) as caught:
        trace(function, (4, 4, 3))
    text = str(caught.value)
    assert text.startswith("quantize: ")
    assert "test_trace.py" in text or "output" in text or "one array" in text or "sort" in text
