"""The native gradient for an x of few channels, whose vectors are of pixels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jadder
from jadder import GradientRule, adder_conv
from tests.native.search import Window

FOUND = jadder.implementations()["cpu"]
pytestmark = pytest.mark.skipif(not FOUND.available, reason=f"cpu: {FOUND.about}")

WIDTHS = (1, 15, 16, 17, 33)
STRIDES = (1, 2, 3)
CLIPS = ((2.0, 1.0), (np.inf, 1.0))
KERNEL = (1.0, np.inf)


def operands(rng, case, scale=1.0):
    return [(scale * rng.normal(size=shape)).astype("f") for shape in (case.x, case.w, case.out)]


def gradients(case, clip, x, w, g, implementation="cpu"):
    """The product's gradient for x, and the literal sums'."""
    product = functools.partial(
        adder_conv,
        strides=case.strides,
        padding=case.padding,
        kernel_dilation=case.rhs_dilation,
        feature_group_count=case.groups,
        rule=GradientRule(clip, KERNEL),
        implementation=implementation,
    )
    run = jax.jit(lambda x, w, g: jax.vjp(lambda x: product(x, w), x)[1](g)[0])
    wide = (np.asarray(a, np.float64) for a in (x, w, g))
    with np.errstate(invalid="ignore"):
        exact = case.sums(*wide, clip, KERNEL)[1]
    return np.asarray(run(x, w, g), np.float64), exact


def case_of(width, channels, stride, *, features=21, window=(3, 4), groups=1, dilation=1):
    """An image whose last columns no window covers where strides leave some."""
    return Window(
        x=(2, 13, width, channels * groups),
        w=(*window, channels, features * groups),
        strides=(stride, stride),
        padding=((1, 2), (3, 1)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, dilation),
        groups=groups,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stride", STRIDES)
def test_few_channels_agree_with_the_sums(width, stride):
    rng = np.random.default_rng(width)
    first = WIDTHS.index(width) + 2 * stride
    for channels, clip in zip((1 + first % 7, 1 + (first + 3) % 7), CLIPS, strict=True):
        case = case_of(width, channels, stride)
        actual, exact = gradients(case, clip, *operands(rng, case))
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("clip", CLIPS)
def test_few_channels_keep_nan_and_infinities(channels, clip):
    """In x, w and g, alone and together; those of x also where no window is."""
    rng = np.random.default_rng(channels)
    case = case_of(33, channels, 3, window=(2, 2))
    for spoilt in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 0, 2)):
        arrays = operands(rng, case)
        for array, count in zip(arrays, spoilt, strict=True):
            for bad in itertools.islice((np.nan, np.inf, -np.inf), count):
                array.flat[rng.integers(array.size, size=3)] = bad
        actual, exact = gradients(case, clip, *arrays)
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(actual[~finite], exact[~finite])
        scale = np.abs(exact[finite]).max()
        np.testing.assert_allclose(actual[finite], exact[finite], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 3}, {"features": 700}])
def test_few_channels_with_groups_dilation_and_many_features(options):
    case = case_of(40, 2, 1, **options)
    actual, exact = gradients(case, CLIPS[0], *operands(np.random.default_rng(0), case))
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_few_channels_of_bfloat16():
    case = case_of(33, 3, 2)
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in operands(np.random.default_rng(0), case)]
    actual, exact = gradients(case, CLIPS[0], *arrays)
    np.testing.assert_allclose(actual, exact, rtol=2**-7, atol=2**-7 * np.abs(exact).max())


@pytest.mark.parametrize(("channels", "features"), [(1, 33), (3, 64), (5, 32), (7, 31)])
def test_few_channels_in_sixteen_bits(channels, features):
    """Rounded, so not the very sums of floats, but as near as other shapes' are."""
    case = case_of(33, channels, 1, features=features, window=(5, 7))
    arrays = operands(np.random.default_rng(0), case)
    actual, exact = gradients(case, CLIPS[0], *arrays, "cpu_int16")
    assert (actual - exact).std() < 0.005 * exact.std()
    assert (actual != gradients(case, CLIPS[0], *arrays)[0]).any()


def test_few_channels_far_from_any_source_are_zero():
    """Padding that is taken away leaves pixels that no window covers, NaN or not."""
    case = Window(
        x=(1, 40, 40, 1),
        w=(3, 3, 1, 8),
        strides=(1, 1),
        padding=((-3, 0), (0, -5)),
        lhs_dilation=(1, 1),
        rhs_dilation=(1, 1),
        groups=1,
    )
    x, w, g = operands(np.random.default_rng(0), case)
    x[:, :3], x[:, :, -5:] = np.nan, np.nan
    actual, exact = gradients(case, CLIPS[0], x, w, g)
    assert not np.isnan(actual).any()
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)
