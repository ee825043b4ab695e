"""Models as files: what is saved comes back, and no other file does."""

import json
import os
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import strategies

import jadder
from jadder import models
from jadder.models.files import to_bytes


def create(name, **options):
    """A model with other values everywhere than those that it is made with; nothing is compiled."""
    return shaken(nnx.eval_shape(lambda: models.create(name, **options, rngs=nnx.Rngs(1))))


def lenet(**changes):
    return create("lenet5", **{"image_size": 8, "channels": 1, "num_classes": 4} | changes)


def shaken(model):
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        noise = rng.uniform(0.5, 1.5, variable.get_value().shape)
        variable.set_value(jnp.asarray(noise, variable.get_value().dtype))
    return model


def assert_equal(model, other):
    ours, theirs = (nnx.to_flat_state(nnx.state(each)) for each in (model, other))
    for (path, a), (other_path, b) in zip(ours, theirs, strict=True):
        assert (path, type(a)) == (other_path, type(b))
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.get_value(), b.get_value())


OPTIONS = {
    "lenet5": {"norm": "centered_batch", "multiply_ends": False},
    "resnet8": {"width": 4, "head_bias": True},
    "vgg_small": {"widths": [4, 8, 4]},
    "vit": {"features": 8, "depth": 2, "num_heads": 2, "mlp_features": 8, "norm": "batch",
            "kernel_std": 0.5, "family_parts": ("qkv", "mlp")},
}  # fmt: skip


