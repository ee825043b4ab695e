"""The optimizers: the published formula, on adder kernels only, however optax combines them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

import jadder
from jadder import adder_adamw, adder_mask, adder_sgd, clip_adder_kernels, scale_by_adder

PARAMS = {"adder": jnp.ones((3, 4)), "norm": {"scale": jnp.ones(5), "bias": jnp.ones(5)}}
GRADS = jax.tree.map(lambda p: jnp.linspace(-1, 2, p.size).reshape(p.shape), PARAMS)
MASK = {"adder": True, "norm": False}
OPTIMIZERS = {
    "scale_by_adder": lambda **kwargs: scale_by_adder(**kwargs),
    "adder_sgd": lambda **kwargs: adder_sgd(0.1, **kwargs),
    "adder_adamw": lambda **kwargs: adder_adamw(0.1, **kwargs),
    "clip_adder_kernels": lambda **kwargs: clip_adder_kernels(0.0, 1.5, **kwargs),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    """Each optimizer's constructor."""
    return OPTIMIZERS[request.param]


def model():
    rngs = nnx.Rngs(0)
    adder, norm = jadder.AdderLinear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    return nnx.Sequential(adder, norm, nnx.Linear(4, 2, rngs=rngs))


@given(
    seed=st.integers(0, 1000),
    eta=st.floats(0.01, 10),
    size=st.integers(1, 60),
    exponent=st.integers(-30, 30),
)
def test_adder_gradients_get_the_norm_eta_sqrt_k(seed, eta, size, exponent):
    """Whatever their size: even gradients whose squares vanish or overflow in float32."""
    g = np.random.default_rng(seed).normal(size=size) * 10.0**exponent
    tx = scale_by_adder(eta, mask=True)
    gradient = {"w": jnp.asarray(g, jnp.float32)}
    update, _ = tx.update(gradient, tx.init(gradient))
    expected = eta * np.sqrt(size) * g / np.linalg.norm(g)
    np.testing.assert_allclose(update["w"], expected, rtol=1e-5, atol=1e-6 * eta)


@pytest.mark.parametrize("size", [2.5e-38, 8.5e37, 1e38, np.finfo(np.float32).max])
def test_gradients_at_the_ends_of_the_range_get_the_norm(size):
    """Reciprocals of the largest numbers are too small for float32, where XLA divides by them."""
    tx = scale_by_adder(mask=True)
    gradient = jnp.float32(size) * jnp.array([[1.0, -1.0], [0.5, 0.0]])
    state = tx.init(gradient)
    expected = 0.2 * 2 * np.array([[1, -1], [0.5, 0]]) / 1.5
    for update in (tx.update, jax.jit(tx.update)):
        np.testing.assert_allclose(update(gradient, state)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn"])
def test_narrow_gradients_are_scaled_in_float32(dtype):
    tx = scale_by_adder(mask=True)
    gradient = jnp.array([[2.0, -2.0], [0.0, 1.0]], dtype)
    update, _ = tx.update(gradient, tx.init(gradient))
    assert update.dtype == gradient.dtype
    expected = (jnp.array([[2.0, -2.0], [0.0, 1.0]]) * 0.4 / 3).astype(dtype)
    np.testing.assert_array_equal(update, expected)


def test_empty_leaves_stay(make):
    tx = make(mask={"empty": True, "adder": True})
    params = {"empty": jnp.zeros((0, 3)), "adder": jnp.ones((2, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["empty"].shape == (0, 3)
    assert np.isfinite(updates["adder"]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_zero_gradients_stay_zero_and_dtypes_stay(dtype):
    tx = scale_by_adder(mask=True)
    zeros = jnp.zeros((2, 3), dtype)
    update, _ = tx.update(zeros, tx.init(zeros))
    assert update.dtype == dtype
    np.testing.assert_array_equal(update, 0)
    ones, _ = tx.update(zeros + 1, tx.init(zeros))
    np.testing.assert_allclose(ones.astype("float32"), 0.2, rtol=1e-2)


def test_not_finite_gradients_do_not_become_finite():
    tx = scale_by_adder(mask=True)
    for bad in (np.nan, np.inf):
        gradient = jnp.array([1.0, bad])
        update, _ = tx.update(gradient, tx.init(gradient))
        assert not np.isfinite(update).all()


def test_other_leaves_pass_unchanged():
    tx = scale_by_adder(mask=MASK)
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, updates["norm"], GRADS["norm"])
    assert not np.allclose(updates["adder"], GRADS["adder"])


def test_sgd_is_the_published_recipe():
    """Scale, then weight decay on everything, then momentum: three steps by hand."""
    tx = adder_sgd(0.1, 0.9, weight_decay=0.01, eta=0.3, mask=MASK)
    state, params = tx.init(PARAMS), PARAMS
    expected = {"adder": np.ones((3, 4)), "scale": np.ones(5)}
    velocity = {"adder": 0.0, "scale": 0.0}
    g = {"adder": np.asarray(GRADS["adder"]), "scale": np.asarray(GRADS["norm"]["scale"])}
    g["adder"] = 0.3 * np.sqrt(12) * g["adder"] / np.linalg.norm(g["adder"])
    for _ in range(3):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        for name in expected:
            velocity[name] = 0.9 * velocity[name] + g[name] + 0.01 * expected[name]
            expected[name] = expected[name] - 0.1 * velocity[name]
    np.testing.assert_allclose(params["adder"], expected["adder"], rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["scale"], expected["scale"], rtol=1e-5)


def test_adamw_enlarges_adder_steps_and_decays_the_rest():
    ours = adder_adamw(0.1, weight_decay=0.01, adder_learning_rate_multiplier=7.0, mask=MASK)
    adam, adamw = optax.adam(0.7), optax.adamw(0.1, weight_decay=0.01)
    updates, _ = ours.update(GRADS, ours.init(PARAMS), PARAMS)
    plain, _ = adam.update(GRADS, adam.init(PARAMS), PARAMS)
    decayed, _ = adamw.update(GRADS, adamw.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["adder"], plain["adder"], rtol=1e-6)
    np.testing.assert_allclose(updates["norm"]["bias"], decayed["norm"]["bias"], rtol=1e-6)


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32)),
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32)),
    st.sampled_from([(-0.25, 2.5), (None, 1.0), (0.0, None), (None, None), (0.5, 0.5)]),
)
def test_clipped_kernels_stay_between_the_bounds(kernel, update, bounds):
    tx = clip_adder_kernels(*bounds, mask={"adder": True, "scale": False})
    params = {"adder": kernel, "scale": kernel}
    updates, _ = tx.update({"adder": update, "scale": update}, tx.init(params), params)
    np.testing.assert_array_equal(updates["scale"], update)
    expected = kernel + update
    if bounds != (None, None):
        expected = np.clip(expected, *bounds)
    np.testing.assert_allclose(kernel + updates["adder"], expected, atol=2e-6)


