"""From networks to integer programs: how close they are, what they consist of, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder.integer import Convolution, MaxPool, Rescale
from tests.integer import oracle
from tests.integer.test_trace import Own

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)


def pixels(count=96, side=12, channels=3):
    """Images with large structures, so that statistics of a few of them are those of all."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 3, 3, channels)).astype(np.float32)
    smooth = jax.image.resize(coarse, (count, side, side, channels), "linear")
    return np.asarray(jnp.clip(smooth, 0, 255), np.uint8)


def normalized(images):
    return ((images / 255 - np.asarray(MEAN)) / np.asarray(STD)).astype(np.float32)


def trained(family="adder", norm="batch", multiply_ends=True):
    """A small residual network whose running statistics are those of the images."""
    model = jadder.models.ResNet(
        (1, 1), jadder.models.BasicBlock, width=8, family=family, norm=norm,
        multiply_ends=multiply_ends, rngs=nnx.Rngs(0),
    )  # fmt: skip
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    model(jnp.asarray(normalized(pixels())))
    model.eval()
    return model


def relative_error(program, model, images, floats):
    expected = np.asarray(model(jnp.asarray(floats)))
    return np.abs(np.asarray(program(images)) - expected).mean() / expected.std()


@pytest.mark.parametrize("family", ["adder", "conv"])
@pytest.mark.parametrize("norm", ["batch", "centered_batch"])
def test_eight_bits_are_close(family, norm):
    model, images = trained(family, norm), pixels()
    program = jadder.quantize(model, images, mean=MEAN, std=STD)
    assert relative_error(program, model, images, normalized(images)) < 0.12
    products = [each for each in program.operations if isinstance(each, Convolution)]
    adders = [each.product == "adder" for each in products]
    assert any(adders) == (family == "adder")
    assert not adders[0]
    assert not adders[-1]
    assert any(each.center for each in products) == (norm == "centered_batch")
    values = oracle.every_value(program, images[:2])
    expected = values[-1].reshape(2, -1) * program.output.scale[0]
    np.testing.assert_allclose(program(images[:2]), expected, rtol=1e-6)


def test_fewer_bits_are_further_away_and_on_smaller_grids():
    model, images = trained(), pixels()
    errors = []
    for bits in (8, 5, 3, 2):
        program = jadder.quantize(model, images, bits=bits, mean=MEAN, std=STD)
        errors.append(relative_error(program, model, images, normalized(images)))
        for operation in program.operations:
            if isinstance(operation, Convolution) and operation.product == "adder":
                assert operation.kernel.max() <= 2**bits - 1
                assert program.values[operation.input].maximum == 2**bits - 1
    assert sorted(errors) == errors
    assert errors[1] < 0.3


def test_floats_in_and_adders_at_the_ends():
    model, images = trained(multiply_ends=False), pixels()
    floats = normalized(images)
    program = jadder.quantize(model, floats)
    assert program.float_input
    assert relative_error(program, model, floats, floats) < 0.15
    of_pixels = jadder.quantize(model, images, mean=MEAN, std=STD)
    assert isinstance(of_pixels.operations[0], Rescale)  # one grid for all channels
    assert relative_error(of_pixels, model, images, floats) < 0.15


def test_a_network_of_ones_own():
    model = Own(nnx.Rngs(0))
    model.norm.momentum = 0.0
    floats = normalized(pixels(side=16))
    model(jnp.asarray(floats))
    model.eval()
    program = jadder.quantize(model, floats)
    assert any(isinstance(each, MaxPool) for each in program.operations)
    assert relative_error(program, model, floats, floats) < 0.1


def test_vectors_are_images_of_one_pixel():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(6, 16, rngs=rngs), nnx.relu, jadder.AdderLinear(16, 4, rngs=rngs)
    )
    x = np.asarray(jax.random.normal(rngs.params(), (128, 6)))
    program = jadder.quantize(lambda x: model(x.reshape(-1, 6)), x)
    expected = np.asarray(model(x))
    assert np.abs(np.asarray(program(x)) - expected).mean() < 0.05 * expected.std()


