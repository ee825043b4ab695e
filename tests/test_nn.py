"""The layers, what they share with Flax's, and the conversion of whole models."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import lax

import jadder
from jadder import ADDER_VIT, ADDERNET, SIGN, AdderKernel, adder_mask, adderize
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral

X = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)


def kernels(model):
    """The paths of the adder kernels."""
    return [path for path, _ in nnx.to_flat_state(nnx.state(model, AdderKernel))]


@pytest.mark.parametrize(
    ("layer", "product"),
    [
        (functools.partial(jadder.AdderLinear, 3, 4), jadder.adder_matmul),
        (functools.partial(jadder.EuclidLinear, 3, 4), jadder.euclid_matmul),
        (
            functools.partial(jadder.AdderConv, 3, 4, (3, 3), 2, kernel_dilation=2),
            functools.partial(jadder.adder_conv, strides=2, kernel_dilation=2),
        ),
        (
            functools.partial(jadder.EuclidConv, 3, 6, (3, 3), feature_group_count=3),
            functools.partial(jadder.euclid_conv, feature_group_count=3),
        ),
    ],
)
def test_layers_are_their_products(layer, product):
    plain = layer(rngs=nnx.Rngs(0))
    assert plain.bias is None
    np.testing.assert_allclose(plain(X), product(X, plain.kernel[...]), rtol=1e-6)
    biased = layer(use_bias=True, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(biased(X), plain(X) + 1, rtol=1e-5)
    narrow = layer(param_dtype=jnp.float16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert narrow(X).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("ours", "flax"),
    [
        (jadder.AdderLinear, nnx.Linear),
        (jadder.AdderConv, nnx.Conv),
        (jadder.AdderConvTranspose, nnx.ConvTranspose),
        (jadder.EuclidLinear, nnx.Linear),
        (jadder.EuclidConv, nnx.Conv),
        (jadder.EuclidConvTranspose, nnx.ConvTranspose),
    ],
)
def test_positional_arguments_are_flax_s(ours, flax):
    def positional(layer):
        parameters = inspect.signature(layer.__init__).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ours) == positional(flax)
    assert issubclass(ours, flax)


def test_kernels_start_from_the_standard_normal_distribution():
    for layer in (jadder.AdderLinear, jadder.EuclidLinear, jadder.ScaledAdderLinear):
        kernel = layer(100, 100, rngs=nnx.Rngs(0)).kernel[...]
        assert abs(float(kernel.mean())) < 0.05
        assert abs(float(kernel.std()) - 1) < 0.05


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, [(1, 2), 0]])
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("window", "strides", "dilation"), [(2, 2, 1), (3, 2, 2), (1, 2, 1), (2, 3, 1)]
)
def test_transposed_convolutions_place_windows_as_flax_does(
    padding, transpose_kernel, window, strides, dilation
):
    arguments = {
        "padding": padding,
        "kernel_dilation": dilation,
        "transpose_kernel": transpose_kernel,
        "use_bias": True,
        "rngs": nnx.Rngs(0),
    }
    flax = nnx.ConvTranspose(3, 4, (window, window), strides, **arguments)
    ours = jadder.EuclidConvTranspose(3, 4, (window, window), strides, **arguments)
    ours.kernel = flax.kernel
    ours.conv_general_dilated = lax.conv_general_dilated
    np.testing.assert_allclose(ours(X), flax(X), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours(X[0]), flax(X[0]), rtol=1e-5, atol=1e-5)


def test_transposed_adder_convolution_counts_the_zeros_between_inputs():
    layer = jadder.AdderConvTranspose(1, 1, (2,), 2, padding="VALID", rngs=nnx.Rngs(0))
    w = np.asarray(layer.kernel[...]).ravel()
    y = layer(jnp.array([[[3.0], [5.0]]]))[0, :, 0]
    # VALID puts window - 1 zeros on either side of 3 0 5.
    wide = [0, 3, 0, 5, 0]
    expected = [-abs(wide[i] - w[0]) - abs(wide[i + 1] - w[1]) for i in range(4)]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_transposed_convolution_refuses_circular_padding():
    layer = jadder.AdderConvTranspose(3, 4, (2, 2), padding="CIRCULAR", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'SAME', 'VALID', numbers or pairs, got 'CIRCULAR'"):
        layer(X)


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_convolutions_take_the_paddings_that_flax_adds(padding):
    layer = jadder.AdderConv(3, 4, (3, 3), padding=padding, rngs=nnx.Rngs(0))
    mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
    wide = np.pad(X, [(0, 0), (1, 1), (1, 1), (0, 0)], mode)
    np.testing.assert_allclose(
        layer(X), jadder.adder_conv(wide, layer.kernel[...], padding="VALID"), rtol=1e-6
    )


class TestMasks:
    KINDS = (
        jadder.AdderConv,
        jadder.EuclidConv,
        jadder.AdderConvTranspose,
        jadder.EuclidConvTranspose,
    )

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", [{}, {"strides": 2, "padding": "VALID"}])
    def test_what_a_tap_sees_is_its_own_part_of_the_sum(self, kind, options):
        """Parts add up to the whole, and each depends on its own taps of the kernel only."""
        if kind is not jadder.AdderConv and "Transpose" in kind.__name__:
            options = options | {"transpose_kernel": bool(options)}
        whole = kind(3, 3, (3, 2), rngs=nnx.Rngs(0), **options)
        mask = np.random.default_rng(0).integers(0, 2, whole.kernel.shape).astype(np.float32)
        parts = [kind(3, 3, (3, 2), mask=m, rngs=nnx.Rngs(0), **options) for m in (mask, 1 - mask)]
        run = nnx.jit(lambda layer, x: layer(x))
        np.testing.assert_allclose(
            sum(run(part, X) for part in parts), run(whole, X), rtol=1e-4, atol=1e-4
        )
        gradient = nnx.jit(nnx.grad(lambda layer: layer(X).sum()))(parts[0])["kernel"][...]
        np.testing.assert_array_equal(gradient != 0, mask != 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_masked_channel_is_not_seen_and_gets_no_gradient(self, kind):
        mask = np.ones((3, 3, 3, 4), np.float32)
        mask[:, :, 1] = 0
        layer = kind(3, 4, (3, 3), mask=mask, rngs=nnx.Rngs(0))
        other = X.copy()
        other[..., 1] = 1e6
        run = nnx.jit(nnx.value_and_grad(lambda layer, x: jnp.sin(layer(x)).sum(), argnums=1))
        (y, gradient), (other_y, _) = run(layer, X), run(layer, other)
        assert float(y) == float(other_y)
        np.testing.assert_array_equal(gradient[..., 1], 0)
        assert (gradient[..., 0] != 0).any()

    def test_other_values_multiply_the_kernel_as_in_flax(self):
        half = jadder.AdderConv(3, 4, (1, 1), mask=np.full((1, 1, 3, 4), 0.5), rngs=nnx.Rngs(0))
        kernel = 0.5 * half.kernel[...]
        np.testing.assert_allclose(half(X), jadder.adder_conv(X, kernel), rtol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_another_shape_is_refused_though_it_broadcasts(self, kind):
        with pytest.raises(ValueError, match=r"kernel's shape \(3, 3, 3, 4\), got \(3, 3, 1, 1\)"):
            kind(3, 4, (3, 3), mask=jnp.ones((3, 3, 1, 1)), rngs=nnx.Rngs(0))
        layer = kind(3, 4, (3, 3), mask=jnp.ones((3, 3, 3, 4)), rngs=nnx.Rngs(0))
        layer.mask = jnp.ones((3, 3, 1, 4))
        with pytest.raises(ValueError, match=r"\(3, 3, 1, 4\)"):
            layer(X)

    def test_mixed_distances_see_the_mask_too(self):
        mask = np.zeros((3, 3, 3, 4))
        mask[0, 0] = 1
        layer = jadder.AdderConv(3, 4, (3, 3), padding="VALID", mask=mask, rngs=nnx.Rngs(0))
        jadder.set_l1_share(layer, 0.5)
        d = X[:, :4, :4, :, None] - layer.kernel[0, 0]
        expected = -(0.5 * np.abs(d) + 0.25 * d**2).sum(-2)
        np.testing.assert_allclose(layer(X), expected, rtol=1e-4)


class TestMetadata:
    LAYERS = (
        functools.partial(jadder.AdderLinear, use_bias=True),
        functools.partial(jadder.EuclidLinear, use_bias=True),
        jadder.ScaledAdderLinear,
    )

    @pytest.mark.parametrize("kind", LAYERS)
    def test_reaches_kernels_and_biases(self, kind):
        mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            layer = kind(
                8,
                4,
                kernel_metadata={"out_sharding": (None, "i"), "note": 1},
                bias_metadata={"out_sharding": ("i",)},
                rngs=nnx.Rngs(0),
            )
            assert layer.kernel.get_value().sharding.spec == jax.P(None, "i")
            assert layer.bias.get_value().sharding.spec == jax.P("i")
            assert layer.kernel.get_metadata("note") == 1
            y = layer(jnp.ones((2, 8)), out_sharding=jax.P(None, "i"))
        assert y.sharding.spec == jax.P(None, "i")

    def test_reaches_scales(self):
        options = {f"{name}_scale_metadata": {"note": name} for name in ("input", "output")}
        layer = jadder.ScaledAdderLinear(8, 4, rngs=nnx.Rngs(0), **options)
        assert layer.input_scale.get_metadata("note") == "input"
        assert layer.output_scale.get_metadata("note") == "output"

    def test_reaches_the_projections_of_attention(self):
        layer = jadder.AdderAttention(
            2,
            4,
            kernel_metadata={"note": "kernel"},
            out_kernel_metadata={"note": "last"},
            bias_metadata={"note": "bias"},
            rngs=nnx.Rngs(0),
        )
        for projection, note in ((layer.query, "kernel"), (layer.out, "last")):
            assert projection.layers[0].kernel.get_metadata("note") == note
            assert projection.layers[0].bias.get_metadata("note") == "bias"
        with pytest.raises(ValueError, match="metadata is for the default projections"):
            jadder.AdderAttention(
                2, 4, projection=nnx.Linear, bias_metadata={"note": 1}, rngs=nnx.Rngs(0)
            )


@pytest.mark.parametrize(
    "kind",
    [
        functools.partial(jadder.AdderLinear, 2, 4),
        functools.partial(jadder.AdderConv, 2, 4, (1, 1)),
        functools.partial(jadder.AdderConvTranspose, 2, 4, (1, 1)),
        functools.partial(jadder.ScaledAdderLinear, 2, 4),
        functools.partial(jadder.AdderAttention, 2, 4),
        lambda rngs, **options: AdderConvGeneralDilated(**options),
        lambda rngs, **options: jadder.nn.AdderEinsum(**options),
        lambda rngs, **options: jadder.models.Family(
            name="mine",
            conv_class=jadder.AdderConv,
            linear_class=jadder.AdderLinear,
            projection_class=jadder.AdderLinear,
            **options,
        ),
    ],
)
def test_unknown_rules_and_implementations_are_refused_when_a_layer_is_made(kind):
    with pytest.raises(TypeError, match=r"jadder\.SIGN or one of your own, got 'sign'"):
        kind(rule="sign", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"None or one of \['cpu', .*, got 'cuda'"):
        kind(implementation="cuda", rngs=nnx.Rngs(0))


def test_scaled_linear_rounds_to_half_precision_once():
    exact = jadder.ScaledAdderLinear(512, 64, rngs=nnx.Rngs(0))
    exact.output_scale[...] = jnp.linspace(0.1, 1, 64)
    exact.bias[...] = jnp.full(64, 57.0)
    half = jadder.ScaledAdderLinear(512, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(half, nnx.state(exact))
    x = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    rounded = [jnp.asarray(a, jnp.bfloat16).astype(jnp.float32) for a in (x, exact.kernel[...])]
    exact.kernel[...] = rounded[1]
    exact.output_scale[...] = exact.output_scale[...].astype(jnp.bfloat16)
    y = half(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), exact(rounded[0]), rtol=2**-8, atol=1e-3)


def test_scaled_linear_is_the_published_formula():
    layer = jadder.ScaledAdderLinear(3, 4, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    layer.input_scale[...] = e = rng.normal(size=3).astype(np.float32)
    layer.output_scale[...] = f = rng.normal(size=4).astype(np.float32)
    layer.bias[...] = b = rng.normal(size=4).astype(np.float32)
    expected = f * -np.abs((e * X)[..., None] - layer.kernel[...]).sum(-2) + b
    np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-5)
    assert layer.dot_general.rule == ADDER_VIT
    assert jadder.ScaledAdderLinear(3, 4, use_bias=False, rngs=nnx.Rngs(0)).bias is None


class TestAttention:
    x = X.reshape(2, 12, 9)

    @pytest.mark.parametrize("scores", ["dot", "adder"])
    @pytest.mark.parametrize("identity", [False, True])
    def test_is_softmax_of_scores_times_values(self, scores, identity):
        layer = jadder.AdderAttention(
            3, 9, 6, 5, scores=scores, identity=identity, rngs=nnx.Rngs(0)
        )
        projections = (layer.query, layer.key, layer.value)
        q, k, v = (np.asarray(p(self.x)).reshape(2, 12, 3, 2) for p in projections)
        if scores == "dot":
            logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(2)
        else:
            logits = -np.abs(q[:, :, None] - k[:, None]).sum(-1).transpose(0, 3, 1, 2) / np.sqrt(2)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, v) + identity * v
        expected = layer.out(mixed.reshape(2, 12, 6))
        np.testing.assert_allclose(layer(self.x), expected, rtol=1e-4, atol=1e-4)

    def test_masked_keys_do_not_matter(self):
        layer = jadder.AdderAttention(3, 9, scores="adder", rngs=nnx.Rngs(0))
        causal = nnx.make_causal_mask(self.x[..., 0])
        changed = self.x.copy()
        changed[:, 7:] = 100.0
        np.testing.assert_allclose(
            layer(self.x, mask=causal)[:, :7], layer(changed, mask=causal)[:, :7], rtol=1e-5
        )

    @pytest.mark.parametrize("scores", ["dot", "adder"])
    def test_a_bias_of_minus_infinity_is_a_mask(self, scores):
        layer = jadder.AdderAttention(3, 9, scores=scores, rngs=nnx.Rngs(0))
        causal = nnx.make_causal_mask(self.x[..., 0])
        bias = np.where(causal, 0.5, -np.inf)
        np.testing.assert_allclose(
            layer(self.x, bias=bias), layer(self.x, mask=causal), rtol=1e-5, atol=1e-6
        )
        assert not np.allclose(layer(self.x, mask=causal), layer(self.x))

    @pytest.mark.parametrize("scores", ["dot", "adder"])
    def test_half_precision_keeps_its_digits(self, scores):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, 6, 256)), jnp.bfloat16)
        options = {"num_heads": 2, "in_features": 256, "scores": scores}
        layers = [
            jadder.AdderAttention(dtype=dtype, rngs=nnx.Rngs(0), **options)
            for dtype in (jnp.float32, jnp.bfloat16)
        ]
        for layer in layers:  # alike in both precisions
            for projection in (layer.query, layer.key, layer.value, layer.out):
                kernel = projection.layers[0].kernel
                kernel[...] = kernel[...].astype(jnp.bfloat16)
        exact, half = (layer(x) for layer in layers)
        assert half.dtype == jnp.bfloat16
        projected = [layer.query(x).astype(jnp.float32) for layer in layers]
        np.testing.assert_allclose(projected[1], projected[0], atol=0.03)
        np.testing.assert_allclose(half.astype(np.float32), exact, atol=0.15)

    def test_cross_attention_and_sown_weights(self):
        layer = jadder.AdderAttention(3, 9, rngs=nnx.Rngs(0))
        forward = nnx.capture(layer, nnx.Intermediate)
        y, intermediates = forward(self.x[:, :4], self.x, sow_weights=True)
        assert y.shape == (2, 4, 9)
        (weights,) = intermediates["attention_weights"].get_value()
        assert weights.shape == (2, 3, 4, 12)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_heads": 2}, r"\(9\) must be divisible by num_heads \(2\)"),
            ({"num_heads": 0}, "num_heads"),
            ({"num_heads": 3, "scores": "cosine"}, "'dot' or 'adder', got 'cosine'"),
        ],
    )
    def test_bad_arguments_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            jadder.AdderAttention(in_features=9, **arguments, rngs=nnx.Rngs(0))

    def test_identity_needs_as_many_queries_as_values(self):
        layer = jadder.AdderAttention(3, 9, identity=True, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="as many queries as values, got 4 and 12"):
            layer(self.x[:, :4], self.x)


class Zoo(nnx.Module):
    """One of each of Flax's layers that multiply."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 5, (2, 2), 2, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(5, 8, rngs=rngs), general])
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.cell = nnx.GRUCell(4, 4, rngs=rngs)
        self.head = nnx.Einsum("...a,ab->...b", (4, 3), (3,), rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.up(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = self.attention(x.reshape(x.shape[0], -1, 4))
        _, x = self.cell(x, x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:adderize. no normalisation:jadder.AdderWarning")
class TestAdderize:
    def test_every_product_changes_and_the_model_given_does_not(self):
        zoo = Zoo(nnx.Rngs(0))
        before = zoo(X)
        converted = adderize(zoo, rule=SIGN)
        assert not kernels(zoo)
        np.testing.assert_array_equal(zoo(X), before)
        every = [path for path, _ in nnx.to_flat_state(nnx.state(zoo)) if path[-1] == "kernel"]
        assert kernels(converted) == every
        assert len(every) == 4 + 4 + 2 + 1
        assert converted(X).shape == before.shape
        converted.eval()
        jaxpr = str(jax.make_jaxpr(converted)(X))
        assert "conv_general_dilated" not in jaxpr
        # What is left of dot_general is the attention's softmax times values, and its scores.
        assert jaxpr.count("dot_general") == 2

    def test_converted_layers_are_the_layers_of_this_package(self):
        linear = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
        conv = nnx.Conv(3, 4, (3, 3), strides=2, use_bias=False, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(
            adderize(linear)(X), jadder.adder_matmul(X, linear.kernel[...]), rtol=1e-6
        )
        np.testing.assert_allclose(
            adderize(conv)(X), jadder.adder_conv(X, conv.kernel[...], 2), rtol=1e-6
        )

    def test_where_leaves_layers_out(self):

        def where(path, layer):
            return path[0] != "head" and not isinstance(layer, nnx.Conv)

        converted = adderize(Zoo(nnx.Rngs(0)), where)
        paths = {path[0] for path in kernels(converted)}
        assert paths == {"up", "blocks", "attention", "cell"}

    def test_new_kernels(self):
        zoo = Zoo(nnx.Rngs(0))
        ones = adderize(zoo, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
        assert all((leaf == 1).all() for leaf in jax.tree.leaves(nnx.state(ones, AdderKernel)))
        with pytest.raises(ValueError, match="needs rngs"):
            adderize(zoo, kernel_init=nnx.initializers.ones)

    def test_nothing_to_convert_is_an_error(self):
        with pytest.raises(ValueError, match="nothing to change"):
            adderize(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="nothing to change"):
            adderize(Zoo(nnx.Rngs(0)), lambda path, layer: False)

    def test_unknown_subclass_of_a_layer_without_a_hook_is_an_error(self):
        class Mine(nnx.ConvTranspose):
            pass

        with pytest.raises(ValueError, match="Mine at 0 is a subclass"):
            adderize(nnx.List([Mine(3, 4, (2, 2), rngs=nnx.Rngs(0))]))

    def test_a_converted_model_trains(self):
        model = adderize(nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, jadder.adder_sgd(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, gradients = nnx.value_and_grad(lambda m: (m(X) ** 2).mean())(model)
            optimizer.update(model, gradients)
            return loss

        losses = [float(step(model, optimizer)) for _ in range(20)]
        assert losses[-1] < 0.5 * losses[0]


def test_products_with_the_same_fields_are_one_constant():
    for product in (AdderDotGeneral, AdderConvGeneralDilated):
        assert product(SIGN, "xla") == product(SIGN, "xla")
        assert hash(product(SIGN)) == hash(product(SIGN))
        assert product(SIGN) != product(ADDERNET)

    traces = 0
    graphdef = nnx.graphdef(jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(state):
        nonlocal traces
        traces += 1
        return nnx.merge(graphdef, state)(X)

    for seed in range(3):
        run(nnx.state(jadder.AdderLinear(3, 4, rngs=nnx.Rngs(seed))))
    assert traces == 1
    assert nnx.graphdef(jadder.AdderConv(3, 4, (1, 1), rngs=nnx.Rngs(0))) == nnx.graphdef(
        jadder.AdderConv(3, 4, (1, 1), rngs=nnx.Rngs(1))
    )


class TestAdderMask:
    def model(self):
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            jadder.AdderConv(3, 4, (3, 3), rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            jadder.ScaledAdderLinear(4, 5, rngs=rngs),
            nnx.Linear(5, 2, rngs=rngs),
        )

    @pytest.mark.parametrize("container", [lambda s: s, nnx.to_pure_dict, nnx.as_pure])
    def test_marks_adder_kernels_in_any_container(self, container):
        model = self.model()
        params = container(nnx.state(model, nnx.Param))
        marks = adder_mask(model)(params)
        assert sum(jax.tree.leaves(marks)) == 2
        assert len(jax.tree.leaves(marks)) == len(jax.tree.leaves(params))
        layers = marks["layers"]
        assert layers[0]["kernel"]
        assert layers[2]["kernel"]
        assert not layers[3]["kernel"]

    def test_a_tree_without_them_is_an_error(self):
        with pytest.raises(ValueError, match="has layers/0/kernel, the tree begins with"):
            adder_mask(self.model())({"params": {"w": 1}})

    def test_types_survive_a_checkpoint(self, tmp_path):
        model = self.model()
        _, state = nnx.split(model)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "checkpoint", nnx.to_pure_dict(state))
        abstract_graphdef, abstract = nnx.split(nnx.eval_shape(self.model))
        with ocp.StandardCheckpointer() as checkpointer:
            pure = checkpointer.restore(tmp_path / "checkpoint", nnx.to_pure_dict(abstract))
        nnx.replace_by_pure_dict(abstract, pure)
        restored = nnx.merge(abstract_graphdef, abstract)
        assert kernels(restored) == kernels(model)
        np.testing.assert_array_equal(restored(X), model(X))
