"""An AdderNet ResNet-20 that others trained in PyTorch, reproduced in float64 to 1e-9."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jadder.models import load_torch_state, resnet20
from jadder.optim import scale_by_adder

PEER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "peer_resnet20_adder.npz"
TOLERANCE = 1e-9
# The file holds this array rounded to float32, half a unit of which is 6e-8.
FLOAT32_TOLERANCE = 1e-7

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no {PEER.name} in ../shared/data")


@pytest.fixture(scope="module")
def peer():
    with np.load(PEER) as file:
        return dict(file)


def under(peer, prefix):
    prefix = f"{prefix}/"
    return {key.removeprefix(prefix): peer[key] for key in peer if key.startswith(prefix)}


def network(arrays, dtype):
    model = nnx.eval_shape(lambda: resnet20(param_dtype=dtype, rngs=nnx.Rngs(0)))
    load_torch_state(model, arrays)
    return model


def loss_and_logits(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def relative_error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def largest_error(actual, expected):
    """The largest relative error of all arrays of two states, and the path of that array."""
    pairs = zip(nnx.to_flat_state(actual), nnx.to_flat_state(expected), strict=True)
    errors = []
    for (path, array), (expected_path, expected_array) in pairs:
        assert path == expected_path
        errors.append((relative_error(array[...], expected_array[...]), path))
    return max(errors, key=lambda item: item[0])


@pytest.fixture(scope="module")
def training_step(peer):
    """The network after one forward pass in training mode, and all that the step computed."""
    with jax.enable_x64(True):
        model = network(under(peer, "state"), jnp.float64)
        images = jnp.asarray(peer["x"], jnp.float64).transpose(0, 2, 3, 1)
        gradient = nnx.jit(nnx.value_and_grad(loss_and_logits, argnums=(0, 1), has_aux=True))
        (loss, logits), (grads, images_grad) = gradient(model, images, peer["labels"])
        yield model, loss, logits, grads, images_grad


@pytest.fixture(scope="module")
def expected(peer):
    """A network that holds the peer's gradients in place of parameters, buffers after the step."""

    def holding(*prefixes):
        arrays = under(peer, "train_state_after")
        for prefix in prefixes:
            arrays |= under(peer, prefix)
        return network(arrays, jnp.float64)

    with jax.enable_x64(True):
        yield {"raw": holding("grad_raw"), "scaled": holding("grad_raw", "grad_scaled")}


def test_the_file_is_a_whole_one(peer):
    assert len(under(peer, "state")) == 132
    assert len(under(peer, "grad_raw")) == 66
    assert len(under(peer, "grad_scaled")) == 20


def test_evaluation(peer):
    with jax.enable_x64(True):
        model = network(under(peer, "state"), jnp.float64)
        model.eval()
        images = jnp.asarray(peer["x"], jnp.float64).transpose(0, 2, 3, 1)
        loss, logits = nnx.jit(loss_and_logits)(model, images, peer["labels"])
        assert logits.dtype == jnp.float64
        assert relative_error(logits, peer["eval/logits_f64"]) <= TOLERANCE
        assert relative_error(loss, peer["eval/loss_f64"]) <= TOLERANCE


def test_evaluation_in_float32(peer):
    """PyTorch's own float32 logits lie up to 1e-3 from its float64 ones."""
    model = network(under(peer, "state"), jnp.float32)
    model.eval()
    logits = nnx.jit(lambda model, images: model(images))(
        model, jnp.asarray(peer["x"]).transpose(0, 2, 3, 1)
    )
    assert np.abs(logits - peer["eval/logits_f64"]).max() <= 2e-3
    np.testing.assert_array_equal(logits.argmax(1), peer["eval/logits_f64"].argmax(1))


def test_training_loss_and_logits(peer, training_step):
    _, loss, logits, _, _ = training_step
    assert relative_error(loss, peer["train/loss"]) <= TOLERANCE
    assert relative_error(logits, peer["train/logits"]) <= TOLERANCE


def test_gradient_of_the_images(peer, training_step):
    *_, images_grad = training_step
    error = relative_error(np.asarray(images_grad).transpose(0, 3, 1, 2), peer["train/grad_x"])
    assert error <= FLOAT32_TOLERANCE


def test_gradient_of_every_parameter(training_step, expected):
    *_, grads, _ = training_step
    error, path = largest_error(grads, nnx.state(expected["raw"], nnx.Param))
    assert error <= TOLERANCE, path


def test_scaled_gradient_of_every_parameter(training_step, expected):
    model, _, _, grads, _ = training_step
    with jax.enable_x64(True):
        parameters = nnx.state(model, nnx.Param)
        transform = scale_by_adder(eta=0.2)
        scaled, _ = jax.jit(transform.update)(grads, transform.init(parameters), parameters)
    error, path = largest_error(scaled, nnx.state(expected["scaled"], nnx.Param))
    assert error <= TOLERANCE, path


def test_statistics_after_the_step(training_step, expected):
    model, *_ = training_step
    error, path = largest_error(
        nnx.state(model, nnx.BatchStat), nnx.state(expected["raw"], nnx.BatchStat)
    )
    assert error <= TOLERANCE, path
