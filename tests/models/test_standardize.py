"""Batch normalisation as one function: its native code, and all that JAX does with functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jadder
from jadder.models.standardize import standardize

FOUND = jadder.implementations()["cpu"]
native = pytest.mark.skipif(not FOUND.available, reason=f"cpu: {FOUND.about}")
EPSILON = 1e-5


def literal(x, scale, bias, residual=None, *, center=False):
    """In the operands' own precision, with derivatives that JAX finds."""
    if center:
        x = x - x.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    mean = x.mean(rows)
    var = ((x - mean) ** 2).mean(rows)
    y = scale * (x - mean) / jnp.sqrt(var + EPSILON) + bias
    return y if residual is None else y + residual, mean, var


def ours(x, scale, bias, residual=None, *, center=False, rectify=False):
    return standardize(
        x, scale, bias, -1, EPSILON, center_features=center, rectify=rectify, residual=residual
    )


def random_operands(shape, seed, center=-3.0, spread=2.0):
    random = np.random.default_rng(seed)
    x = random.normal(center, spread, shape).astype(np.float32)
    scale, bias = random.uniform(0.5, 2, (2, shape[-1])).astype(np.float32)
    return x, scale, bias, random.normal(size=shape).astype(np.float32)


def wide(operands):
    return [jnp.asarray(each, jnp.float64) for each in operands]


@native
@settings(max_examples=8, deadline=None)
@given(
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    repeats=st.sampled_from([1, 1, 40]),
    features=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 64, 70, 130]),
    center=st.booleans(),
    rectify=st.booleans(),
    with_residual=st.booleans(),
    far=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_native_results_and_gradients_are_those_of_the_formula(
    leading, repeats, features, center, rectify, with_residual, far, seed
):
    """In float64, to errors of the size that float32 has where the values lie."""
    shape = (2 * repeats, *leading, max(features, 1 + center))
    x, scale, bias, residual = random_operands(shape, seed, *((-2600, 4) if far else (-3, 2)))
    operands = [x, scale, bias, residual][: 3 + with_residual]
    random = np.random.default_rng(seed + 1)
    cotangents = [random.normal(size=s).astype(np.float32) for s in (shape, shape[-1:], shape[-1:])]

    @jax.jit
    def results(operands, cotangents):
        values, transpose = jax.vjp(
            functools.partial(ours, center=center, rectify=rectify), *operands
        )
        return values, transpose(cotangents)

    (y, mean, var), gradients = results(operands, tuple(cotangents))
    with jax.enable_x64(True):
        expected, transpose = jax.vjp(functools.partial(literal, center=center), *wide(operands))
        g = wide(cotangents)
        if rectify:  # where y itself says, which near zero is a matter of rounding
            expected = (jnp.maximum(expected[0], 0), *expected[1:])
            g[0] = g[0] * (y > 0)
        expected_gradients = transpose(tuple(g))
        error = 1e-6 * (np.abs(x).max() + 1) / (np.sqrt(np.asarray(expected[2]).min()) + 1e-3)
        named = zip((y, mean, var, *gradients), (*expected, *expected_gradients), strict=True)
        for found, right in named:
            size = np.abs(right).max() + np.abs(x).max() / 100
            np.testing.assert_allclose(found, right, rtol=0, atol=(1e-5 + 10 * error) * size)


@native
def test_native_code_keeps_the_digits_of_values_far_from_zero():
    x, scale, bias, _ = random_operands((4096, 24), 0, -2600, 4)
    y, mean, var = jax.jit(ours)(x, scale, bias)
    with jax.enable_x64(True):
        expected = literal(*wide((x, scale, bias)))
    np.testing.assert_allclose(y, expected[0], atol=2e-4)
    np.testing.assert_allclose(mean, expected[1], rtol=1e-7)
    np.testing.assert_allclose(var, expected[2], rtol=1e-6)


