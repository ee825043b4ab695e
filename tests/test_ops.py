"""The public products: their signatures, layouts, dtypes, errors, and the Euclid product."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jadder
from jadder import ops
from tests import literal
from tests.strategies import conv_cases, implementations, normal, seeds

DOTS = (ops.adder_dot_general, ops.euclid_dot_general)
CONVS = (ops.adder_conv_general_dilated, ops.euclid_conv_general_dilated)


def squares(d):
    """The Euclid product's potential."""
    return d**2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(dot, lax.dot_general) for dot in DOTS] + [(conv, lax.conv_general_dilated) for conv in CONVS],
)
def test_arguments_are_those_of_lax_and_ours_are_keywords(ours, theirs):
    mine = inspect.signature(ours).parameters
    lax_parameters = list(inspect.signature(theirs).parameters.values())
    for parameter, other in zip(mine.values(), lax_parameters, strict=False):
        assert (parameter.name, parameter.default, parameter.kind) == (
            other.name,
            other.default,
            other.kind,
        )
    extra = list(mine.values())[len(lax_parameters) :]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in extra)


def test_everything_exported_exists_and_is_documented():
    for name in jadder.__all__:
        assert inspect.getdoc(getattr(jadder, name)), name


@st.composite
def dot_problems(draw):
    """Sizes of batch, x's free, contracting and kernel's free dimensions, and both orders."""
    sizes = [
        draw(st.lists(st.integers(1, 3), min_size=least, max_size=2)) for least in (0, 0, 0, 0)
    ]
    batch, left, summed, right = sizes
    left_order = draw(st.permutations(range(len(batch + left + summed))))
    right_order = draw(st.permutations(range(len(batch + summed + right))))
    return batch, left, summed, right, left_order, right_order


@given(dot_problems(), seeds)
@pytest.mark.parametrize(("dot", "rho"), [(DOTS[0], np.abs), (DOTS[1], squares)])
def test_dot_general_takes_any_dimension_numbers(dot, rho, problem, seed):
    batch, left, summed, right, left_order, right_order = problem
    b, m, k, n = (math.prod(sizes) for sizes in (batch, left, summed, right))
    x, w = normal(seed, (b, m, k), (b, k, n))
    lhs = x.reshape((*batch, *left, *summed)).transpose(left_order)
    rhs = w.reshape((*batch, *summed, *right)).transpose(right_order)

    def places(order, start, count):
        return tuple(order.index(d) for d in range(start, start + count))

    numbers = (
        (
            places(left_order, len(batch + left), len(summed)),
            places(right_order, len(batch), len(summed)),
        ),
        (places(left_order, 0, len(batch)), places(right_order, 0, len(batch))),
    )
    with jax.enable_x64(True):
        y = dot(lhs, rhs, numbers)
        assert y.shape == lax.dot_general(lhs, rhs, numbers).shape
    expected = literal.matmul(x, w, rho).reshape((*batch, *left, *right))
    # The result has each operand's free dimensions in that operand's order.
    free = [d for d in left_order if len(batch) <= d < len(batch + left)]
    shift = len(left) - len(summed)
    free += [d + shift for d in right_order if d >= len(batch + summed)]
    batch_order = [d for d in left_order if d < len(batch)]
    expected = expected.transpose([*sorted(batch_order), *free])
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 0, 4, 2), (1, 4, 4, 0)])
def test_euclid_conv_of_nothing(shape):
    kernel = jnp.full((1, 1, shape[3], 2), 2.0)
    y, pullback = jax.vjp(lambda w: ops.euclid_conv(jnp.zeros(shape), w, padding=1), kernel)
    assert y.shape == (shape[0], shape[1] + 2, shape[2] + 2, 2)
    np.testing.assert_array_equal(y, np.full(y.shape, -4.0 * shape[3]))
    np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0], -4.0 * y[..., 0].size + 0 * kernel)


