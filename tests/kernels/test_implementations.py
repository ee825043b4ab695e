"""One class of tests for every file of kernels."""

import functools
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jadder
from benchmarks.shapes import SMALL_CONVS, SMALL_MATMULS
from jadder import ADDERNET, SIGN, GradientRule, adder_conv, adder_dot_general, adder_matmul
from jadder.kernels import cpu
from tests import literal
from tests.strategies import clips, conv_cases, implementations, normal, rules, seeds

BATCHED = (((2,), (1,)), ((0,), (0,)))
WIDEST = {"xla": "float64", "reference": "float64", "cpu": "float32", "cpu_fast": "float32"}
"""The widest type that each implementation computes in. Pallas' have tests of their own."""
TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Of the largest value: rounding of sums in float32 at least, then of the result itself."""
SLOPES = {"float64": 1e-5, "float32": 3e-5}
"""Of gradients beside finite differences."""
IMPLEMENTATIONS = implementations(*WIDEST)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.skipif(
    all(shutil.which(compiler) is None for compiler in ("c++", "g++", "clang++")),
    reason="no C++ compiler: an installation has no native kernels then",
)
def test_the_native_kernels_are_there_where_they_can_be_built():
    """Otherwise all of their tests would be skipped, and nobody the wiser."""
    found = jadder.implementations()
    assert found["cpu"].available, found["cpu"].about
    assert found["cpu_fast"].available


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation in turn."""
    return request.param


def in_widest(implementation, function, *operands):
    """``function`` of the operands in the widest type of the implementation, and the operands.

    They are rounded to that type and returned in float64, for a NumPy oracle.
    """
    dtype = WIDEST[implementation]
    operands = [a.astype(dtype) for a in operands]
    with jax.enable_x64(dtype == "float64"):
        results = value_and_pullback(function, *operands)
    return [a.astype(np.float64) for a in (*results, *operands)]


def value_and_pullback(product, x, w, g):
    """The product's value and both gradients, as NumPy arrays."""

    @jax.jit
    def run(x, w, g):
        y, pullback = jax.vjp(product, x, w)
        return y, *pullback(g.astype(y.dtype))

    return tuple(np.asarray(a) for a in run(x, w, g))


def assert_close(actual, expected, relative):
    """Compares with the largest value as the scale: sums of one sign may cancel nowhere else."""
    scale = max(np.abs(expected).max(initial=0), 1e-300)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=relative)