@native
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [5, 700])
def test_what_is_not_finite_stays_with_its_feature(bad, rows):
    x, scale, bias, g = random_operands((rows, 19), 0)
    x[rows // 2, 3] = bad
    g[rows // 3, 7] = bad

    def both(function):
        def results(x, scale, bias):
            values, transpose = jax.vjp(function, x, scale, bias)
            return values, transpose((g, jnp.zeros(19), jnp.zeros(19)))

        return jax.tree.leaves(jax.jit(results)(x, scale, bias))

    found, formula = both(ours), both(literal)
    assert not np.isfinite(found[0][:, 3]).any()
    for one, other in zip(found[:3], formula[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    for one, other in zip(found[3:], formula[3:], strict=True):  # some of them inf - inf
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(one), finite)
        np.testing.assert_allclose(one[finite], other[finite], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty_batches_are_as_the_formula_has_them(shape):
    x, scale, bias = jnp.ones(shape), jnp.ones(shape[-1]), jnp.ones(shape[-1])
    for one, other in zip(jax.jit(ours)(x, scale, bias), literal(x, scale, bias), strict=True):
        np.testing.assert_array_equal(one, other)


OPTIONS = [{}, {"center": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_derivatives_of_both_modes_and_of_second_order(options):
    x, scale, bias, way = map(jnp.asarray, random_operands((6, 2, 5), 0))

    def derivatives(function):
        def loss(x, scale, bias):
            y, mean, var = function(x, scale, bias, **options)
            return jnp.sum(jnp.sin(y) * way) + jnp.sum(jnp.sin(mean) + jnp.cos(var))

        gradient = jax.grad(loss, (0, 1, 2))

        @jax.jit
        def all_of_them(x, scale, bias):
            given = (x, scale, bias)
            directions = (way, scale * 0.3, bias - 1)
            _, transpose = jax.vjp(gradient, *given)
            pulled = jax.vjp(lambda x: function(x, scale, bias, **options)[0], x)[1]
            linear = jax.linear_transpose(lambda g: pulled(g)[0], x)
            return (
                gradient(*given),
                jax.jvp(loss, given, directions)[1],
                jax.jvp(gradient, given, directions)[1],
                transpose(directions),
                linear(way),
                jax.grad(jax.checkpoint(loss))(*given),
                jax.jacfwd(lambda s: loss(x, s, bias))(scale),
                jax.hessian(lambda s: loss(x, s, bias))(scale),
            )

        return jax.tree.leaves(all_of_them(x, scale, bias))

    for one, other in zip(derivatives(ours), derivatives(literal), strict=True):
        size = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * size)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 0, None), (1, 0, None)])
def test_vmap_and_its_gradient(mapped):
    x, scale, bias, way = map(jnp.asarray, random_operands((3, 7, 5), 1))
    x = x if mapped[0] == 0 else jnp.moveaxis(x, 0, 1) if mapped[0] == 1 else x[0]
    scale = scale if mapped[1] is None else jnp.stack([scale, scale + 1, scale + 2])
    bias = bias if mapped[2] is None else jnp.stack([bias, bias + 1, bias + 2])

    def results(function):
        def loss(x, scale, bias):
            y, mean, var = jax.vmap(function, mapped)(x, scale, bias)
            return jnp.sum(y * way) + jnp.sum(mean * var), (y, mean, var)

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias))

    for one, other in zip(results(ours), results(literal), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_in_a_scan_and_without_jit():
    x, scale, bias, _ = map(jnp.asarray, random_operands((8, 6), 2))

    def loss(function, scales):
        y, _ = jax.lax.scan(lambda x, s: (function(x, s, bias)[0], None), x, scales)
        return jnp.sum(jnp.sin(y))

    scales = jnp.stack([scale, scale + 1, scale + 2])
    expected = jax.grad(functools.partial(loss, literal))(scales)
    gradient = jax.grad(functools.partial(loss, ours))
    np.testing.assert_allclose(jax.jit(gradient)(scales), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient(scales), expected, rtol=1e-4, atol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(gradient(scales), expected, rtol=1e-4, atol=1e-5)


def _calls(function, *operands, **jit):
    return jax.jit(function, **jit).lower(*operands).as_text().count("jadder_standardize")


def total(x, scale, bias):
    return jnp.sum(jnp.sin(ours(x, scale, bias)[0]))


@native
def test_one_call_forward_and_one_backward():
    operands = random_operands((6, 5), 0)[:3]
    assert _calls(ours, *operands) == 1
    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(*operands).as_text()
    assert text.count("@jadder_standardize(") == 1
    assert text.count("@jadder_standardize_gradient(") == 1


def test_where_native_code_does_not_serve_there_is_the_formula():
    x, scale, bias, _ = random_operands((6, 5), 0)
    assert _calls(jax.vmap(ours, (0, None, None)), x[None], scale, bias) == 0
    assert _calls(lambda x: standardize(x, scale[:1], bias[:1], 0, EPSILON), x[:1]) == 0
    half = [each.astype(jnp.bfloat16) for each in (x, scale, bias)]
    assert _calls(ours, *half) == 0
    for_others = jax.jit(ours).trace(x, scale, bias).lower(lowering_platforms=("cuda",))
    assert "jadder_" not in for_others.as_text()
    with jax.enable_x64(True):
        assert _calls(ours, *wide((x, scale, bias))) == 0


def test_an_exported_gradient_runs_without_jadder():
    operands = random_operands((6, 5), 0)[:3]
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    file = jax.export.export(gradient)(*operands)
    assert "jadder_" not in file.mlir_module()
    for one, other in zip(file.call(*operands), gradient(*operands), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def _mesh(kind):
    return jax.make_mesh((4, 2), ("batch", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("batch", None), ("batch", "model"), (None, "model")])
def test_sharded_operands(kind, spec):
    x, scale, bias, _ = random_operands((16, 6), 3)
    expected = jax.value_and_grad(total, (0, 1, 2))(x, scale, bias)
    mesh = _mesh(kind)
    place = functools.partial(NamedSharding, mesh)
    x = jax.device_put(x, place(PartitionSpec(*spec)))
    scale, bias = (jax.device_put(each, place(PartitionSpec(spec[1]))) for each in (scale, bias))
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
        assert "jadder_" not in program.lower(x, scale, bias).as_text()
        found = program(x, scale, bias)
    assert found[1][0].sharding.is_equivalent_to(x.sharding, 2)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_blocks_of_a_shard_map_are_batches_of_their_own():
    x, scale, bias, _ = random_operands((16, 6), 4)
    expected = jax.grad(lambda s: sum(total(x[i : i + 4], s, bias) for i in range(0, 16, 4)))(scale)
    mesh = _mesh(AxisType.Auto)
    spec = PartitionSpec("batch")

    def loss(scale):
        each = jax.shard_map(
            lambda x, s: total(x, s, bias)[None],
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
        )
        return each(x, scale).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(scale), expected, rtol=1e-4, atol=1e-5)