def test_clipping_says_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"min must be at most max, got 1\.0 and -1\.0"):
        clip_adder_kernels(1.0, -1.0)
    with pytest.raises(ValueError, match="min must be at most max, got nan"):
        clip_adder_kernels(float("nan"), 1.0)
    tx = clip_adder_kernels(mask=True)
    with pytest.raises(ValueError, match="update needs the parameters, which it clips"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_clipping_follows_injected_bounds():
    tx = optax.inject_hyperparams(lambda max: clip_adder_kernels(0.0, max, mask=True))(max=1.0)
    state = tx.init(jnp.zeros(1))
    for bound in (1.0, 0.5):
        state.hyperparams["max"] = jnp.asarray(bound)
        updates, state = tx.update(jnp.array([9.0]), state, jnp.zeros(1))
        np.testing.assert_allclose(updates, [bound])


class TestOptaxCompatibility:
    """What optax asks of its own transformations."""

    def run(self, tx, params=PARAMS, grads=GRADS, steps=2):
        state = tx.init(params)
        for _ in range(steps):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    def test_jit_is_the_same(self, make):
        tx = make(mask=MASK)
        state = jax.jit(tx.init)(PARAMS)
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)

    def test_masks_may_be_trees_prefixes_or_functions(self, make):
        full = {"adder": True, "norm": {"scale": False, "bias": False}}
        results = [self.run(make(mask=mask)) for mask in (MASK, full, lambda params: full)]
        for result in results[1:]:
            jax.tree.map(np.testing.assert_array_equal, result, results[0])

    def test_masked_and_partition(self, make):
        expected = self.run(make(mask=True), PARAMS["adder"], GRADS["adder"])
        masked = self.run(optax.masked(make(mask=True), MASK))
        np.testing.assert_allclose(masked["adder"], expected, rtol=1e-6)
        parted = self.run(
            optax.partition(
                {"adder": make(mask=True), "other": optax.set_to_zero()},
                {"adder": "adder", "norm": "other"},
            )
        )
        np.testing.assert_allclose(parted["adder"], expected, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, parted["norm"], PARAMS["norm"])

    def test_inject_hyperparams(self):
        def make(learning_rate, eta):
            return adder_sgd(learning_rate, eta=eta, mask=MASK)

        tx = optax.inject_hyperparams(make)(learning_rate=0.1, eta=0.2)
        result = self.run(tx)
        expected = self.run(make(0.1, 0.2))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, expected)
        state = tx.init(PARAMS)
        state.hyperparams["learning_rate"] = jnp.asarray(0.0)
        updates, _ = tx.update(GRADS, state, PARAMS)
        np.testing.assert_array_equal(updates["adder"], 0)

    def test_tree_map_params_leaves_the_marks_alone(self, make):
        """They are no copies of the parameters, and have no sharding of theirs."""
        tx = make(mask=MASK)
        specs = {"adder": PartitionSpec(None, "i"), "norm": PartitionSpec("i")}
        specs = specs | {"norm": {"scale": PartitionSpec("i"), "bias": PartitionSpec()}}
        for outer in (tx, optax.masked(tx, {"adder": True, "norm": False})):
            state = outer.init(PARAMS)
            mapped = optax.tree_map_params(
                outer,
                lambda _, spec: spec,
                state,
                specs,
                transform_non_params=lambda _: PartitionSpec(),
                is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
            )
            marks = optax.tree_utils.tree_get(mapped, "is_adder")
            assert marks == PartitionSpec()
            doubled = optax.tree_map_params(outer, lambda leaf: 2 * leaf, state)
            kept = optax.tree_utils.tree_get(doubled, "is_adder")
            before = optax.tree_utils.tree_get(state, "is_adder")
            jax.tree.map(np.testing.assert_array_equal, kept, before)

    def test_abstract_values(self, make):
        tx = make(mask=MASK)
        state = jax.eval_shape(tx.init, PARAMS)
        expected = jax.tree.map(jax.typeof, tx.init(PARAMS))
        assert jax.tree.map(jax.typeof, state) == expected
        updates, after = jax.eval_shape(tx.update, GRADS, state, PARAMS)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
        assert jax.tree.structure(after) == jax.tree.structure(state)

    def test_a_state_of_other_parameters_is_an_error(self):
        tx = scale_by_adder(mask=True)
        with pytest.raises(ValueError, match="initialised with 1 parameters, updated with 3"):
            tx.update(GRADS, tx.init(PARAMS["adder"]))

    def test_schedules_and_accumulation_over_steps(self, make):
        del make
        tx = optax.MultiSteps(adder_sgd(optax.linear_schedule(0.1, 0.0, 10), mask=MASK), 2)
        result = self.run(tx, steps=4)
        assert np.isfinite(result["adder"]).all()
        assert not np.allclose(result["adder"], PARAMS["adder"])

    def test_sharded_parameters_keep_their_sharding_and_numbers(self, make):
        mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        over = NamedSharding(mesh, PartitionSpec(None, "i"))

        def place(tree):
            return tree | {"adder": jax.device_put(tree["adder"], over)}

        tx = make(mask=MASK)
        params = place(PARAMS)
        state = jax.jit(tx.init)(params)
        updates, _ = jax.jit(tx.update)(place(GRADS), state, params)
        expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert updates["adder"].sharding.is_equivalent_to(over, 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


class TestFindingAdderKernels:
    def test_nnx_optimizer_needs_no_mask(self, make):
        """nnx.Optimizer shows the variables' types at init, and arrays later."""
        ours, theirs = model(), model()
        x = jnp.ones((2, 3)) * jnp.arange(3.0)
        for net, tx in ((ours, make()), (theirs, make(mask=adder_mask(theirs)))):
            optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

            @nnx.jit
            def step(net, optimizer):
                gradients = nnx.grad(lambda net: ((net(x) - 1) ** 2).sum())(net)
                optimizer.update(net, gradients)

            for _ in range(2):
                step(net, optimizer)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))

    def test_arrays_alone_do_not_tell(self, make):
        with pytest.raises(ValueError, match=r"no AdderKernel.*mask=jadder.nn.adder_mask\(model\)"):
            make().init(PARAMS)

    @pytest.mark.parametrize("family", ["conv", "euclid"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_models_without_adders_get_the_plain_recipe(self, family, masked):
        """One script trains a network of any family."""
        net = jadder.models.create("lenet5", family=family, rngs=nnx.Rngs(0))
        kwargs = {"mask": adder_mask(net)} if masked else {}
        plain = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9))
        for ours, theirs in (
            (adder_sgd(0.1, **kwargs), plain),
            (adder_adamw(0.1, **kwargs), optax.adamw(0.1, weight_decay=0.05)),
        ):
            params = nnx.state(net, nnx.Param)
            params = nnx.to_pure_dict(params) if masked else params
            actual, _ = ours.update(params, ours.init(params), params)
            expected, _ = theirs.update(params, theirs.init(params), params)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
                actual,
                expected,
            )

    def test_adamw_needs_the_parameters(self):
        tx = adder_adamw(0.1, mask=MASK)
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(GRADS, tx.init(PARAMS))


def test_adaptive_scaling_does_not_depend_on_the_size_of_the_loss():
    """What loss scaling and gradient averaging leave behind has no effect on adder kernels."""
    tx = scale_by_adder(mask=MASK)
    small, _ = tx.update(jax.tree.map(lambda g: g * 1e-6, GRADS), tx.init(PARAMS))
    large, _ = tx.update(GRADS, tx.init(PARAMS))
    np.testing.assert_allclose(small["adder"], large["adder"], rtol=1e-5)