class TestImplementation:
    @given(sizes=st.tuples(*[st.integers(1, 3)] + [st.integers(1, 20)] * 3), rule=rules, seed=seeds)
    @each_implementation
    def test_matmul_is_the_formula_and_its_gradients_the_potentials(
        self, implementation, sizes, rule, seed
    ):
        b, m, k, n = sizes
        product = functools.partial(
            adder_dot_general, dimension_numbers=BATCHED, rule=rule, implementation=implementation
        )
        operands = normal(seed, (b, m, k), (b, k, n), (b, m, n))
        y, dx, dw, x, w, g = in_widest(implementation, product, *operands)
        widest = WIDEST[implementation]
        assert_close(y, literal.matmul(x, w), TOLERANCES[widest])
        rho_x, rho_w = (
            functools.partial(literal.potential, clip) for clip in (rule.x, rule.kernel)
        )
        few = (slice(None), slice(0, 2), slice(0, 2))
        assert_close(
            dx[few],
            self._few_differences(lambda x: (g * literal.matmul(x, w, rho_x)).sum(), x),
            SLOPES[widest],
        )
        assert_close(
            dw[few],
            self._few_differences(lambda w: (g * literal.matmul(x, w, rho_w)).sum(), w),
            SLOPES[widest],
        )

    @staticmethod
    def _few_differences(function, at):
        """Central differences at the corner [:, :2, :2] of ``at``."""

        def on_corner(corner):
            moved = at.copy()
            moved[:, :2, :2] = corner
            return function(moved)

        return literal.gradient(on_corner, at[:, :2, :2].copy())

    @given(case=conv_cases(), rule=rules, seed=seeds)
    @each_implementation
    def test_conv_is_the_formula_and_its_gradients_the_potentials(
        self, implementation, case, rule, seed
    ):
        def product(x, w):
            return adder_conv(x, w, *case.arguments, rule=rule, implementation=implementation)

        operands = normal(seed, case.x, case.w, case.out)
        if len(case.strides) > 2 and implementation.startswith("cpu"):
            with pytest.raises(ValueError, match="one or two spatial dimensions, not 3"):
                in_widest(implementation, product, *operands)
            return
        y, dx, dw, x, w, g = in_widest(implementation, product, *operands)
        widest = WIDEST[implementation]
        assert_close(y, literal.conv(x, w, *case.arguments), TOLERANCES[widest])
        rho_x, rho_w = (
            functools.partial(literal.potential, clip) for clip in (rule.x, rule.kernel)
        )
        rng = np.random.default_rng(seed)
        for gradient, rho, at in ((dx, rho_x, x), (dw, rho_w, w)):
            # A few directions check every element of the gradient at once.
            for _ in range(3):
                way = rng.normal(size=at.shape)

                def along(t, at=at, rho=rho, way=way):
                    moved = at + t * way
                    operands = (moved, w) if at is x else (x, moved)
                    return (g * literal.conv(*operands, *case.arguments, rho)).sum()

                step = 1e-6
                slope = (along(step) - along(-step)) / (2 * step)
                assert (gradient * way).sum() == pytest.approx(
                    slope, rel=SLOPES[widest], abs=SLOPES[widest] * np.abs(way).sum()
                )

    @pytest.mark.parametrize("shape", SMALL_MATMULS, ids=lambda s: s.name)
    def test_shared_matmul_shapes(self, implementation, shape):
        x, w, g = normal(0, (shape.m, shape.k), (shape.k, shape.n), (shape.m, shape.n))
        rule = GradientRule((4.0, 1.0), (2.0, 0.5))
        self._agrees_with_reference(
            lambda x, w, which: adder_matmul(x, w, rule=rule, implementation=which),
            (x, w, g),
            implementation,
        )

    @pytest.mark.parametrize("shape", SMALL_CONVS, ids=lambda s: s.name)
    def test_shared_conv_shapes(self, implementation, shape):
        window, out = (shape.window, shape.window), (shape.out_size, shape.out_size)
        x, w, g = normal(
            0,
            (shape.batch, shape.size, shape.size, shape.channels),
            (*window, shape.channels // shape.groups, shape.features),
            (shape.batch, *out, shape.features),
        )
        rule = GradientRule((4.0, 1.0), (2.0, 0.5))
        self._agrees_with_reference(
            lambda x, w, which: adder_conv(
                x,
                w,
                shape.stride,
                feature_group_count=shape.groups,
                rule=rule,
                implementation=which,
            ),
            (x, w, g),
            implementation,
        )

    @staticmethod
    def _agrees_with_reference(product, operands, implementation):
        """In float64 to rounding, in narrower types to what their sums of K terms allow."""
        operands = [np.asarray(jnp.asarray(a, "bfloat16"), np.float64) for a in operands]
        with jax.enable_x64(True):
            exact = value_and_pullback(lambda x, w: product(x, w, "reference"), *operands)
        ours = functools.partial(value_and_pullback, lambda x, w: product(x, w, implementation))
        for dtype, relative in TOLERANCES.items():
            if dtype == "float64" != WIDEST[implementation]:
                with jax.enable_x64(True), pytest.raises(ValueError, match="in float32, not"):
                    ours(*operands)
                continue
            with jax.enable_x64(dtype == "float64"):
                results = ours(*(jnp.asarray(a, dtype) for a in operands))
            for actual, expected in zip(results, exact, strict=True):
                assert actual.dtype == dtype
                assert_close(actual.astype(np.float64), expected, relative)

    def test_not_finite_values_go_through(self, implementation):
        x, w, g = (a.astype(np.float32) for a in normal(1, (6, 20), (20, 5), (6, 5)))
        x[0, 3], x[1, 4], x[2, 5], w[7, 1], w[5, 2] = np.nan, np.inf, -np.inf, np.nan, -np.inf
        with np.errstate(invalid="ignore"):
            y, dx, _ = value_and_pullback(
                lambda x, w: adder_matmul(x, w, implementation=implementation), x, w, g
            )
            d = w[None] - x[..., None]
            np.testing.assert_array_equal(np.isnan(y), np.isnan(-np.abs(d).sum(1)))
            np.testing.assert_array_equal(np.isinf(y), np.isinf(-np.abs(d).sum(1)))
            expected = (np.clip(d, -1, 1) * g[:, None]).sum(2)
        np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)

    def test_not_finite_values_go_through_a_convolution(self, implementation):
        x, w, g = (
            a.astype(np.float32) for a in normal(2, (1, 5, 5, 3), (1, 1, 3, 4), (1, 5, 5, 4))
        )
        x[0, 0, 0, 0], x[0, 1, 2, 1], w[0, 0, 2, 3] = np.nan, np.inf, np.inf
        with np.errstate(invalid="ignore"):
            y, dx, _ = value_and_pullback(
                lambda x, w: adder_conv(x, w, implementation=implementation), x, w, g
            )
            d = w[0, 0] - x[..., None]
            np.testing.assert_allclose(y, -np.abs(d).sum(-2), rtol=1e-5)
            expected = (np.clip(d, -1, 1) * g[..., None, :]).sum(-1)
        np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
    def test_integers_accumulate_in_int32(self, implementation, dtype):
        rng = np.random.default_rng(3)
        low, high = max(np.iinfo(dtype).min, -(2**15)), min(np.iinfo(dtype).max, 2**15 - 1)
        x = rng.integers(low, high, (9, 300), dtype, endpoint=True)
        w = rng.integers(low, high, (300, 6), dtype, endpoint=True)
        if implementation.startswith("cpu") and np.dtype(dtype).itemsize > 1:
            with pytest.raises(ValueError, match="takes uint8 and int8"):
                adder_matmul(x, w, preferred_element_type=np.int32, implementation=implementation)
            return
        y = adder_matmul(x, w, preferred_element_type=np.int32, implementation=implementation)
        assert y.dtype == np.int32
        np.testing.assert_array_equal(
            y, literal.matmul(x[None].astype(int), w[None].astype(int))[0]
        )
        image, kernel = x[:, :100].reshape(9, 10, 5, 2), w[:54].reshape(3, 3, 2, 18)
        y = adder_conv(
            image, kernel, preferred_element_type=np.int32, implementation=implementation
        )
        same = ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1)
        np.testing.assert_array_equal(y, literal.conv(image.astype(int), kernel.astype(int), *same))

    @pytest.mark.parametrize(
        ("x_shape", "w_shape"), [((0, 3), (3, 4)), ((2, 0), (0, 4)), ((2, 3), (3, 0))]
    )
    def test_empty_operands(self, implementation, x_shape, w_shape):
        y, dx, dw = value_and_pullback(
            functools.partial(adder_matmul, implementation=implementation),
            np.ones(x_shape, np.float32),
            np.ones(w_shape, np.float32),
            np.ones((x_shape[0], w_shape[1])),
        )
        assert y.shape == (x_shape[0], w_shape[1])
        assert not y.any()
        assert dx.shape == x_shape
        assert dw.shape == w_shape
        assert not dx.any()
        assert not dw.any()

    @pytest.mark.parametrize(
        ("x_shape", "w_shape"),
        [((0, 5, 5, 3), (3, 3, 3, 4)), ((2, 5, 5, 0), (3, 3, 0, 4)), ((2, 5, 5, 3), (3, 3, 3, 0))],
    )
    def test_empty_convolutions(self, implementation, x_shape, w_shape):
        out = (x_shape[0], 5, 5, w_shape[-1])
        y, dx, dw = value_and_pullback(
            functools.partial(adder_conv, implementation=implementation),
            np.ones(x_shape, np.float32),
            np.ones(w_shape, np.float32),
            np.ones(out),
        )
        assert (y.shape, dx.shape, dw.shape) == (out, x_shape, w_shape)
        assert not y.any()
        assert not dx.any()
        assert not dw.any()

    @pytest.mark.parametrize("spatial", [(0,), (3, 0), (0, 0)])
    def test_the_padding_of_images_without_pixels_takes_part(self, implementation, spatial):
        rank = len(spatial)
        x, w = np.zeros((2, *spatial, 3), np.float32), np.full((*[1] * rank, 3, 2), 2, np.float32)
        product = functools.partial(
            adder_conv, padding=[(1, 2)] * rank, rule=SIGN, implementation=implementation
        )
        out = tuple(n + 3 for n in spatial)
        y, dx, dw = value_and_pullback(product, x, w, np.ones((2, *out, 2)))
        np.testing.assert_array_equal(y, np.full((2, *out, 2), -6))
        assert dx.shape == x.shape
        np.testing.assert_array_equal(dw, np.full(w.shape, -2 * np.prod(out)))

    @pytest.mark.parametrize(("strides", "groups"), [(1, 2), (2, 1)])
    def test_a_bad_value_spoils_what_meets_it_and_nothing_else(
        self, implementation, strides, groups
    ):
        """Padding brings in no product of zero and NaN, nor does what no output covers."""
        options = {"strides": strides, "padding": [(1, 1), (2, 0)], "feature_group_count": groups}
        rule = GradientRule((1, 1), (1, 2))
        x, w, g = (
            a.astype(np.float32)
            for a in normal(4, (2, 6, 5, 4), (3, 3, 4 // groups, 4), (2, 6 // strides, 5, 4))
        )
        g = g[:, :, : -(-5 // strides)]
        spoilt = []
        for value in (np.nan, np.inf, -np.inf):
            bad_x, bad_w = x.copy(), w.copy()
            bad_x[0, 2, 1, 0], bad_w[0, 0, 0, 0], bad_x[1, 5, 4, 3] = value, value, np.nan
            spoilt += [(bad_x, w), (x, bad_w), (bad_x, bad_w)]

        def pullback(which, x, w):
            product = functools.partial(adder_conv, rule=rule, implementation=which, **options)
            return jax.vjp(product, x, w)[1](jnp.asarray(g))

        ours, exact = (
            jax.jit(functools.partial(pullback, which)) for which in (implementation, "reference")
        )
        for operands in spoilt:
            for actual, expected in zip(ours(*operands), exact(*operands), strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("size", "options"),
        [
            (600, {"kernel_dilation": 250, "padding": 100}),
            (600, {"kernel_dilation": 2**30, "padding": 2**30}),
            (1, {"input_dilation": 2**20, "padding": [(2**20, 2 - 2**20)]}),
            (2, {"input_dilation": 3000, "padding": [(1, 1)]}),
            (3000, {"strides": 3000, "padding": [(1, 1)]}),
        ],
    )
    def test_sizes_far_apart(self, implementation, size, options):
        """Positions are computed exactly, and only what is met costs memory or time."""
        written_out = max(options.get("kernel_dilation", 1), options.get("input_dilation", 1))
        if not implementation.startswith("cpu") and written_out > 4096:
            pytest.skip("XLA's own convolution, which the kernel's gradient is, writes zeros out")
        x, w = (a.astype(np.float32) for a in normal(3, (1, size, 2), (3, 2, 4)))
        product = functools.partial(adder_conv, implementation=implementation, **options)
        y = product(x, w)
        (g,) = (a.astype(np.float32) for a in normal(4, y.shape))
        y, dx, dw = value_and_pullback(product, x, w, g)
        stride, lhs, rhs = (
            options.get(name, 1) for name in ("strides", "input_dilation", "kernel_dilation")
        )
        padding = options["padding"]
        low = padding if isinstance(padding, int) else padding[0][0]
        expected, exact_dx, exact_dw = (np.zeros(a.shape) for a in (y, x, w))
        for tap in range(3):
            at = np.arange(y.shape[1]) * stride + tap * rhs - low
            met = (at >= 0) & (at % lhs == 0) & (at // lhs < size)
            seen = np.zeros((y.shape[1], 2))
            seen[met] = x[0, at[met] // lhs]
            d = seen[..., None] - w[tap]
            expected[0] -= np.abs(d).sum(1)
            np.add.at(exact_dx[0], at[met] // lhs, (np.clip(-d, -1, 1) * g[0, :, None]).sum(2)[met])
            exact_dw[tap] = (d * g[0, :, None]).sum(0)
        assert_close(y.astype(np.float64), expected, 2e-6)
        assert_close(dx.astype(np.float64), exact_dx, 1e-5)
        assert_close(dw.astype(np.float64), exact_dw, 1e-5)

    @settings(max_examples=5)
    @given(seed=seeds)
    @each_implementation
    def test_sign_rule_differentiates_the_product_itself(self, implementation, seed):
        same = ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), 1)
        product = functools.partial(adder_conv, rule=SIGN, implementation=implementation)
        operands = normal(seed, (1, 3, 3, 2), (3, 3, 2, 2), (1, 3, 3, 2))
        _, dx, dw, x, w, g = in_widest(implementation, product, *operands)
        expected = literal.gradient(lambda x: (g * literal.conv(x, w, *same)).sum(), x)
        assert_close(dx, expected, 1e-6)
        expected = literal.gradient(lambda w: (g * literal.conv(x, w, *same)).sum(), w)
        assert_close(dw, expected, 1e-6)


@given(clip=clips, seed=seeds)
def test_the_chunked_sums_do_not_depend_on_how_terms_are_cut(clip, seed):
    """K and N around multiples of the chunk, where the last chunk is padded."""
    rng = np.random.default_rng(seed)
    m, k, n = 3, int(rng.integers(14, 36)), int(rng.integers(14, 36))
    x, w, g = normal(seed, (m, k), (k, n), (m, n))
    rule = GradientRule(clip, ADDERNET.kernel)
    with jax.enable_x64(True):
        ours, exact = (
            value_and_pullback(
                functools.partial(adder_matmul, rule=rule, implementation=which), x, w, g
            )
            for which in ("xla", "reference")
        )
    for actual, expected in zip(ours, exact, strict=True):
        assert_close(actual, expected, 1e-12)


class TestWithoutNativeCode:
    """The best is then XLA's loops, which is said where native code would have done it."""

    @pytest.fixture(autouse=True)
    def _no_library(self, monkeypatch):
        monkeypatch.setattr(cpu, "unavailable", lambda: "there is no native library")

    def test_is_said_once(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", jadder.AdderWarning)
            for k in (2, 3):
                assert adder_matmul(jnp.zeros((2, k)), jnp.ones((k, 2)))[0, 0] == -k
        assert [warning.category for warning in caught] == [jadder.AdderWarning]
        assert "several times slower: there is no native library" in str(caught[0].message)

    def test_is_not_said_where_it_makes_no_difference(self):
        x = jnp.ones((2, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adder_matmul(x, x, implementation="xla")
            integers = x.astype(jnp.int32)
            adder_matmul(integers, integers, preferred_element_type=jnp.int32)
        with pytest.raises(ValueError, match="cannot be used: there is no native library"):
            adder_matmul(x, x, implementation="cpu")
