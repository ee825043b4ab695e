"""Convolutions of which some taps see nothing, against the literal formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jadder
from jadder import GradientRule
from tests import literal
from tests.strategies import conv_cases, implementations, normal, rules, seeds

IMPLEMENTATIONS = implementations("xla", "cpu", "cpu_fast", "reference")


def draw_mask(seed, shape, kind):
    """Whole taps, or any elements of the kernel."""
    rng = np.random.default_rng(seed)
    window = shape if kind == "elements" else shape[:-2]
    mask = rng.random(window) < 0.6
    return np.broadcast_to(mask if kind == "elements" else mask[..., None, None], shape)


def masked_sum(x, w, mask, arguments, rho=np.abs):
    """The literal convolution without the terms of masked taps: NaN marks them in the kernel."""

    def of_seen(difference):
        return np.where(np.isnan(difference), 0, rho(difference))

    return literal.conv(x, np.where(mask, w, np.nan), *arguments, of_seen)


@settings(max_examples=8)
@given(conv_cases(), st.sampled_from(["taps", "elements"]), rules, seeds)
@pytest.mark.parametrize("euclid", [False, True])
def test_masked_taps_are_no_part_of_sums_and_gradients(euclid, case, kind, rule, seed):
    x, w, g = normal(seed, case.x, case.w, case.out)
    mask = draw_mask(seed, case.w, kind)
    if euclid:
        conv, rho = jadder.euclid_conv, np.square
    else:
        conv, rho = functools.partial(jadder.adder_conv, rule=rule), np.abs

    @jax.jit
    def run(x, w, mask, g):
        y, pull = jax.vjp(lambda x, w: conv(x, w, *case.arguments, mask=mask), x, w)
        return y, *pull(g)

    with jax.enable_x64(True):
        y, dx, dw = (np.asarray(array) for array in run(x, w, mask, g))
    np.testing.assert_allclose(y, masked_sum(x, w, mask, case.arguments, rho), atol=1e-10)
    assert not dw[~mask].any()

    rng = np.random.default_rng(seed)
    way_x, way_w = rng.normal(size=x.shape), rng.normal(size=w.shape)
    for gradient, way, clip, along_x in ((dx, way_x, rule.x, 1), (dw, way_w, rule.kernel, 0)):
        potential = np.square if euclid else functools.partial(literal.potential, clip)

        def along(t, way=way, along_x=along_x, potential=potential):
            moved = (x + t * way, w) if along_x else (x, w + t * way)
            return (g * masked_sum(*moved, mask, case.arguments, potential)).sum()

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        assert (gradient * way).sum() == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_under_a_masked_tap_changes_no_bit(implementation):
    x, w, g = (a.astype(np.float32) for a in normal(0, (2, 5, 7, 4), (3, 3, 2, 6), (2, 5, 2, 6)))
    mask = np.ones_like(w)
    mask[:, 1] = 0
    conv = functools.partial(
        jadder.adder_conv,
        strides=(1, 3),
        padding=[(1, 1), (0, 0)],
        feature_group_count=2,
        mask=mask,
        implementation=implementation,
    )

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(conv, x, w)
        return y, *pull(g)

    for value in (1e30, np.inf, np.nan):
        other_x, other_w = x.copy(), w.copy()
        other_x[:, :, 1::3] = value
        other_w[:, 1] = value
        for one, other in zip(run(x, w), run(other_x, other_w), strict=True):
            assert np.isfinite(one).all()
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_of_ones_is_no_mask(implementation):
    rule = GradientRule((2.0, math.inf), (1.0, 0.5))
    x, w, g = (a.astype(np.float32) for a in normal(0, (1, 4, 4, 3), (3, 3, 3, 5), (1, 4, 4, 5)))

    @jax.jit
    def run(mask):
        conv = functools.partial(
            jadder.adder_conv, mask=mask, rule=rule, implementation=implementation
        )
        y, pull = jax.vjp(conv, x, w)
        return y, *pull(g)

    for with_mask, without in zip(run(np.ones_like(w)), run(None), strict=True):
        np.testing.assert_allclose(with_mask, without, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8"])
def test_dtypes(dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(0, 9, shape), dtype) for shape in ((1, 5, 5, 2), (3, 3, 2, 3)))
    mask = rng.random(w.shape) < 0.5
    result = jnp.int32 if dtype == "uint8" else jnp.float32
    y = jadder.adder_conv(x, w, mask=mask, preferred_element_type=result)
    assert y.dtype == result
    wide = [np.asarray(array, np.float64) for array in (x, w)]
    arguments = ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1)
    np.testing.assert_array_equal(y, masked_sum(*wide, mask, arguments))


def test_any_layout_and_batch_groups():
    x, w = normal(0, (4, 3, 6, 6), (4, 3, 2, 2))
    mask = draw_mask(1, w.shape, "elements")
    with jax.enable_x64(True):
        y = jadder.adder_conv_general_dilated(x, w, (1, 1), "VALID", mask=mask, batch_group_count=2)
    for group in range(2):
        one_x, one_w, one_mask = x[2 * group :][:2], w[2 * group :][:2], mask[2 * group :][:2]
        expected = masked_sum(
            one_x.transpose(0, 2, 3, 1),
            one_w.transpose(2, 3, 1, 0),
            one_mask.transpose(2, 3, 1, 0),
            ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1),
        ).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(y[:, 2 * group :][:, :2], expected, atol=1e-10)


def test_vmap_and_shard_map():
    x, w, g = normal(0, (4, 2, 5, 5, 3), (3, 3, 3, 4), (4, 2, 5, 5, 4))
    mask = draw_mask(0, w.shape, "elements")

    def run(x, g):
        y, pull = jax.vjp(functools.partial(jadder.adder_conv, mask=mask), x, w)
        return y, *pull(g)

    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    in_blocks = jax.shard_map(
        lambda x, g: jax.tree.map(lambda a: a[None], run(x[0], g[0])),
        mesh=mesh,
        in_specs=spec("i"),
        out_specs=spec("i"),
    )
    with jax.enable_x64(True):
        compiled = jax.jit(run)
        y, dx, dw = (np.stack(parts) for parts in zip(*map(compiled, x, g), strict=True))
        # In the blocks' eyes there is one kernel: its gradient is summed over the devices.
        summed = np.broadcast_to(dw.sum(0), dw.shape)
        for mapped, expected in (
            (jax.vmap(run), (y, dx, dw)),
            (in_blocks, (y, dx, summed)),
        ):
            for ours, theirs in zip(jax.jit(mapped)(x, g), expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("conv", [jadder.adder_conv, jadder.euclid_conv])
@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 1, 1), (3, 3, 2, 5), (2, 4), ()])
def test_a_mask_of_another_shape_is_refused_though_it_broadcasts(conv, shape):
    with pytest.raises(
        ValueError, match=r"kernel's shape \(3, 3, 2, 4\), got \(" + str(shape)[1:-1]
    ):
        conv(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), mask=np.ones(shape))


@pytest.mark.parametrize("kernel_axes", [(), (None, None, None, "j"), (None, None, "j")])
def test_explicit_mesh_axes(kernel_axes):
    x, w = normal(0, (2, 4, 4, 4), (3, 3, 4, 6))
    mask = draw_mask(0, w.shape, "elements")

    @jax.jit
    def run(x, w, mask):
        y, pull = jax.vjp(functools.partial(jadder.adder_conv, mask=mask), x, w)
        return y, *pull(jnp.cos(y))

    mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.enable_x64(True):
        expected = run(x, w, mask)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, jax.P("i"))]
            placed += [jax.device_put(array, jax.P(*kernel_axes)) for array in (w, mask)]
            found = run(*placed)
        assert found[0].sharding.spec[0] == "i"
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10)
