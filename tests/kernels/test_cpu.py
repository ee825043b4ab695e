"""The native CPU kernels: what is theirs alone. Their numbers are tested with all others'."""

import concurrent.futures
import functools
import importlib.resources
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jadder
from jadder import SIGN, GradientRule, adder_conv, adder_matmul
from jadder.kernels import cpu
from tests.strategies import normal, seeds

FOUND = jadder.implementations()["cpu"]
pytestmark = pytest.mark.skipif(not FOUND.available, reason=f"cpu: {FOUND.about}")
ROOT = Path(__file__).parents[2]
RULES = (GradientRule(), SIGN, GradientRule((4.0, 2.0), (2.0, 1.0)))
BAD = (np.nan, np.inf, -np.inf)


def with_pullback(product):
    """The product's value and both gradients, compiled."""

    @jax.jit
    def run(x, w, g):
        y, pullback = jax.vjp(product, x, w)
        return y, *pullback(g)

    return run


def spoil(rng, array, count):
    """The array in float32 with some values NaN or infinite."""
    array = array.astype(np.float32)
    for _ in range(count):
        array.flat[rng.integers(array.size)] = BAD[rng.integers(3)]
    return array


def assert_same_with_nan(rule, actual, expected):
    """NaN and infinities where the reference has them, and its numbers elsewhere.

    The full-precision gradient is a difference of two sums, either of which may be infinite: there
    it is one of them that must be where the reference has one.
    """
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        if i == 2 and rule.kernel.is_linear:
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
            a, b = (np.where(np.isfinite(b), array, 0) for array in (a, b))
        scale = np.abs(b[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(a / scale, b / scale, rtol=2e-5, atol=2e-5)


@given(seed=seeds, counts=st.tuples(*[st.integers(0, 2)] * 3), features=st.sampled_from([3, 18]))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["cpu", "cpu_fast"])
def test_matmul_keeps_nan_and_infinities(name, rule, seed, counts, features):
    shapes = (14, 5), (5, features), (14, features)
    rng = np.random.default_rng(seed)
    operands = [spoil(rng, a, n) for a, n in zip(normal(seed, *shapes), counts, strict=True)]
    ours, exact = (
        with_pullback(functools.partial(adder_matmul, rule=rule, implementation=which))(*operands)
        for which in (name, "reference")
    )
    assert_same_with_nan(rule, ours, exact)


@given(seed=seeds, counts=st.tuples(*[st.integers(0, 2)] * 3))
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rule", RULES[:2])
def test_convolution_keeps_nan_and_infinities(groups, rule, seed, counts):
    """Padding and strides must not bring NaN to values that no bad one meets."""
    shapes = (2, 5, 6, 3), (3, 2, 3 // groups, 6), (2, 3, 8, 6)
    rng = np.random.default_rng(seed)
    operands = [spoil(rng, a, n) for a, n in zip(normal(seed, *shapes), counts, strict=True)]
    options = {"strides": (2, 1), "padding": ((1, 1), (1, 2)), "feature_group_count": groups}
    ours, exact = (
        with_pullback(functools.partial(adder_conv, rule=rule, implementation=which, **options))(
            *operands
        )
        for which in ("cpu", "reference")
    )
    assert_same_with_nan(rule, ours, exact)


def test_the_fast_form_is_exact_where_nothing_cancels_and_bounded_where_it_does():
    x, w = (a.astype(np.float32) for a in normal(0, (40, 300), (300, 20)))
    for mean in (0.0, 1000.0):
        exact = np.abs((x + mean)[..., None].astype(float) - (w + mean)).sum(1)
        y = adder_matmul(x + mean, w + mean, implementation="cpu_fast")
        magnitude = np.abs(x + mean).sum(1)[:, None] + np.abs(w + mean).sum(0)
        assert (np.abs(-y - exact) <= 1e-5 * magnitude).all()


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_lower_instruction_sets_pass_the_tests_too(isa):
    """The processor's own runs all tests, and the sanitizers' drivers run on each of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    chosen = ["-k", "(cpu- and (shared or integers)) or keeps_nan or few_channels or asked_for"]
    ran = subprocess.run(
        [*command, *chosen],
        cwd=ROOT,
        # What XLA makes of the programs around the native code does not matter here.
        env={**os.environ, "JADDER_CPU_ISA": isa, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_instruction_set_is_the_one_asked_for_or_less():
    order = ["baseline", "avx2", "avx512"]
    asked = os.environ.get("JADDER_CPU_ISA", "avx512")
    assert order.index(cpu.instruction_set()) <= order.index(asked)
    assert cpu.instruction_set() in FOUND.about


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("JADDER_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"must be one of .*'avx2'.*got 'mmx'"):
        cpu._load.__wrapped__()


@pytest.fixture
def _reloaded():
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


@pytest.mark.usefixtures("_reloaded")
def test_without_the_library_xla_takes_over_and_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    found = jadder.implementations()
    assert not found["cpu"].available
    assert not found["cpu_fast"].available
    assert found["xla"].available
    x, w = (a.astype(np.float32) for a in normal(0, (3, 4), (4, 5)))
    np.testing.assert_array_equal(
        adder_matmul(x, w), adder_matmul(x, w, implementation="xla"), strict=True
    )
    with pytest.raises(ValueError, match=r"adder_dot_general.*'cpu'.*has no native library"):
        adder_matmul(x, w, implementation="cpu")


@pytest.mark.usefixtures("_reloaded")
def test_the_first_product_says_why_the_installation_built_no_library(monkeypatch, tmp_path):
    (tmp_path / "_native").mkdir()
    (tmp_path / "_native" / "missing.txt").write_text("compiling it failed (error: no\n AVX)\n")
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    x, w = (a.astype(np.float32) for a in normal(0, (3, 4), (4, 5)))
    with pytest.warns(jadder.AdderWarning, match=r"library: compiling it failed \(error: no AVX"):
        adder_matmul(x, w)


@pytest.mark.usefixtures("_reloaded")
def test_a_library_that_does_not_load_is_said(monkeypatch, tmp_path):
    (tmp_path / "_native").mkdir()
    (tmp_path / "_native" / "libjadder_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    assert "does not load" in jadder.implementations()["cpu"].about


@pytest.mark.usefixtures("_reloaded")
def test_a_library_built_for_a_newer_jaxlib_is_not_registered(monkeypatch):
    """With such handlers XLA would refuse to start its CPU backend."""
    monkeypatch.setattr("jaxlib.version.__version_info__", (0, 1, 0))
    assert "is older" in jadder.implementations()["cpu"].about


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_platform_is_chosen_when_a_program_is_lowered(platform):
    def loss(x, w):
        return adder_matmul(x, w, rule=SIGN).sum()

    x, w = jnp.ones((3, 4)), jnp.zeros((4, 5))
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, w)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("jadder_matmul_dx" in program) == (platform == "cpu")
    assert ("stablehlo.while" in program) == (platform != "cpu")


def test_export_says_what_it_refuses_and_works_where_that_is_waived():
    x, w = jnp.ones((3, 4)), jnp.zeros((4, 5))
    with pytest.raises(ValueError, match="jadder_matmul"):
        jax.export.export(jax.jit(adder_matmul))(x, w)
    waived = [jax.export.DisabledSafetyCheck.custom_call("jadder_matmul")]
    exported = jax.export.export(jax.jit(adder_matmul), disabled_checks=waived)(x, w)
    np.testing.assert_array_equal(exported.call(x, w), adder_matmul(x, w))
    portable = functools.partial(adder_matmul, implementation="xla")
    np.testing.assert_array_equal(
        jax.export.export(jax.jit(portable))(x, w).call(x, w), adder_matmul(x, w)
    )


def test_results_do_not_depend_on_the_run_or_on_other_threads():
    """Many callers at once, more than the pool has threads, get the bits of one alone."""
    x, w, g = (
        a.astype(np.float32) for a in normal(0, (8, 12, 12, 20), (3, 3, 20, 33), (8, 12, 12, 33))
    )
    programs = [
        with_pullback(functools.partial(adder_conv, rule=rule, implementation="cpu"))
        for rule in RULES
    ]
    expected = [[np.asarray(a) for a in program(x, w, g)] for program in programs]

    def call(i):
        return i % len(programs), jax.block_until_ready(programs[i % len(programs)](x, w, g))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for which, results in pool.map(call, range(48)):
            for actual, exact in zip(results, expected[which], strict=True):
                np.testing.assert_array_equal(actual, exact)


@pytest.mark.parametrize("product", ["matmul", "conv"])
def test_temporaries_are_none_but_inputs_and_outputs(product):
    """The published rule's three products of a training step."""
    if product == "matmul":
        x, w = jnp.zeros((4096, 64)), jnp.zeros((64, 64))
        run = functools.partial(adder_matmul, implementation="cpu")
    else:
        x, w = jnp.zeros((16, 16, 16, 16)), jnp.zeros((3, 3, 16, 16))
        run = functools.partial(adder_conv, implementation="cpu")
    y = run(x, w)
    memory = with_pullback(run).lower(x, w, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= y.nbytes


@pytest.mark.parametrize("name", ["cpu", "cpu_fast"])
def test_targets_far_apart_cost_nothing_between(name):
    """Of three times three windows only the middle one meets the image, the others meet zeros."""
    x, w = (jnp.asarray(a, jnp.float32) for a in normal(3, (1, 3, 3, 2), (3, 3, 2, 4)))
    far = functools.partial(adder_conv, strides=2**30, padding=2**30, implementation=name)
    near = functools.partial(adder_conv, padding=0, implementation=name)
    y, pullback = jax.vjp(far, x, w)
    assert y.shape == (1, 3, 3, 4)
    blank = jnp.zeros_like(x)
    expected = jnp.broadcast_to(near(blank, w), y.shape).at[:, 1, 1].set(near(x, w)[:, 0, 0])
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    (g,) = (jnp.asarray(a, jnp.float32) for a in normal(4, y.shape))
    middle = g[:, 1:2, 1:2]
    others = g.sum((1, 2), keepdims=True) - middle
    dx, dw = pullback(g)
    expected_dx, of_image = jax.vjp(near, x, w)[1](middle)
    _, of_zeros = jax.vjp(near, blank, w)[1](others)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, of_image + of_zeros, rtol=1e-4, atol=1e-4)
