"""Normalisations against literal NumPy formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jadder.models import BatchNorm, LayerNorm
from jadder.models.normalization import rectified


def literal_batch_norm(x, scale, bias, epsilon):
    """y and the two statistics that PyTorch keeps, of a (values, features) array."""
    mean = x.sum(0) / len(x)
    squares = ((x - mean) ** 2).sum(0)
    y = scale * (x - mean) / np.sqrt(squares / len(x) + epsilon) + bias
    return y, mean, squares / (len(x) - 1)


@settings(max_examples=10, deadline=None)
@given(
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    features=st.integers(1, 5),
    momentum=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_batch_norm_in_training_is_the_literal_formula(leading, features, momentum, seed):
    leading = [2, *leading]
    random = np.random.default_rng(seed)
    x = random.normal(-3, 2, (*leading, features))
    scale, bias, old_mean, old_var = random.uniform(0.5, 2, (4, features))
    y, mean, var = literal_batch_norm(x.reshape(-1, features), scale, bias, 1e-5)
    with jax.enable_x64(True):
        norm = BatchNorm(features, momentum=momentum, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        norm.scale.set_value(jnp.asarray(scale))
        norm.bias.set_value(jnp.asarray(bias))
        norm.mean.set_value(jnp.asarray(old_mean))
        norm.var.set_value(jnp.asarray(old_var))
        np.testing.assert_allclose(norm(x).reshape(y.shape), y, rtol=1e-9, atol=1e-10)
        for kept, old, new in ((norm.mean, old_mean, mean), (norm.var, old_var, var)):
            assert kept[...].dtype == jnp.float64
            np.testing.assert_allclose(
                kept[...], momentum * old + (1 - momentum) * new, rtol=1e-11, atol=1e-12
            )


@pytest.mark.parametrize(
    ("axis", "mean", "options"), [(-1, 0.0, {}), (1, 30.0, {"use_bias": False}),
                                  (-1, -3.0, {"use_scale": False})],
)  # fmt: skip
def test_the_derivatives_of_batch_norm_are_those_of_the_formula(axis, mean, options):
    """First and second ones, backwards and forwards; Flax's are derived by JAX."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, way = (jnp.asarray(random.normal(m, 2, (3, 2, 2))) for m in (mean, 0))
        options = options | {"axis": axis, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        found = []
        for norm in (BatchNorm(2, **options), nnx.BatchNorm(2, use_fast_variance=False, **options)):
            norm.mean, norm.var = nnx.BatchStat(jnp.zeros(2)), nnx.BatchStat(jnp.ones(2))
            graph, parameters, rest = nnx.split(norm, nnx.Param, ...)
            parameters, rest = nnx.to_pure_dict(parameters), nnx.to_pure_dict(rest)
            parameters = jax.tree.map(lambda a: a + 0.5, parameters)

            def loss(x, parameters, graph=graph, rest=rest):
                return jnp.sum(jnp.sin(way * nnx.merge(graph, parameters, rest)(x)))

            @jax.jit
            def derivatives(x, parameters, loss=loss):
                _, tangent = jax.jvp(lambda x: loss(x, parameters), (x,), (way,))
                return (
                    jax.grad(loss, (0, 1))(x, parameters),
                    tangent,
                    jax.hessian(loss)(x, parameters),
                )

            found.append(jax.tree.leaves(derivatives(x, parameters)))
        for ours, flax in zip(*found, strict=True):
            np.testing.assert_allclose(ours, flax, rtol=1e-9, atol=1e-9)


def test_batch_norm_defaults_are_those_of_pytorch():
    norm = BatchNorm(1, rngs=nnx.Rngs(0))
    y = norm(jnp.array([[0.0], [4.0]]))
    np.testing.assert_allclose(y[:, 0], np.array([-2, 2]) / np.sqrt(4 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(norm.mean[...], 0.1 * 2, rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 * 1 + 0.1 * 8, rtol=1e-6)


def test_batch_norm_in_evaluation_uses_and_keeps_its_statistics():
    norm = BatchNorm(2, epsilon=0.0, rngs=nnx.Rngs(0))
    norm.mean.set_value(jnp.array([1.0, 2.0]))
    norm.var.set_value(jnp.array([4.0, 16.0]))
    norm.eval()
    y = norm(jnp.array([[3.0, 6.0]]))
    np.testing.assert_allclose(y, [[1.0, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], [1.0, 2.0])
    np.testing.assert_array_equal(norm.var[...], [4.0, 16.0])
    norm.train()
    norm(jnp.zeros((2, 2)))
    assert (norm.mean[...] != jnp.array([1.0, 2.0])).all()


def test_view_switches_batch_norm_without_touching_the_model():
    norm = BatchNorm(2, rngs=nnx.Rngs(0))
    evaluating = nnx.view(norm, use_running_average=True)
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(evaluating(x), x / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert not norm.use_running_average


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(2, 6)),
    shift=st.floats(-1e3, 1e3),
    training=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_centered_features_are_those_of_a_centered_input(shape, shift, training, seed):
    random = np.random.default_rng(seed)
    x = random.normal(size=shape)
    with jax.enable_x64(True):
        options = {"param_dtype": jnp.float64, "use_running_average": not training}
        plain = BatchNorm(shape[-1], rngs=nnx.Rngs(0), **options)
        centered = BatchNorm(shape[-1], center_features=True, rngs=nnx.Rngs(0), **options)
        expected = plain(jnp.asarray(x - x.mean(-1, keepdims=True)))
        shared = shift * random.normal(size=(*shape[:-1], 1))
        np.testing.assert_allclose(centered(jnp.asarray(x + shared)), expected, atol=1e-7)
        for one, other in ((centered.mean, plain.mean), (centered.var, plain.var)):
            np.testing.assert_allclose(one[...], other[...], atol=1e-9)


def test_centered_features_give_no_gradient_to_what_they_share():
    x = jnp.asarray(np.random.default_rng(0).normal(-2600, 4, (8, 3, 6)), jnp.float32)
    norm = BatchNorm(6, center_features=True, rngs=nnx.Rngs(0))
    gradient = nnx.grad(lambda norm, x: jnp.sum(jnp.sin(norm(x))), argnums=1)(norm, x)
    assert jnp.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-5)


class Doubled(BatchNorm):
    """One whose call is not its own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("make", "options"),
    [(BatchNorm, {}), (BatchNorm, {"center_features": True, "use_scale": False}),
     (BatchNorm, {"dtype": jnp.bfloat16}), (nnx.BatchNorm, {}), (Doubled, {})],
)  # fmt: skip
def test_rectified_is_what_the_steps_one_by_one_are(make, options, residual, training):
    random = np.random.default_rng(0)
    x, way = jnp.asarray(random.normal(-3, 2, (2, 7, 3, 4)), jnp.float32)
    r = None if residual is None else jnp.asarray(way.transpose(1, 0, 2).reshape(x.shape), residual)

    def steps(norm, x, r=None):
        y = norm(x)
        return nnx.relu(y if r is None else y + r)

    found = []
    for function in (rectified, steps):
        norm = make(4, **options, rngs=nnx.Rngs(0))
        norm.use_running_average = not training

        @nnx.jit
        def results(norm, x, r, function=function):
            argnums = (0, 1) if r is None else (0, 1, 2)
            gradient = nnx.grad(
                lambda norm, x, r: jnp.sum(function(norm, x, r) * way), argnums=argnums
            )
            return function(norm, x, r), gradient(norm, x, r), nnx.state(norm)

        found.append(jax.tree.leaves(results(norm, x, r)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            one.astype(np.float32), other.astype(np.float32), rtol=1e-5, atol=1e-5
        )


def test_one_feature_cannot_be_centered():
    with pytest.raises(ValueError, match="at least two features, got 1"):
        BatchNorm(1, center_features=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm])
def test_float32_keeps_its_digits_far_from_zero(make):
    """As the products of a trained adder ResNet-20 lie: at -2600 with a standard deviation of 4."""
    x = np.random.default_rng(0).normal(-2600, 4, (512, 256)).astype(np.float32)
    axis = 0 if make is BatchNorm else 1
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(axis, keepdims=True)) / x64.std(axis, keepdims=True)
    y = make(256, rngs=nnx.Rngs(0))(jnp.asarray(x))
    np.testing.assert_allclose(y, expected, atol=1e-3)


CENTERED = functools.partial(BatchNorm, center_features=True)


@pytest.mark.parametrize("make", [BatchNorm, CENTERED, LayerNorm])
def test_bfloat16_rounds_the_result_only(make):
    x = np.random.default_rng(0).normal(-2600, 4, (64, 64)).astype(np.float32)
    exact = make(64, rngs=nnx.Rngs(0))
    rounded = make(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = rounded(jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact(jnp.asarray(x)).astype(jnp.bfloat16))
    for expected, kept in zip(
        jax.tree.leaves(nnx.state(exact)), jax.tree.leaves(nnx.state(rounded)), strict=True
    ):
        assert kept.dtype == jnp.float32
        np.testing.assert_array_equal(kept, expected)


def test_masked_values_take_no_part_in_the_statistics():
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    mask = np.array([True, True, False, True, False, True])
    _, mean, var = literal_batch_norm(x[mask], 1.0, 0.0, 1e-5)
    norm = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    norm(jnp.asarray(x), mask=jnp.asarray(mask)[:, None])
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)


def test_statistics_over_a_named_axis_are_those_of_the_whole_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
    whole = BatchNorm(2, rngs=nnx.Rngs(0))
    expected = whole(x)
    graph, state = nnx.split(BatchNorm(2, axis_name="device", rngs=nnx.Rngs(0)))

    def one_device(state, shard):
        norm = nnx.merge(graph, state)
        return norm(shard), norm.mean[...], norm.var[...]

    y, mean, var = jax.vmap(one_device, in_axes=(None, 0), axis_name="device")(state, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.broadcast_to(whole.mean[...], (4, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, np.broadcast_to(whole.var[...], (4, 2)), rtol=1e-6)


def test_one_value_has_no_unbiased_variance():
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"at least two values per feature.*\(1, 3\)"):
        norm(jnp.ones((1, 3)))
    norm.eval()
    assert norm(jnp.ones((1, 3))).shape == (1, 3)