@given(conv_cases(), seeds)
def test_euclid_conv_and_its_gradients_are_exact(case, seed):
    x, w, g = normal(seed, case.x, case.w, case.out)

    @jax.jit
    def run(x, w, g):
        y, pullback = jax.vjp(lambda x, w: ops.euclid_conv(x, w, *case.arguments), x, w)
        return y, *pullback(g)

    with jax.enable_x64(True):
        y, dx, dw = (np.asarray(a) for a in run(x, w, g))
    np.testing.assert_allclose(y, literal.conv(x, w, *case.arguments, squares), atol=1e-10)
    rng = np.random.default_rng(seed)
    way_x, way_w = rng.normal(size=x.shape), rng.normal(size=w.shape)

    def along(t):
        return (g * literal.conv(x + t * way_x, w + t * way_w, *case.arguments, squares)).sum()

    slope = (along(1e-4) - along(-1e-4)) / 2e-4
    assert (dx * way_x).sum() + (dw * way_w).sum() == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(
    ("lhs", "rhs", "out"),
    [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("WHNC", "IHOW", "WCHN")],
)
def test_conv_takes_any_layout(lhs, rhs, out, conv):
    x, w = normal(0, (2, 6, 5, 3), (3, 2, 3, 4))
    layout = tuple("".join(names) for names in (lhs, rhs, out))
    given_x = x.transpose(["NHWC".index(name) for name in lhs])
    given_w = w.transpose(["HWIO".index(name) for name in rhs])
    rho = np.abs if conv is CONVS[0] else squares
    expected = literal.conv(x, w, (2, 1), ((1, 1), (0, 2)), (1, 1), (1, 1), 1, rho)
    with jax.enable_x64(True):
        y = conv(given_x, given_w, (2, 1), ((1, 1), (0, 2)), dimension_numbers=layout)
    np.testing.assert_allclose(
        y, expected.transpose(["NHWC".index(name) for name in out]), atol=1e-10
    )


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID"])
def test_padding_by_name_is_the_padding_of_lax(conv, padding):
    x, w = normal(0, (1, 7, 6, 2), (3, 2, 2, 3))
    pads = lax.padtype_to_pads((7, 6), (5, 3), (2, 3), padding)
    short = functools.partial(conv, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    with jax.enable_x64(True):
        by_name = short(x, w, (2, 3), padding, rhs_dilation=(2, 2))
        by_number = short(x, w, (2, 3), pads, rhs_dilation=(2, 2))
    np.testing.assert_array_equal(by_name, by_number)


@pytest.mark.parametrize("conv", CONVS)
def test_batch_groups_pair_parts_of_the_batch_with_parts_of_the_filters(conv):
    x, w = normal(0, (6, 5, 2), (3, 2, 9))
    layout = ("NWC", "WIO", "NWC")
    with jax.enable_x64(True):
        y = conv(x, w, (1,), "SAME", dimension_numbers=layout, batch_group_count=3)
        parts = [
            conv(x[2 * i : 2 * i + 2], w[..., 3 * i : 3 * i + 3], (1,), "SAME", None, None, layout)
            for i in range(3)
        ]
    np.testing.assert_allclose(y, np.concatenate(parts, axis=-1), rtol=1e-12)


@pytest.mark.parametrize("conv", [ops.adder_conv, ops.euclid_conv])
def test_short_conv_takes_any_batch_dimensions_and_single_numbers(conv):
    x, w = (a.astype(np.float32) for a in normal(0, (2, 3, 6, 6, 2), (3, 3, 2, 4)))
    whole = conv(x, w, 2, 1, kernel_dilation=1)
    assert whole.shape == (2, 3, 3, 3, 4)
    one = conv(x[1, 2], w, (2, 2), [(1, 1), 1])
    np.testing.assert_allclose(whole[1, 2], one, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("product", [ops.adder_matmul, ops.euclid_matmul])
def test_accumulates_in_float32_and_returns_what_is_preferred(product, dtype):
    # In 16 bit, adding 1 to 2048 (float16) or 256 (bfloat16) gets lost.
    x, w = jnp.ones((2, 5000), dtype), jnp.zeros((5000, 3), dtype)
    assert product(x, w).dtype == dtype
    wide = product(x, w, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    assert (wide == -5000).all()


def test_operands_of_short_forms_are_promoted():
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
    assert ops.adder_matmul(x, w).dtype == jnp.float32
    assert ops.euclid_conv(jnp.ones((5, 3), jnp.float16), w[None]).dtype == jnp.float32


@given(
    st.sampled_from(["ab,bc->ac", "...a,hab->...hb", "nta,hab->nthb", "ba,bca->cb", "ab,ab->ab"])
)
def test_einsum_is_flax_s_einsum_with_another_product(subscripts):
    sizes = {"a": 3, "b": 2, "c": 4, "h": 5, "n": 2, "t": 3}
    left, right = subscripts.split("->")[0].split(",")
    x, w = normal(
        0,
        tuple(6 if c == "." else sizes[c] for c in left.replace("...", ".")),
        tuple(sizes[c] for c in right),
    )
    left, right = left.replace("...", "Z"), right.replace("...", "Z")
    letters = "".join(dict.fromkeys(left + right))
    spread = []
    for operand, array in ((left, x), (right, w)):
        ordered = np.einsum(f"{operand}->{''.join(c for c in letters if c in operand)}", array)
        missing = tuple(i for i, c in enumerate(letters) if c not in operand)
        spread.append(np.expand_dims(ordered, missing))
    out = subscripts.split("->")[1].replace("...", "Z")
    kept = "".join(c for c in letters if c in out)
    summed = tuple(i for i, c in enumerate(letters) if c not in out)
    difference = spread[0] - spread[1]
    for einsum, terms in (
        (ops.adder_einsum, np.abs(difference)),
        (ops.euclid_einsum, difference**2),
    ):
        with jax.enable_x64(True):
            y = einsum(subscripts, x, w)
        expected = np.einsum(f"{kept}->{out}", -terms.sum(summed))
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("subscripts", "x", "w", "message"),
    [
        ("ab,bc", (2, 3), (3, 4), "must have the form"),
        ("aab,bc->ac", (2, 2, 3), (3, 4), "at most once in an operand"),
        ("ab,bc->c", (2, 3), (3, 4), "in the result"),
        ("abd,bc->ac", (2, 3), (3, 4), "as many letters as dimensions"),
        ("ab,...bc->ac", (2, 3), (3, 4), "'...' in x only"),
        ("ab,bc->ac", (2, 3), (5, 4), r"\[2, 3\].*\[5, 4\]"),
    ],
)
@pytest.mark.parametrize("einsum", [ops.adder_einsum, ops.euclid_einsum])
def test_einsum_refuses_what_has_no_adder_form(einsum, subscripts, x, w, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        einsum(subscripts, jnp.ones(x), jnp.ones(w))
    assert str(caught.value).startswith(einsum.__name__.removesuffix("einsum"))


X, W = jnp.ones((2, 3)), jnp.ones((3, 4))
IMAGE, KERNEL = jnp.ones((1, 5, 5, 3)), jnp.ones((3, 3, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.adder_matmul(X, X), ValueError, r"\(2, 3\) and \(2, 3\)"),
        (lambda: ops.euclid_matmul(X, W[0]), ValueError, r"kernel \(K, N\), got"),
        (lambda: ops.adder_matmul(1.0, W), ValueError, r"got shapes \(\)"),
        (lambda: ops.adder_conv(X, W), ValueError, "takes x"),
        (lambda: ops.adder_conv(IMAGE, KERNEL[:, :, :2]), ValueError, r"float32\[1, 5, 5, 3\]"),
        (lambda: ops.adder_conv(IMAGE, KERNEL, padding="FULL"), (ValueError, RuntimeError), "FULL"),
        (
            lambda: ops.adder_conv(IMAGE, KERNEL, strides=(1,)),
            (ValueError, TypeError),
            "adder_conv",
        ),
        (lambda: ops.euclid_conv(IMAGE, KERNEL, strides=0), (ValueError, TypeError), "euclid_conv"),
        (
            lambda: ops.adder_conv(IMAGE, KERNEL, feature_group_count=2),
            (ValueError, TypeError),
            "feature",
        ),
        (
            lambda: ops.adder_dot_general(X, W, (((0,), (0,)), ((), ()))),
            TypeError,
            r"adder_dot_general\(lhs float32\[2, 3\], rhs float32\[3, 4\]\): dot_general requires",
        ),
        (
            lambda: ops.adder_dot_general(X, W.astype(jnp.bfloat16), (((1,), (0,)), ((), ()))),
            TypeError,
            "same dtype",
        ),
        (lambda: ops.adder_matmul(X > 0, W > 0), TypeError, "got bool"),
        (lambda: ops.adder_matmul(X + 1j, W + 1j), TypeError, "got complex64"),
        (lambda: ops.adder_matmul(X.astype("int8"), W.astype("int8")), TypeError, "int32"),
        (
            lambda: ops.euclid_matmul(
                X.astype(int), W.astype(int), preferred_element_type=jnp.int32
            ),
            TypeError,
            "euclid_dot_general takes floating-point",
        ),
        (lambda: ops.adder_matmul(X, W, preferred_element_type=jnp.int32), TypeError, "int32"),
        (lambda: ops.adder_matmul(X, W, rule="sign"), TypeError, "must be a GradientRule"),
        (lambda: ops.adder_matmul(X, W, implementation="cuda"), ValueError, "'reference', 'xla'"),
    ],
)
def test_errors_say_what_was_given_at_trace_time(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(call)


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63)])
@pytest.mark.parametrize("argument", ["strides", "input_dilation", "kernel_dilation", "padding"])
@pytest.mark.parametrize("conv", [ops.adder_conv, ops.euclid_conv])
def test_arguments_beyond_all_sizes_are_refused(conv, argument, value):
    with pytest.raises(ValueError, match=rf"{conv.__name__}.*at most 2147483647.*{value}"):
        jax.eval_shape(functools.partial(conv, **{argument: value}), IMAGE, KERNEL)


