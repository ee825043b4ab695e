"""Statistics of batch normalisations from batches, against a direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder.models import BatchNorm, update_statistics


class Net(nnx.Module):
    """Two convolutions and norms of one kind, one of them used twice, and dropout."""

    def __init__(self, norm, rngs):
        self.conv1 = jadder.AdderConv(3, 4, (3, 3), rngs=rngs)
        self.norm1 = norm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([jadder.AdderConv(4, 5, (1, 1), rngs=rngs), norm(5, rngs=rngs)])
        self.unused = norm(2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[1](x + 1), self.dropout(x)


def values(model):
    """A copy of all that a model holds; of random streams, how far they are."""
    state = nnx.state(model, nnx.filterlib.Not(nnx.RngKey))
    return jax.tree.map(jnp.copy, state)


def batches(*sizes):
    rng = np.random.default_rng(0)
    return [rng.normal(i, 1 + i, (n, 4, 4, 3)).astype(np.float32) for i, n in enumerate(sizes)]


def direct(model, data):
    """Mean and unbiased variance of all values that each norm gets in training mode, in float64."""
    first, second = [], []
    for x in data:
        y = np.asarray(model.conv1(x), np.float64)
        first.append(y.reshape(-1, 4))
        y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
        z = np.asarray(model.blocks[0](np.maximum(y, 0).astype(np.float32)), np.float64)
        second.append(z.reshape(-1, 5))
        z = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + 1e-5)
        second.append(z.reshape(-1, 5) + 1)
    values = np.concatenate(first), np.concatenate(second)
    return [(v.mean(0), v.var(0, ddof=1)) for v in values]


@pytest.mark.parametrize("norm", [BatchNorm, nnx.BatchNorm])
def test_statistics_are_those_of_all_values(norm):
    model = Net(norm, nnx.Rngs(0))
    model.norm1.mean.set_value(jnp.full(4, jnp.nan))
    model.eval()
    data = batches(2, 5, 3)
    before = values(model)
    graphdef = nnx.graphdef(model)
    update_statistics(model, iter(data))
    for one, (mean, var) in zip((model.norm1, model.blocks[1]), direct(model, data), strict=True):
        np.testing.assert_allclose(one.mean[...], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.var[...], var, rtol=1e-5)
    assert nnx.graphdef(model) == graphdef
    after = values(model)
    for state in (before, after):
        for place in (state["norm1"], state["blocks"][1]):
            del place["mean"], place["var"]
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_far_from_zero_and_over_many_batches_no_digits_are_lost():
    rng = np.random.default_rng(0)
    data = [rng.normal(-2600 + i % 7, 4, (512, 3)).astype(np.float32) for i in range(60)]
    norm = BatchNorm(3, rngs=nnx.Rngs(0))
    update_statistics(norm, data)
    values = np.concatenate(data).astype(np.float64)
    np.testing.assert_allclose(norm.mean[...], values.mean(0), rtol=5e-7)
    np.testing.assert_allclose(norm.var[...], values.var(0, ddof=1), rtol=2e-5)


def test_masked_values_are_not_counted():
    rng = np.random.default_rng(0)
    data = [(rng.normal(size=(6, 2)), rng.random((6, 1)) < 0.7) for _ in range(3)]
    data.append((np.full((6, 2), 100.0), np.zeros((6, 1), bool)))
    norm = BatchNorm(2, rngs=nnx.Rngs(0))
    update_statistics(norm, data, lambda norm, batch: norm(batch[0], mask=batch[1]))
    seen = np.concatenate([x[mask[:, 0]] for x, mask in data])
    np.testing.assert_allclose(norm.mean[...], seen.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], seen.var(0, ddof=1), rtol=1e-5)


def test_scanned_layers_have_statistics_of_their_own():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return BatchNorm(2, rngs=rngs)

    class Scanned(nnx.Module):
        def __init__(self):
            self.layers = make(nnx.Rngs(0))

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def through(layer, x):
                return jnp.tanh(layer(x)) * 3

            return through(self.layers, x)

    model = Scanned()
    data = [np.random.default_rng(i).normal(i, 1, (8, 2)).astype(np.float32) for i in range(2)]
    update_statistics(model, data)
    for layer in range(3):
        values = np.concatenate(data).astype(np.float64)
        np.testing.assert_allclose(model.layers.mean[layer], values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.layers.var[layer], values.var(0, ddof=1), rtol=1e-4)
        data = [np.tanh((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)) * 3 for x in data]


def test_forward_may_say_how_the_model_is_called():
    norm = BatchNorm(1, rngs=nnx.Rngs(0))

    def forward(norm, batch):
        return norm(batch["x"], use_running_average=True)

    update_statistics(norm, [{"x": jnp.array([[1.0], [3.0]])}], forward)
    assert (float(norm.mean[0]), float(norm.var[0])) == (2.0, 2.0)


def test_without_norms_nothing_is_read():
    update_statistics(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), iter(lambda: 1 / 0, None))


def test_too_little_data():
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="there are no batches"):
        update_statistics(norm, [])
    with pytest.raises(ValueError, match="the model itself got a single value"):
        update_statistics(norm, [jnp.ones((1, 2))])
    np.testing.assert_array_equal(norm.var[...], 1)
