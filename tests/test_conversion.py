"""Whole models with other products, norms and implementations."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder import ADDER_VIT, ADDERNET, SIGN, AdderWarning, adderize, set_implementation
from jadder.models import BatchNorm, LayerNorm, get_family
from jadder.products import MixedProduct, adder_products

X = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)


def mlp(*norms, rngs=None):
    """Linear, what is given, relu, linear."""
    rngs = nnx.Rngs(0) if rngs is None else rngs
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), *norms, nnx.relu, nnx.Linear(4, 2, rngs=rngs)
    )


def first(path, layer):
    return path == ("layers", 0)


class Mine(nnx.Conv):
    pass


class TestMasks:
    @pytest.mark.parametrize("kind", [nnx.Conv, nnx.ConvTranspose])
    def test_masked_taps_of_converted_layers_see_nothing(self, kind):
        mask = np.ones((3, 3, 3, 4))
        mask[:, :, 1] = 0
        layer = adderize(kind(3, 4, (3, 3), mask=jnp.asarray(mask), rngs=nnx.Rngs(0)))
        other = X.copy()
        other[..., 1] = 1e6
        np.testing.assert_array_equal(nnx.jit(layer)(X), nnx.jit(layer)(other))

    def test_a_subclass_s_mask_cannot_be_taken_over(self):
        layer = Mine(3, 4, (1, 1), mask=jnp.ones((1, 1, 3, 4)), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"Mine at 0 is a subclass of nnx\.Conv, whose mask"):
            adderize(nnx.List([layer]))
        assert type(adderize(Mine(3, 4, (1, 1), rngs=nnx.Rngs(0)))) is Mine


class TestNorms:
    def test_flax_s_become_those_of_this_package_with_their_values(self):
        rngs = nnx.Rngs(0)
        norms = (
            nnx.BatchNorm(4, epsilon=1e-3, dtype=jnp.float32, rngs=rngs),
            nnx.LayerNorm(4, rngs=rngs),
        )
        model = mlp(*norms)
        for variable in (norms[0].scale, norms[0].bias, norms[0].mean, norms[0].var):
            variable.set_value(jnp.array([1.0, 2.0, 0.5, 3.0]))
        converted = adderize(model, first)
        batch, layer = converted.layers[1:3]
        assert (type(batch), type(layer)) == (BatchNorm, LayerNorm)
        assert (batch.momentum, batch.epsilon, batch.dtype) == (0.9, 1e-3, jnp.float32)
        assert not batch.use_fast_variance
        assert not layer.use_fast_variance
        y = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        for old, new in zip(norms, (batch, layer), strict=True):
            jax.tree.map(np.testing.assert_array_equal, nnx.state(old), nnx.state(new))
            old.eval()
            new.eval()
            np.testing.assert_allclose(old(y), new(y), rtol=1e-5, atol=1e-6)
        batch.train()
        batch(y)
        fresh = BatchNorm(4, rngs=rngs)
        fresh.mean.set_value(norms[0].mean.get_value())
        fresh.var.set_value(norms[0].var.get_value())
        fresh(y)
        np.testing.assert_allclose(batch.var[...], fresh.var[...], rtol=1e-6)
        assert type(model.layers[1]) is nnx.BatchNorm

    def test_far_from_zero_they_keep_their_digits(self):
        rng = np.random.default_rng(0)
        x = 1 + 0.05 * rng.normal(size=(256, 2304)).astype(np.float32)
        layers = (
            nnx.Linear(2304, 8, use_bias=False, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        )
        options = {"kernel_init": nnx.initializers.normal(1.0), "rngs": nnx.Rngs(1)}
        y = adderize(nnx.Sequential(*layers), **options)(x)
        kernel = np.asarray(
            adderize(layers[0], **options | {"rngs": nnx.Rngs(1)}).kernel[...], float
        )
        exact = -np.stack([np.abs(x.astype(float) - kernel[:, n]).sum(1) for n in range(8)], 1)
        exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
        np.testing.assert_allclose(y, exact, atol=5e-3)

    def test_an_own_momentum_and_other_norms_stay(self):
        rngs = nnx.Rngs(0)
        norms = nnx.BatchNorm(4, momentum=0.95, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)
        batch, group = adderize(mlp(*norms), first).layers[1:3]
        assert batch.momentum == 0.95
        assert type(group) is nnx.GroupNorm
        assert not group.use_fast_variance

    def test_they_stay_if_asked_to(self):
        converted = adderize(mlp(nnx.BatchNorm(4, rngs=nnx.Rngs(0))), first, convert_norms=False)
        norm = converted.layers[1]
        assert (type(norm), norm.momentum, norm.use_fast_variance) == (nnx.BatchNorm, 0.99, True)


class TestWarnings:
    def faults(self, model, **options):
        """The lines of the warning, by path."""
        with pytest.warns(AdderWarning, match="no normalisation comes after") as caught:
            adderize(model, **options)
        lines = str(caught[0].message).splitlines()[1:]
        assert caught[0].filename == __file__
        return dict(line.strip().split(": ") for line in lines)

    def test_what_follows_in_a_sequential(self):
        norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        faults = {"layers/0": "relu follows", "layers/2": "nothing follows"}
        assert self.faults(mlp()) == faults
        assert self.faults(mlp(norm)) == {"layers/3": "nothing follows"}
        rms = mlp(nnx.Dropout(0.1), nnx.RMSNorm(4, rngs=nnx.Rngs(0)))
        assert self.faults(rms, where=first) == {"layers/0": "RMSNorm follows"}
        nested = nnx.Sequential(mlp(norm), nnx.tanh)
        assert self.faults(nested) == {"layers/0/layers/3": "tanh follows"}

    def test_recurrent_cells(self):
        faults = self.faults(nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))))
        assert len(faults) == 8
        assert set(faults.values()) == {"gates of a recurrent cell, which saturate, follow"}

    @pytest.mark.parametrize("normalize_qk", [False, True])
    def test_attention(self, normalize_qk):
        attention = nnx.MultiHeadAttention(
            2, 4, normalize_qk=normalize_qk, decode=False, rngs=nnx.Rngs(0)
        )
        named = {"value"} if normalize_qk else {"query", "key", "value", "out"}
        assert self.faults(attention).keys() == named

    def test_models_without_any_norm(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.one, self.two = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))

        faults = self.faults(Net(nnx.Rngs(0)), where=lambda path, layer: path == ("one",))
        assert faults == {"one": "the model has no normalisation"}

    def test_nothing_is_said_where_all_is_well_or_unknown(self):
        norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adderize(mlp(nnx.Dropout(0.1), norm), first)
            adderize(nnx.Sequential(mlp(lambda x: x, norm)), lambda path, layer: path[-1] == 0)
            adderize(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))  # a layer to be put somewhere


def model(name, **options):
    """Small ones of any kind."""
    sizes = {
        "vit": {"features": 8, "depth": 1, "num_heads": 2, "mlp_features": 8, "image_size": 8},
        "swin": {
            "features": 8,
            "depths": (1,),
            "num_heads": (2,),
            "head_features": 4,
            "image_size": 8,
        },
        "lenet5": {"image_size": 16},
    }
    return jadder.models.create(name, rngs=nnx.Rngs(0), **sizes.get(name, {}), **options)


class TestImplementations:
    @pytest.mark.parametrize("name", ["vit", "swin", "lenet5"])
    def test_all_products_get_it_and_keep_their_rules(self, name):
        family = dataclasses.replace(get_family("adder"), implementation="reference")
        options = {"scores": "adder"} if name in ("vit", "swin") else {}
        net = model(name, family=family, **options)
        jadder.set_l1_share(net, 0.5)
        rules = [place.product.adder.rule for place in adder_products(net)]
        assert ADDER_VIT in rules or ADDERNET in rules
        assert set_implementation(net, "xla") == len(rules)
        products = [place.product for place in adder_products(net)]
        assert all(isinstance(product, MixedProduct) for product in products)
        assert [product.adder.rule for product in products] == rules
        assert {product.adder.implementation for product in products} == {"xla"}

    def test_functions_count_too(self):
        layer = nnx.Linear(3, 4, dot_general=jadder.adder_dot_general, rngs=nnx.Rngs(0))
        y = layer(X)
        assert set_implementation(layer, "reference") == 1
        np.testing.assert_allclose(layer(X), y, rtol=1e-6)
        assert layer.dot_general.implementation == "reference"

    def test_a_multiplying_twin_has_none(self):
        assert set_implementation(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "xla") == 0

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match=r"None or one of \['cpu', .*got 'cuda'"):
            set_implementation(jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0)), "cuda")
        with pytest.raises(ValueError, match="got 'cuda'"):
            adderize(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), implementation="cuda")
        with pytest.raises(TypeError, match=r"jadder.SIGN or one of your own, got 'sign'"):
            adderize(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rule="sign")

    @pytest.mark.filterwarnings("ignore:adderize. no normalisation:jadder.AdderWarning")
    def test_adderize_keeps_the_rules_and_shares_of_adders(self):
        layers = [
            jadder.AdderLinear(3, 4, rule=SIGN, rngs=nnx.Rngs(0)),
            jadder.ScaledAdderLinear(4, 4, rngs=nnx.Rngs(0)),
            nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
        ]
        net = nnx.Sequential(*layers)
        jadder.set_l1_share(net, 0.5)
        net = adderize(net, implementation="xla")
        products = [layer.dot_general for layer in net.layers]
        assert [type(product) for product in products[:2]] == [MixedProduct] * 2
        products = [getattr(product, "adder", product) for product in products]
        assert [product.rule for product in products] == [SIGN, ADDER_VIT, ADDERNET]
        assert {product.implementation for product in products} == {"xla"}
        net = adderize(net, rule=SIGN)
        assert {place.product.rule for place in adder_products(net)[2:]} == {SIGN}
        assert net.layers[1].dot_general.adder.rule == SIGN

    def test_adderize_of_adders_that_have_no_layer_of_flax(self):
        scaled = jadder.ScaledAdderLinear(3, 4, rngs=nnx.Rngs(0))
        assert adderize(scaled, implementation="xla").dot_general.implementation == "xla"


class TestWhere:
    def test_the_model_itself_may_be_the_layer(self):
        linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        assert type(adderize(linear, lambda path, layer: "head" not in path)) is jadder.AdderLinear
        with pytest.raises(
            ValueError, match=r"empty path \(\) and raised IndexError.*'head' not in"
        ):
            adderize(linear, lambda path, layer: path[0] != "head")

    def test_other_errors_are_the_caller_s(self):
        with pytest.raises(IndexError):
            adderize(mlp(), lambda path, layer: path[7])


def test_abstract_models():
    abstract = nnx.eval_shape(lambda: mlp(nnx.BatchNorm(4, rngs=nnx.Rngs(0))))
    options = {"kernel_init": nnx.initializers.normal(1.0), "rngs": nnx.Rngs(0)}
    converted = adderize(abstract, first, **options)
    assert converted.layers[0].kernel.get_value() == jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert isinstance(converted.layers[0].kernel, jadder.AdderKernel)
    assert type(converted.layers[1]) is BatchNorm
    concrete = adderize(mlp(nnx.BatchNorm(4, rngs=nnx.Rngs(0))), first)
    assert nnx.graphdef(converted) == nnx.graphdef(concrete)


class TestHalfPrecision:
    def test_products_are_float32_until_they_are_normalised(self):
        rngs = nnx.Rngs(0)
        types = {"dtype": jnp.bfloat16, "rngs": rngs}
        layers = nnx.Linear(3, 4, **types), nnx.BatchNorm(4, **types)
        converted = adderize(nnx.Sequential(*layers))
        assert converted.layers[0](X).dtype == jnp.float32
        assert converted(X).dtype == jnp.bfloat16
        told = nnx.Linear(3, 4, preferred_element_type=jnp.bfloat16, **types)
        assert adderize(told)(X).dtype == jnp.bfloat16
        assert adderize(nnx.Linear(3, 4, rngs=rngs)).preferred_element_type is None

    @pytest.mark.filterwarnings("ignore:adderize. no normalisation:jadder.AdderWarning")
    def test_cells_and_attention_keep_one_dtype(self):
        types = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
        x = X.reshape(2, 12, 9)[..., :4].astype(jnp.bfloat16)
        for model in (
            nnx.RNN(nnx.OptimizedLSTMCell(4, 4, **types)),
            nnx.MultiHeadAttention(2, 4, decode=False, **types),
        ):
            converted = adderize(model)
            expected = nnx.eval_shape(lambda m: m(x), model)
            assert nnx.eval_shape(lambda m: m(x), converted) == expected