@pytest.mark.parametrize("conv", [ops.adder_conv, ops.euclid_conv])
def test_results_beyond_all_sizes_are_refused(conv):
    image = jax.ShapeDtypeStruct((1, 2**30, 2**30, 1), jnp.float32)
    for options in ({"input_dilation": 2**30, "padding": 1}, {"padding": 2**31 - 1}):
        with pytest.raises(ValueError, match=r"too (many|large)"):
            jax.eval_shape(functools.partial(conv, **options), image, KERNEL[..., :1, :])


@pytest.mark.parametrize("implementation", ["xla", "reference", None])
@pytest.mark.parametrize(
    ("dtype", "most"), [("uint8", 8_421_504), ("int8", 8_421_504), ("int16", 32_768)]
)
def test_integer_sums_that_need_not_fit_are_refused(dtype, most, implementation):
    options = {"preferred_element_type": jnp.int32, "implementation": implementation}

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    matmul = functools.partial(ops.adder_matmul, **options)
    conv = functools.partial(ops.adder_conv, **options, padding="VALID")
    assert jax.eval_shape(matmul, shape(2, most), shape(most, 3)).shape == (2, 3)
    half = most // 2
    assert jax.eval_shape(conv, shape(1, 2, half), shape(2, half, 3)).shape == (1, 1, 3)
    with pytest.raises(
        ValueError, match=f"sum of {most} differences of {dtype}, not of {most + 1}"
    ):
        jax.eval_shape(matmul, shape(2, most + 1), shape(most + 1, 3))
    with pytest.raises(ValueError, match=f"sum of {most} differences of {dtype}"):
        jax.eval_shape(conv, shape(1, 2, half + 1), shape(2, half + 1, 3))