def test_a_dead_feature_and_a_tiny_scale():
    model, images = trained(), pixels()
    norm = model.layer1[0].bn1
    norm.scale[...] = norm.scale[...].at[0].set(0.0).at[1].set(3e-5).at[2].multiply(-1)
    model.layer1[0].conv2.kernel[...] = model.layer1[0].conv2.kernel[...].at[..., 3].set(-100.0)
    program = jadder.quantize(model, images, mean=MEAN, std=STD)
    assert relative_error(program, model, images, normalized(images)) < 0.15


def test_the_model_is_not_changed_and_need_not_be_in_evaluation_mode():
    model, images = trained(), pixels()
    expected = jadder.quantize(model, images, mean=MEAN, std=STD)(images[:4])
    model.train()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_array_equal(
        jadder.quantize(model, images, mean=MEAN, std=STD)(images[:4]), expected
    )
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not model.bn1.use_running_average


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (ValueError, "bits must be an integer from 2 to 8, got 9", {"bits": 9}),
        (ValueError, "bits must be an integer from 2 to 8, got 3.0", {"bits": 3.0}),
        (ValueError, "residual_bits must be", {"residual_bits": 1}),
        (TypeError, "need mean and std", {"mean": None}),
        (ValueError, "positive deviations", {"std": 0.0}),
        (ValueError, "one for each of the 3 channels", {"mean": (0.5, 0.5)}),
        (TypeError, "uint8 or floats, got int32", {"images": np.zeros((2, 12, 12, 3), np.int32)}),
        (TypeError, "belong to uint8", {"images": np.zeros((2, 12, 12, 3), np.float32)}),
        (ValueError, "expected, got", {"images": np.zeros((0, 12, 12, 3), np.uint8)}),
        (ValueError, "expected images of", {"images": np.zeros((2, 12, 12, 1), np.uint8)}),
    ],
)
def test_refusals(error, text, options):
    arguments = {"images": pixels(4), "mean": MEAN[0], "std": STD[0]} | options
    with pytest.raises(error, match=text):
        jadder.quantize(trained(), arguments.pop("images"), **arguments)


def test_a_call_with_the_wrong_images_is_refused():
    program = jadder.quantize(trained(), pixels(8), mean=MEAN, std=STD)
    with pytest.raises(TypeError, match="takes uint8 pixels, got float32"):
        program(normalized(pixels(2)))
    with pytest.raises(ValueError, match=r"takes images \(batch, 12, 12, 3\), got \(2, 8, 12, 3\)"):
        program(pixels(2)[:, :8])


def test_hybrid_keeps_floats_around_the_products():
    options = {"image_size": 8, "features": 16, "mlp_features": 16, "num_heads": 2, "depth": 1}
    model = jadder.models.create("vit", family="adder", rngs=nnx.Rngs(0), **options)
    images = pixels(side=8)
    model(jnp.asarray(normalized(images)))
    model.eval()
    with pytest.raises(ValueError, match="has no integer form"):
        jadder.quantize(model, images, mean=MEAN, std=STD)
    program = jadder.quantize(model, images, mean=MEAN, std=STD, hybrid=True)
    assert len(program.products) == 6
    assert all(each.kernel.dtype == np.uint8 for each in program.products)
    assert relative_error(program, model, images, normalized(images)) < 0.1


@pytest.mark.skipif(
    not jadder.implementations()["cpu"].available, reason="Euclid products are primitives natively"
)
def test_native_euclid_products_are_not_taken_for_adders():
    x = np.random.default_rng(0).uniform(size=(16, 6)).astype(np.float32)
    w, v = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(1).normal(size=(2, 6, 6)))

    def model(x):
        return jadder.adder_matmul(jadder.euclid_matmul(x, v, implementation="cpu") + 5, w)

    with pytest.raises(ValueError, match="of squared differences has no integer form"):
        jadder.quantize(model, x)
    assert len(jadder.quantize(model, x, hybrid=True).products) == 1