@pytest.mark.parametrize("family", ["adder", "conv", "euclid"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_comes_back(name, family, tmp_path):
    options = {k: v for k, v in OPTIONS[name].items() if k != "norm" or family == "adder"}
    model = create(name, family=family, image_size=8, num_classes=3, **options)
    models.save(model, tmp_path / "m", mean=[0.1, 0.2, 0.3], std=0.5, class_names="abc")
    again, description = models.load(tmp_path / "m")
    assert_equal(model, again)
    assert description.class_names == ("a", "b", "c")
    assert description.std == (0.5, 0.5, 0.5)
    architecture = description.architecture
    assert (architecture.model, architecture.family) == (name, family)
    assert architecture == model.architecture == again.architecture
    # To the byte, and no other file lies there.
    models.save(again, tmp_path / "n", mean=[0.1, 0.2, 0.3], std=0.5, class_names="abc")
    assert (tmp_path / "m").read_bytes() == (tmp_path / "n").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"m", "n"}


def test_the_loaded_model_evaluates_as_the_saved_one(tmp_path):
    model = lenet(family="conv")
    images = jnp.linspace(0, 1, 128).reshape(2, 8, 8, 1)
    models.save(model, tmp_path / "m")
    again = models.load(tmp_path / "m").model
    logits = again(images)
    model.eval()
    np.testing.assert_array_equal(logits, model(images))
    np.testing.assert_array_equal(again.bn1.mean[...], model.bn1.mean[...])


def test_dtypes(tmp_path):
    model = lenet(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    models.save(model, tmp_path / "m")
    again = models.load(tmp_path / "m").model
    assert again.fc1.kernel.dtype == jnp.bfloat16
    assert_equal(model, again)
    models.save(lenet(), tmp_path / "h", param_dtype=jnp.float16)
    arrays = safetensors.numpy.load_file(tmp_path / "h")
    assert arrays["fc1.kernel"].dtype == np.float16
    assert arrays["bn1.var"].dtype == np.float32
    assert models.load(tmp_path / "h").model.fc1.kernel.dtype == jnp.float32
    model = lenet()
    model.fc1.kernel[...] = model.fc1.kernel[...].at[0, 0].set(1e5)
    with pytest.raises(ValueError, match=r"fc1\.kernel has values beyond float16"):
        models.save(model, tmp_path / "h", param_dtype=jnp.float16)


def test_rule_is_kept_and_implementation_is_not(tmp_path):
    import dataclasses

    family = dataclasses.replace(
        models.get_family("adder"), rule=jadder.SIGN, implementation="reference"
    )
    model = lenet(family=family)
    jadder.set_implementation(model, "xla")
    models.save(model, tmp_path / "m")
    again = models.load(tmp_path / "m").model
    assert again.conv2.conv_general_dilated.rule == jadder.SIGN
    assert again.conv2.conv_general_dilated.implementation is None


def changed_norm():
    model = lenet()
    model.bn2.momentum = 0.5
    return model


def halfway():
    model = lenet()
    jadder.set_l1_share(model, 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: models.LeNet5(family="conv", rngs=nnx.Rngs(0)), "LeNet5 that does not say what"),
        (lambda: jadder.adderize(lenet(family="conv")), "has changed since it was created"),
        (changed_norm, "'momentum': 0.5"),
        (halfway, "at 0.5, not conv2"),
        (lambda: lenet(family=models.Family(
            name="adder", conv_class=nnx.Conv, linear_class=nnx.Linear, projection_class=nnx.Linear
        )), "does not say what it was made of"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved(make, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        models.save(make(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"class_names": ["a"]}, "class_names: 4 expected, got 1"),
        ({"class_names": [1, 2, 3, 4]}, "strings expected"),
        ({"mean": 0.5}, "1 numbers each expected"),
        ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "1 numbers each expected"),
        ({"mean": 0.5, "std": 0.0}, "positive deviations expected"),
        ({"mean": np.nan, "std": 1.0}, "finite means"),
    ],
)
def test_descriptions_that_do_not_fit(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        models.save(lenet(), tmp_path / "m", **options)


def test_an_abstract_model_has_nothing_to_save(tmp_path):
    model = nnx.eval_shape(lambda: models.create("resnet8", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"bn1\.bias has no value"):
        models.save(model, tmp_path / "m")


def test_normalize():
    description = models.Description(lenet().architecture, mean=(0.5,), std=(0.25,))
    images = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(description.normalize(images).ravel(), [-2, 2], rtol=1e-6)
    with pytest.raises(TypeError, match="must be uint8, got float32"):
        description.normalize(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"width, 1\) expected, got \(1, 2, 1, 1, 3\)"):
        description.normalize(np.zeros((1, 2, 1, 1, 3), np.uint8))
    with pytest.raises(ValueError, match="does not say the mean"):
        models.Description(lenet().architecture).normalize(images)


# -- Files that are none ---------------------------------------------------------------------------

CONTENT = to_bytes(lenet(family="conv"), mean=0.5, std=0.5, class_names="abcd")


def altered(change=None, arrays=None):
    """The file with another header entry, or with other arrays and the checksum as it was."""
    length = int.from_bytes(CONTENT[:8], "little")
    entry = json.loads(json.loads(CONTENT[8 : 8 + length])["__metadata__"]["jadder"])
    if change is not None:
        change(entry)
    tensors = safetensors.numpy.load(CONTENT)
    if arrays is not None:
        arrays(tensors)
    text = json.dumps(entry) if isinstance(entry, dict) else entry
    return safetensors.numpy.save(tensors, {"jadder": text})


def setting(*keys, to):
    def change(entry):
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = to

    return change


def with_options(**options):
    return altered(setting("architecture", "options", to=options))


def move(tensors):
    tensors["fc9.kernel"] = tensors.pop("fc1.kernel")


FAULTS = {
    "empty": (b"", "Error while deserializing header|[Hh]eader"),
    "cut in the header": (CONTENT[:50], "[Hh]eader"),
    "cut in the arrays": (CONTENT[:-1], "MetadataIncompleteBuffer|incomplete|invalid"),
    "longer": (CONTENT + b"\0", "MetadataIncompleteBuffer|incomplete|invalid"),
    "huge header": (b"\xff" * 8 + CONTENT[8:], "[Hh]eader"),
    "another format": (b"PK\x03\x04" + bytes(200), "[Hh]eader"),
    "text": (b"not a model at all, but some words in a file", "[Hh]eader"),
    "a value changed": (CONTENT[:-3] + b"\x40" + CONTENT[-2:], "it is not as it was saved"),
    "a word changed": (altered(setting("class_names", to=list("abce"))), "it is not as it was"),
    "foreign": (safetensors.numpy.save({"w": np.ones(3)}), "no entry 'jadder'"),
    "foreign too": (safetensors.numpy.save({"w": np.ones(3)}, {"format": "pt"}), "no ent"),
    "no JSON": (safetensors.numpy.save({"w": np.ones(3)}, {"jadder": "{"}), "its header: "),
    "brackets": (
        safetensors.numpy.save({"w": np.ones(3)}, {"jadder": "[" * 200_000}), "too many brackets",
    ),
    "a list": (safetensors.numpy.save({"w": np.ones(3)}, {"jadder": "[]"}), "an object expected"),
    "later version": (altered(setting("version", to=2)), "version: 1 expected, got 2"),
    "field missing": (altered(lambda entry: entry.pop("std")), "the fields format, version"),
    "field too many": (altered(setting("code", to="import os")), "the fields format, version"),
    "unknown model": (altered(setting("architecture", "model", to="os.system")), "unknown model"),
    "model is a list": (altered(setting("architecture", "model", to=[])), "a str expected"),
    "unknown family": (altered(setting("architecture", "family", to="x")), "unknown family"),
    "unknown option": (with_options(cmd=1), "unexpected keyword argument"),
    "option of objects": (with_options(norm={"a": 1}), "a plain value expected"),
    "unknown dtype": (with_options(dtype="O O"), "dtype|data type"),
    "rngs given twice": (with_options(rngs=1), "multiple values"),
    "huge network": (with_options(norm=[10**9]), "numbers from 0"),
    "negative": (with_options(norm=-1), "numbers from 0"),
    "huge images": (altered(setting("architecture", "image_size", to=[10**9, 8])), "image_size: 1"),
    "other images": (altered(setting("architecture", "image_size", to=[28, 28])), "has the shape"),
    "rule of a multiplying family": (
        altered(setting("architecture", "rule", to={"x": [1, 1], "kernel": [1, "inf"]})),
        "takes no rule",
    ),
    "class names": (altered(setting("class_names", to=["a"])), "class_names: 4 expected"),
    "deviation": (altered(setting("std", to=[0])), "positive deviations"),
    "mean": (altered(setting("mean", to=["0.5"])), "a list of numbers expected"),
    "array missing": (altered(arrays=lambda t: t.pop("bn1.var")), "'bn1.var' of its model is miss"),
    "array renamed": (altered(arrays=move), "'fc1.kernel' of its model is missing"),
    "array too many": (altered(arrays=lambda t: t.update(x=np.ones(2))), "it has an array 'x'"),
    "array of another shape": (
        altered(arrays=lambda t: t.update({"bn1.var": np.ones(7)})), "bn1.var has the shape",
    ),
    "array of integers": (
        altered(arrays=lambda t: t.update({"bn1.var": np.ones(6, int)})), "bn1.var is 'I64'",
    ),
    "empty array": (altered(arrays=lambda t: t.update(x=np.ones((0, 10**9)))), "an empty array"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_for_a_file_that_holds_no_model(fault, tmp_path):
    content, text = FAULTS[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        models.load(path)
    assert str(caught.value).startswith(f"{path} holds no model of jadder: ")
    assert "\n" not in str(caught.value)


@hypothesis.given(
    place=strategies.integers(0, len(CONTENT) - 1), change=strategies.integers(1, 255)
)
@hypothesis.settings(max_examples=100)
def test_a_changed_byte_is_noticed_or_changes_nothing(place, change, tmp_path_factory):
    content = bytearray(CONTENT)
    content[place] ^= change
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(content)
    try:
        model, description = models.load(path)
    except ValueError:
        return
    path.write_bytes(CONTENT)
    expected = models.load(path)
    assert description == expected.description
    assert_equal(model, expected.model)


def test_places_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises((ValueError, IsADirectoryError), match=r"regular file|directory"):
            models.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    models.save(lenet(), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def fail(*args):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        models.save(lenet(family="conv"), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == before