def test_the_longest_sum_of_bytes_fits():
    x, w = np.full((1, 8_421_504), 255, np.uint8), np.zeros((8_421_504, 1), np.uint8)
    assert int(ops.adder_matmul(x, w, preferred_element_type=jnp.int32)[0, 0]) == -255 * 8_421_504


@pytest.mark.parametrize(
    "forward_mode", [lambda f: jax.jacfwd(f)(X), lambda f: jax.jvp(f, (X,), (X,))]
)
def test_forward_mode_of_adder_products_raises(forward_mode):
    with pytest.raises(TypeError, match="custom_vjp"):
        forward_mode(lambda x: ops.adder_matmul(x, W))


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("conv", [False, True])
def test_an_implementation_for_other_hardware_says_so_when_it_is_lowered(
    name, conv, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    about = jadder.implementations()[name]
    assert not about.available

    @jax.jit
    def gradient(x):
        def loss(x):
            if conv:
                return ops.adder_conv(
                    x[None, :, :, None], jnp.ones((2, 2, 1, 1)), implementation=name
                ).sum()
            return ops.adder_matmul(x, jnp.ones((4, 5)), implementation=name).sum()

        return jax.vmap(jax.grad(loss))(x)

    with pytest.raises(ValueError, match=f"implementation='{name}'.*only: {about.about}"):
        gradient(jnp.ones((2, 3, 4)))
    platform = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}[name]
    gradient.trace(jnp.ones((2, 3, 4))).lower(lowering_platforms=(platform,))
    assert not list(tmp_path.iterdir())


