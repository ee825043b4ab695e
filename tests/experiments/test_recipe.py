"""training.config and training.optimizer: options, defaults and the learning rate."""

import dataclasses
import math
import shlex
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.common.errors import UserError
from experiments.training.config import IMPLEMENTATIONS, TrainConfig, make_parser, parse
from experiments.training.optimizer import Recipe, choose, make, warmup_cosine
from jadder.implementations import Implementation


def test_no_options_are_the_defaults() -> None:
    assert parse([]) == TrainConfig()


def test_every_field_is_an_option_with_help() -> None:
    text = make_parser().format_help()
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"]


def test_options_are_read() -> None:
    config = parse(
        shlex.split(
            "--family euclid conv --learning-rate 0.05 --batch-size 7 --augment none --resume "
            "--limit-train 9 --name x --model-options norm=batch depth=2"
        )
    )
    assert config == TrainConfig(
        family=("euclid", "conv"), learning_rate=0.05, batch_size=7, augment="none", resume=True,
        limit_train=9, name="x", model_options=("norm=batch", "depth=2"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--epochs 0", "--epochs must be positive, got 0"),
        ("--epochs 1.5", "invalid int value: '1.5'"),
        ("--learning-rate nan", "--learning-rate must be positive, got nan"),
        ("--eta -1", "--eta must be positive, got -1.0"),
        ("--momentum 1", "--momentum must be below 1"),
        ("--bias-rate 0", "--bias-rate must be positive, got 0.0"),
        ("--kernel-max nan", "--kernel-max must be a number of at most 1e+38, got nan"),
        ("--kernel-min 2 --kernel-max 1", "--kernel-min must be at most --kernel-max 1.0, got 2.0"),
        ("--anneal slowly", "invalid choice: 'slowly'"),
        ("--distill-weight 1.5", "--distill-weight must be at most 1, got 1.5"),
        ("--distill-temperature 0", "--distill-temperature must be positive, got 0.0"),
        ("--seed -3", "--seed must be zero or more"),
        ("--family adder adder", "--family must name each family once"),
        ("--family shift", "invalid choice: 'shift'"),
        ("--optimizer lion", "invalid choice: 'lion'"),
        ("--augment mixup", "invalid choice: 'mixup'"),
        ("--implementation cuda", "invalid choice: 'cuda'"),
        ("--model-options norm", "--model-options must be NAME=VALUE, each once, got 'norm'"),
        ("--model-options a=1 a=2", "--model-options must be NAME=VALUE, each once, got 'a=2'"),
        ("--name ../x", "--name must be a plain folder name"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ],
)
def test_wrong_options(options: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(options.split())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_implementations_can_be_asked_for() -> None:
    assert set(IMPLEMENTATIONS) == set(get_args(Implementation))


def test_model_arguments_are_plain_values() -> None:
    options = ("norm=batch", "depth=2", "identity=True", "rate=0.5", "rule=None", "parts=('q','k')")
    assert TrainConfig(model_options=options).model_arguments() == {
        "norm": "batch", "depth": 2, "identity": True, "rate": 0.5, "rule": None,
        "parts": ("q", "k"),
    }  # fmt: skip


def test_names_tell_runs_apart() -> None:
    config = TrainConfig(model="m", dataset="tfds:a/b")
    assert config.run_name("adder") == "tfds_a_b-m-adder-s0"
    names = {
        dataclasses.replace(config, **change).run_name("adder")
        for change in ({}, {"seed": 1}, {"model": "n"}, {"dataset": "c"}, {"name": "x"})
    }
    assert len(names) == 5
    both = TrainConfig(name="x", family=("adder", "conv"))
    assert both.run_name("adder") != both.run_name("conv")


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({"model": "resnet20"}, Recipe("sgd", 0.1, 5e-4)),
        ({"model": "vit"}, Recipe("adamw", 1e-3, 0.05)),
        ({"model": "swin"}, Recipe("adamw", 1e-3, 0.05)),
        ({"model": "resnet20", "optimizer": "adamw"}, Recipe("adamw", 1e-3, 0.05)),
        ({"learning_rate": 0.3, "weight_decay": 0.0}, Recipe("sgd", 0.3, 0.0)),
        ({"optimizer": "muon"}, Recipe("muon", 0.1, 5e-4)),
    ],
)
def test_recipe(changes: dict[str, Any], recipe: Recipe) -> None:
    assert choose(TrainConfig(**changes)) == recipe


