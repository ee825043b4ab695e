"""PyTorch state dicts: names, layouts, strictness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jadder.models import BasicBlock, ResNet, load_torch_state
from jadder.models.images import flatten

# A ResNet of two blocks, as PyTorch names and shapes its arrays.
KERNELS = {
    "conv1.weight": (4, 3, 3, 3),
    "layer1.0.conv1.adder": (4, 4, 3, 3),
    "layer1.0.conv2.adder": (4, 4, 3, 3),
    "layer2.0.conv1.adder": (8, 4, 3, 3),
    "layer2.0.conv2.adder": (8, 8, 3, 3),
    "layer2.0.downsample.0.adder": (8, 4, 1, 1),
    "fc.weight": (5, 8, 1, 1),
}
NORMS = {
    "bn1": 4,
    "layer1.0.bn1": 4,
    "layer1.0.bn2": 4,
    "layer2.0.bn1": 8,
    "layer2.0.bn2": 8,
    "layer2.0.downsample.1": 8,
    "bn2": 5,
}


def small(**options):
    options = {"width": 4, "rngs": nnx.Rngs(0)} | options
    return ResNet((1, 1), BasicBlock, 5, **options)


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    state = {name: random.normal(size=shape) for name, shape in KERNELS.items()}
    for norm, features in NORMS.items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = random.uniform(0.5, 2, features)
        state[f"{norm}.num_batches_tracked"] = np.asarray(100)
    return state


def test_every_array_arrives_in_its_place(arrays):
    model = small()
    load_torch_state(model, arrays)
    block = model.layer2[0]
    shortcut, shortcut_norm = block.downsample
    for variable, name in (
        (model.conv1.kernel, "conv1.weight"),
        (block.conv1.kernel, "layer2.0.conv1.adder"),
        (shortcut.kernel, "layer2.0.downsample.0.adder"),
    ):
        out, into, row, column = 1, 2, 0, -1
        assert variable[row, column, into, out] == np.float32(arrays[name][out, into, row, column])
        np.testing.assert_array_equal(
            variable[...], np.einsum("oihw->hwio", arrays[name]).astype(np.float32)
        )
    np.testing.assert_array_equal(
        model.fc.kernel[...], arrays["fc.weight"][:, :, 0, 0].T.astype(np.float32)
    )
    for variable, name in (
        (shortcut_norm.scale, "weight"),
        (shortcut_norm.bias, "bias"),
        (shortcut_norm.mean, "running_mean"),
        (shortcut_norm.var, "running_var"),
    ):
        expected = arrays[f"layer2.0.downsample.1.{name}"].astype(np.float32)
        np.testing.assert_array_equal(variable[...], expected)


def test_nothing_initial_is_left(arrays):
    one, other = small(rngs=nnx.Rngs(1)), small(rngs=nnx.Rngs(2))
    load_torch_state(one, arrays)
    load_torch_state(other, arrays)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


def test_abstract_model_becomes_a_whole_one_of_its_dtype(arrays):
    with jax.enable_x64(True):
        model = nnx.eval_shape(lambda: small(param_dtype=jnp.float64))
        load_torch_state(model, arrays)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
        assert model.bn2.var[...].dtype == jnp.float64
        np.testing.assert_array_equal(model.bn2.var[...], arrays["bn2.running_var"])


def test_linear_classifier_and_missing_counters_are_accepted(arrays):
    arrays = {k: v for k, v in arrays.items() if not k.endswith("num_batches_tracked")}
    expected = small()
    load_torch_state(expected, arrays)
    model = small()
    load_torch_state(model, arrays | {"fc.weight": arrays["fc.weight"][:, :, 0, 0]})
    np.testing.assert_array_equal(model.fc.kernel[...], expected.fc.kernel[...])


def test_the_prefix_of_dataparallel_is_taken_away(arrays):
    expected, model = small(), small()
    load_torch_state(expected, arrays)
    wrapped = {f"module.{name}": array for name, array in arrays.items()}
    load_torch_state(model, wrapped)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(expected), nnx.state(model))
    with pytest.raises(ValueError, match=r"module\.bn1\.weight: left over"):
        load_torch_state(model, wrapped | {"fc.weight": arrays["fc.weight"]})


def test_multiplying_twin_names_all_kernels_weight(arrays):
    twin = small(family="conv")
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.adder: left over"):
        load_torch_state(twin, arrays)
    load_torch_state(twin, {name.replace("adder", "weight"): a for name, a in arrays.items()})
    expected = np.einsum("oihw->hwio", arrays["layer1.0.conv1.adder"]).astype(np.float32)
    np.testing.assert_array_equal(twin.layer1[0].conv1.kernel[...], expected)


def test_all_faults_are_listed_in_order_and_the_model_is_unchanged(arrays):
    del arrays["bn1.bias"]
    del arrays["layer1.0.conv1.adder"]
    arrays["layer1.0.conv1.weight"] = np.zeros((4, 4, 3, 3))
    arrays["conv1.num_batches_tracked"] = np.asarray(1)
    arrays["layer2.0.conv1.adder"] = np.zeros((3, 3, 4, 8))
    arrays["bn2.weight"] = np.ones(5, np.int64)
    model = small()
    before = nnx.clone(model)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_torch_state(model, arrays)
    assert str(caught.value).splitlines() == [
        "the PyTorch state does not fit the model:",
        "  bn1.bias: missing, expected (4,)",
        "  bn2.weight: has dtype int64, expected a floating one",
        "  conv1.num_batches_tracked: left over",
        "  layer1.0.conv1.adder: missing, expected (4, 4, 3, 3)",
        "  layer1.0.conv1.weight: left over",
        "  layer2.0.conv1.adder: has shape (3, 3, 4, 8), expected (8, 4, 3, 3)",
    ]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(before), nnx.state(model))


def test_features_are_flattened_in_pytorchs_order():
    """A feature's place in a linear kernel must be PyTorch's: channel, then row, then column."""
    maps = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    expected = np.stack([maps[:, :, :, channel].reshape(2, -1) for channel in range(5)], axis=1)
    np.testing.assert_array_equal(flatten(jnp.asarray(maps)), expected.reshape(2, -1))