def test_forward_mode_of_euclid_products_works():
    _, tangent = jax.jvp(lambda x: ops.euclid_matmul(x, W), (X,), (X,))
    np.testing.assert_allclose(tangent, np.zeros((2, 4)), atol=1e-6)


def test_flax_layers_accept_the_products_as_arguments():
    x = jnp.ones((2, 6, 6, 3))
    linear = nnx.Linear(3, 4, dot_general=ops.adder_dot_general, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(linear(x), ops.adder_matmul(x, linear.kernel[...]), rtol=1e-6)
    conv = nnx.Conv(
        3, 4, (3, 3), conv_general_dilated=ops.adder_conv_general_dilated, rngs=nnx.Rngs(0)
    )
    np.testing.assert_allclose(conv(x), ops.adder_conv(x, conv.kernel[...]), rtol=1e-6)
    einsum = nnx.Einsum("...a,ab->...b", (3, 4), einsum_op=ops.adder_einsum, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(einsum(x), ops.adder_matmul(x, einsum.kernel[...]), rtol=1e-6)
    attention = nnx.MultiHeadAttention(
        2, 3, 4, decode=False, qkv_dot_general=ops.adder_dot_general, rngs=nnx.Rngs(0)
    )
    assert attention(x[0]).shape == (6, 6, 3)


class TestRankPromotion:
    """Under ``jax_numpy_rank_promotion="raise"`` nothing of this package promotes."""

    @pytest.mark.parametrize("implementation", implementations("xla", "cpu", "reference"))
    @pytest.mark.parametrize("rule", [jadder.ADDERNET, jadder.SIGN])
    def test_products(self, implementation, rule):
        options = {"rule": rule, "implementation": implementation}

        def run(x, w, images, filters):
            y = jadder.adder_conv(images, filters, 2, 1, 2, 1, 3, **options).sum()
            y += jadder.adder_conv(images, filters, 2, 1, 2, 1, 3, mask=filters > 0).sum()
            return y + jadder.adder_matmul(x, w, **options).sum()

        operands = normal(0, (5, 2, 3), (3, 4), (2, 5, 5, 3), (3, 3, 1, 6))
        with jax.numpy_rank_promotion("raise"):
            jax.jit(jax.grad(run, (0, 1, 2, 3)))(*operands)

    def test_euclid(self):
        def run(x, w, images, filters):
            y = jadder.euclid_conv(images, filters, 2, 1, 2, 1, 3).sum()
            y += jadder.euclid_conv(images, filters, 2, 1, 2, 1, 3, mask=filters > 0).sum()
            return y + jadder.euclid_matmul(x, w).sum()

        operands = normal(0, (5, 2, 3), (3, 4), (2, 5, 5, 3), (3, 3, 1, 6))
        with jax.numpy_rank_promotion("raise"):
            jax.jit(jax.grad(run, (0, 1, 2, 3)))(*operands)

    @pytest.mark.parametrize("family", ["adder", "euclid"])
    @pytest.mark.parametrize("name", ["lenet5", "vit", "swin"])
    def test_models(self, name, family):
        def run(x):
            model = jadder.models.create(name, family=family, rngs=nnx.Rngs(0))
            return model(x)

        with jax.numpy_rank_promotion("raise"):
            jax.eval_shape(run, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))

    @pytest.mark.parametrize(
        "layer",
        [
            functools.partial(jadder.AdderConvTranspose, 3, 4, (2, 2), use_bias=True),
            functools.partial(jadder.EuclidConvTranspose, 3, 4, (2, 2), use_bias=True),
            functools.partial(jadder.AdderConv, 3, 4, (2, 2), use_bias=True),
            functools.partial(jadder.AdderLinear, 3, 4, use_bias=True),
        ],
    )
    def test_layers(self, layer):
        with jax.numpy_rank_promotion("raise"):
            jax.eval_shape(lambda: layer(rngs=nnx.Rngs(0))(jnp.ones((2, 5, 5, 3))))

    def test_attention_with_bias_and_mask(self):
        with jax.numpy_rank_promotion("raise"):
            layer = jadder.AdderAttention(2, 4, scores="adder", identity=True, rngs=nnx.Rngs(0))
            x, square = jnp.ones((2, 5, 4)), jnp.ones((5, 5))
            assert layer(x, bias=square, mask=square > 0).shape == (2, 5, 4)