def first_updates(**changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Of an adder kernel and another parameter, at a rate of 0.1 without weight decay."""
    config = TrainConfig(learning_rate=0.1, weight_decay=0.0, **changes)
    params = {"adder": jnp.ones((2, 2)), "other": jnp.ones(3)}
    gradients = {"adder": jnp.full((2, 2), 4.0), "other": jnp.full(3, 4.0)}
    mask = {"adder": True, "other": False}
    tx = make(config, choose(config), lambda step: 0.1, mask)
    updates, _ = tx.update(gradients, tx.init(params), params)
    return {name: np.asarray(update) for name, update in updates.items()}


@pytest.mark.parametrize(
    ("changes", "adder", "other"),
    [
        # ‖g‖ is 8 and √k is 2: AdderNet's step is η · 2 / 8 · 4 = η.
        ({"optimizer": "sgd"}, -0.02, -0.4),
        ({"optimizer": "sgd", "eta": 0.5}, -0.05, -0.4),
        ({"optimizer": "sgd", "adaptive_scaling": "off"}, -0.4, -0.4),
        ({"optimizer": "sgd", "kernel_min": 0.99, "kernel_max": 3.0}, -0.01, -0.4),
        # Adam's first step is the rate, whatever the gradient.
        ({"optimizer": "adamw"}, -3.0, -0.1),
        ({"optimizer": "adamw", "adder_rate": 3.0}, -0.3, -0.1),
        ({"optimizer": "adamw", "adder_rate": 3.0, "adaptive_scaling": "on"}, -0.3, -0.1),
    ],
)
def test_sizes_of_steps(changes: dict[str, Any], adder: float, other: float) -> None:
    updates = first_updates(**changes)
    np.testing.assert_allclose(updates["adder"], np.full((2, 2), adder), rtol=1e-5)
    np.testing.assert_allclose(updates["other"], np.full(3, other), rtol=1e-5)


NORM = {"scale": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}


def norm_updates(**changes: Any) -> dict[str, float]:
    """Of a normalisation whose gradients are 1, at a rate of 0.1 with a decay of 0.01."""
    config = TrainConfig(weight_decay=0.01, **changes)
    params = {"norm": NORM, "kernel": jnp.ones((2, 3))}
    tx = make(config, choose(config), lambda step: 0.1, {"norm": False, "kernel": True})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {name: float(update[0]) for name, update in updates["norm"].items()}


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_norms_take_rates_and_decay_of_their_own(optimizer: str) -> None:
    decayed = pytest.approx(-0.1 * 1.02)
    assert norm_updates(optimizer=optimizer) == {"scale": decayed, "bias": decayed}
    changed = norm_updates(optimizer=optimizer, bias_rate=16.0, decay_norms=False)
    assert changed == {"scale": pytest.approx(-0.1), "bias": pytest.approx(-1.6)}


@pytest.mark.parametrize("adds", [True, False])
def test_muon_makes_steps_orthogonal(adds: bool) -> None:
    """Of adder kernels; of a network that has none, of convolutions' kernels."""
    mask = {"first": adds, "other": False}
    config = TrainConfig(optimizer="muon", weight_decay=0.0, eta=0.5)
    rng = np.random.default_rng(0)
    shape = (8, 4) if adds else (2, 2, 2, 4)
    gradients = {"first": rng.normal(size=shape), "other": rng.normal(size=(8, 4))}
    params = jax.tree.map(jnp.ones_like, gradients)
    tx = make(config, choose(config), lambda step: 0.1, mask)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    step = np.asarray(updates["first"]).reshape(8, 4)
    singular = np.linalg.svd(step, compute_uv=False)
    # Five iterations of Newton and Schulz leave singular values between 0.7 and 1.2 times one size,
    # which makes each element's root mean square eta.
    np.testing.assert_allclose(singular, 0.1 * 0.5 * np.sqrt(8), rtol=0.35)
    np.testing.assert_allclose(updates["other"], -0.1 * gradients["other"], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 5), st.floats(1e-4, 1))
def test_schedule(epochs: int, steps_per_epoch: int, warmup_epochs: float, peak: float) -> None:
    total = epochs * steps_per_epoch
    schedule = warmup_cosine(
        peak, total_steps=total, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs
    )
    rates = [float(schedule(step)) for step in range(total + 1)]
    warmup = max(1, min(round(warmup_epochs * steps_per_epoch), total // 10))
    tolerance = 1e-6 * peak
    # Every step of the rise moves the weights, the last one with the peak rate.
    for step in range(warmup):
        assert abs(rates[step] - peak * (step + 1) / warmup) < tolerance
    # Then half a period of a cosine, with 0 at the end of the run.
    for step in range(warmup, total):
        phase = (step - warmup) / (total - warmup)
        assert abs(rates[step] - peak * (1 + math.cos(math.pi * phase)) / 2) < tolerance
    if total > warmup:
        assert abs(rates[total]) < tolerance
