"""How leaves are known to be adder kernels, and which of their axes number layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jadder
from jadder import AdderKernel, adder_adamw, adder_mask, adder_sgd, adderize, scale_by_adder
from jadder.nn import AdderConvGeneralDilated, AdderDotGeneral, AdderEinsum

PARTITION = {nnx.PARTITION_NAME: None}
OPTIMIZERS = {
    "scale_by_adder": scale_by_adder,
    "adder_sgd": functools.partial(adder_sgd, 0.1),
    "adder_adamw": functools.partial(adder_adamw, 0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    """Each optimizer's constructor."""
    return OPTIMIZERS[request.param]


def adder(rngs, **kwargs):
    return jadder.AdderLinear(3, 4, rngs=rngs, **kwargs)


def by_argument(rngs, features=(3, 4), product=jadder.adder_dot_general):
    return nnx.Linear(*features, dot_general=product, rngs=rngs)


def stacked(layer, size, **kwargs):
    """Layers made one by one and kept as one module."""

    @nnx.split_rngs(splits=size)
    @nnx.vmap(**kwargs)
    def create(rngs):
        return layer(rngs)

    return create(nnx.Rngs(0))


def abstract(layer, size, **kwargs):
    """The same without values, which take time to draw."""
    return nnx.eval_shape(lambda: stacked(layer, size, **kwargs))


def scaled(params, axes, **kwargs):
    """The update of a kernel whose layers have constant gradients, each a tenth of the last.

    It is 1 everywhere if each layer's update has the norm η√k.
    """
    (shape,) = (leaf.shape for path, leaf in nnx.to_flat_state(params) if path[-1] == "kernel")
    sizes = 10.0 ** -np.arange(np.prod([shape[axis] for axis in axes]))
    sizes = sizes.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])

    def gradient(leaf):
        return jnp.asarray(np.broadcast_to(sizes if leaf.shape == shape else 1.0, leaf.shape))

    tx = scale_by_adder(1.0, **kwargs)
    updates, _ = tx.update(jax.tree.map(gradient, params), tx.init(params))
    (update,) = (leaf for path, leaf in nnx.to_flat_state(updates) if path[-1] == "kernel")
    return update.get_value()


class TestStacks:
    @pytest.mark.parametrize(
        ("axis", "metadata"), [(0, {}), (1, {}), (2, {}), (0, PARTITION), (1, PARTITION)]
    )
    def test_layers_made_by_vmap_have_a_norm_each(self, axis, metadata):
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        model = abstract(adder, 5, out_axes=axes, transform_metadata=metadata)
        update = scaled(nnx.state(model, nnx.Param), (axis,))
        np.testing.assert_allclose(update, 1, rtol=1e-5)

    def test_metadata_tells_what_shapes_do_not(self):
        """Four layers of 4×4: any axis might be the stack's."""

        def square(rngs):
            return jadder.AdderLinear(4, 4, rngs=rngs)

        axes = nnx.StateAxes({nnx.Param: 2, ...: 0})
        model = abstract(square, 4, out_axes=axes, transform_metadata=PARTITION)
        np.testing.assert_allclose(scaled(nnx.state(model), (2,)), 1, rtol=1e-5)
        unknown = abstract(square, 4)
        np.testing.assert_allclose(scaled(nnx.state(unknown), (0,)), 1, rtol=1e-5)

    def test_stacks_of_stacks(self):
        def conv(rngs):
            return jadder.AdderConv(3, 4, (3, 3), rngs=rngs)

        for metadata in ({}, PARTITION):
            inner = functools.partial(stack_with, conv, 2, metadata)
            model = abstract(inner, 3, transform_metadata=metadata)
            update = scaled(nnx.state(model, nnx.Param), (0, 1))
            assert update.shape == (3, 2, 3, 3, 3, 4)
            np.testing.assert_allclose(update, 1, rtol=1e-5)

    @pytest.mark.parametrize("metadata", [{}, PARTITION])
    def test_training_under_scan(self, metadata):
        """Each layer's step has its own norm, and no step compiles anew."""
        model = stacked(lambda rngs: jadder.AdderLinear(4, 4, rngs=rngs), 3,
                        transform_metadata=metadata)  # fmt: skip
        optimizer = nnx.Optimizer(model, adder_sgd(1.0, weight_decay=0.0, eta=0.5), wrt=nnx.Param)
        x, traces = jnp.linspace(-1, 1, 8).reshape(2, 4), 0

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=metadata)
        def through(layer, x):
            return 1e-3 * layer(x)

        @nnx.jit
        def step(model, optimizer):
            nonlocal traces
            traces += 1
            grads = nnx.grad(lambda model: (through(model, x) ** 2).sum())(model)
            optimizer.update(model, grads)

        before = np.asarray(model.kernel[...])
        for _ in range(3):
            step(model, optimizer)
            if traces == 1 and before is not None:
                change = np.asarray(model.kernel[...]) - before
                norms = np.linalg.norm(change.reshape(3, -1), axis=1)
                np.testing.assert_allclose(norms, 0.5 * 4, rtol=1e-3)
                before = None
        assert traces == 1

    def test_states_stacked_by_hand(self):
        states = [nnx.state(adder(nnx.Rngs(seed))) for seed in range(3)]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        np.testing.assert_allclose(scaled(stack, (0,)), 1, rtol=1e-5)

    @pytest.mark.parametrize(
        "layer",
        [
            functools.partial(nnx.Linear, 3, 4),
            functools.partial(nnx.LinearGeneral, 3, (4, 2)),
            functools.partial(nnx.Einsum, "na,abc->nbc", (3, 2, 4)),
            functools.partial(nnx.Conv, 3, 4, (3, 2)),
            functools.partial(nnx.ConvTranspose, 3, 4, (2, 2), transpose_kernel=True),
        ],
    )
    def test_adderized_stacks(self, layer):
        """Flax's layers know the shape of their kernel whether or not it is stacked."""
        model = nnx.eval_shape(lambda: adderize(stacked(lambda rngs: layer(rngs=rngs), 5)))
        np.testing.assert_allclose(scaled(nnx.state(model), (0,)), 1, rtol=1e-5)

    def test_by_argument(self):
        model = abstract(by_argument, 5)
        params = nnx.state(model)
        np.testing.assert_allclose(scaled(params, (0,), mask=adder_mask(model)), 1, rtol=1e-5)

    def test_types_and_stacks_survive_abstraction_and_copies(self):
        model = nnx.clone(abstract(adder, 5))
        graphdef, state = nnx.split(nnx.eval_shape(lambda: nnx.clone(model)))
        marks = scale_by_adder().init(state).is_adder
        assert jax.tree.map(jnp.shape, nnx.to_pure_dict(marks)) == {"kernel": (5, 1, 1)}
        assert isinstance(nnx.merge(graphdef, state).kernel, AdderKernel)

    def test_what_is_no_stack_of_layers_is_an_error(self):
        params = {"a": AdderKernel(jnp.ones((5, 3, 4)), layer_shape=(7, 4))}
        with pytest.raises(ValueError, match=r"\['a'\].*no stack.*\(7, 4\).*give stack_axes"):
            scale_by_adder().init(params)
        state = scale_by_adder(stack_axes=0).init(params)
        assert state.is_adder["a"].shape == (5, 1, 1)


def stack_with(layer, size, metadata, rngs):
    @nnx.split_rngs(splits=size)
    @nnx.vmap(transform_metadata=metadata)
    def create(rngs):
        return layer(rngs)

    return create(rngs)


class TestStackAxes:
    """For trees of arrays, where nothing tells a stack from a layer."""

    STACK = np.ones((2, 4, 4), np.float32) * np.array([1, 1e-3], np.float32)[:, None, None]
    PARAMS = {"stack": STACK, "one": STACK, "norm": np.ones(3, np.float32)}  # noqa: RUF012
    MASK = {"stack": True, "one": True, "norm": False}  # noqa: RUF012

    @pytest.mark.parametrize(
        "axes",
        [
            {"stack": 0, "one": None, "norm": None},
            {"stack": (-3,), "one": (), "norm": 0},
            lambda params: {"stack": 0, "one": None, "norm": None},
        ],
    )
    def test_trees_and_functions(self, axes):
        tx = scale_by_adder(1.0, mask=self.MASK, stack_axes=axes)
        updates, _ = tx.update(self.PARAMS, tx.init(self.PARAMS))
        norms = np.linalg.norm(updates["stack"].reshape(2, 16), axis=1)
        np.testing.assert_allclose(norms, [4, 4], rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(updates["one"]), np.sqrt(32), rtol=1e-5)
        np.testing.assert_array_equal(updates["norm"], 1)

    def test_one_for_all(self):
        tx = scale_by_adder(1.0, mask=True, stack_axes=(0, 2))
        updates, _ = tx.update(self.STACK, tx.init(self.STACK))
        np.testing.assert_allclose(updates, 1, rtol=1e-5)

    @pytest.mark.parametrize("axes", [3, -4, (0, 0), (0, -3)])
    def test_axes_that_are_not_there_are_an_error(self, axes):
        with pytest.raises(ValueError, match=r"adder: \['stack'\]: stack_axes must be different"):
            scale_by_adder(mask=True, stack_axes=axes).init({"stack": self.STACK})


class Tied(nnx.Module):
    """Two layers with one kernel, of which the second by name alone is an adder layer."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = by_argument(rngs, (3, 3))
        self.second.kernel = self.first.kernel


class TestLayersWithAProductAsArgument:
    PRODUCTS = (
        jadder.adder_dot_general,
        AdderDotGeneral(jadder.SIGN),
        functools.partial(jadder.adder_dot_general, rule=jadder.SIGN),
        functools.partial(functools.partial(AdderDotGeneral(), precision=None)),
        jax.jit(jadder.adder_dot_general),
    )

    @pytest.mark.parametrize("product", PRODUCTS)
    def test_adder_mask_finds_them(self, product):
        model = nnx.Sequential(by_argument(nnx.Rngs(0), product=product), adder(nnx.Rngs(0)))
        layers = adder_mask(model)(nnx.to_pure_dict(nnx.state(model)))["layers"]
        assert layers == {0: {"kernel": True, "bias": False}, 1: {"kernel": True}}

    def test_every_layer_that_takes_a_product(self):
        dot, conv = jadder.adder_dot_general, AdderConvGeneralDilated()
        attention = functools.partial(nnx.MultiHeadAttention, 2, 4, decode=False)
        layers = [
            functools.partial(nnx.LinearGeneral, 3, (2, 4), dot_general=dot),
            functools.partial(nnx.LinearGeneral, 3, 4, dot_general_cls=AdderDotGeneral),
            functools.partial(nnx.Einsum, "na,ab->nb", (3, 4), einsum_op=jadder.adder_einsum),
            functools.partial(nnx.Einsum, "na,ab->nb", (3, 4), einsum_op=AdderEinsum()),
            functools.partial(nnx.Conv, 3, 4, (3, 3), conv_general_dilated=conv),
            functools.partial(attention, qkv_dot_general=dot),
            functools.partial(attention, out_dot_general=dot),
            functools.partial(nnx.Linear, 3, 4, dot_general=jadder.euclid_dot_general),
            functools.partial(jadder.AdderAttention, 2, 4, scores="adder"),
        ]
        found = []
        for create in layers:
            layer = nnx.eval_shape(lambda create=create: create(rngs=nnx.Rngs(0)))
            marks = nnx.to_flat_state(adder_mask(layer)(nnx.state(layer, nnx.Param)))
            found.append([".".join(map(str, path)) for path, mark in marks if mark])
        one, qkv = ["kernel"], ["key.kernel", "query.kernel", "value.kernel"]
        ours = [f"{name}.layers.0.kernel" for name in ("key", "out", "query", "value")]
        assert found == [one, one, one, one, one, qkv, ["out.kernel"], [], ours]

    def test_also_while_annealing(self):
        model = by_argument(nnx.Rngs(0), product=AdderDotGeneral())
        jadder.set_l1_share(model, 0.5)
        assert adder_mask(model)(nnx.state(model))["kernel"]

    def test_shared_kernels(self):
        model = Tied(nnx.Rngs(0))
        marks = adder_mask(model)(nnx.state(model, nnx.Param))
        assert marks["first"]["kernel"]

    def test_nnx_optimizer_without_a_mask_refuses_them(self, make):
        """Beside an adder layer and alone; also where only a part of the model is optimized."""
        model = nnx.Sequential(adder(nnx.Rngs(0)), by_argument(nnx.Rngs(0)))
        everything = optax.partition({"all": make()}, lambda params: jax.tree.map(
            lambda _: "all", params))  # fmt: skip
        for net, tx in ((model, make()), (model.layers[1], make()), (model, everything)):
            with pytest.raises(ValueError, match=r"kernel.*Flax's layers.*mask=.*adder_mask\(mo"):
                nnx.Optimizer(net, tx, wrt=nnx.Param)
        only = nnx.All(nnx.Param, nnx.PathContains("bias"))
        assert nnx.Optimizer(model, make(), wrt=only)
        mask = adder_mask(model)
        marks = nnx.Optimizer(model, scale_by_adder(mask=mask), wrt=nnx.Param).opt_state.is_adder
        assert [bool(mark[...]) for mark in jax.tree.leaves(marks, is_leaf=lambda x: isinstance(
            x, nnx.Variable))] == [True, False, True]  # fmt: skip

    def test_a_module_as_a_tree_of_parameters_shows_its_layers(self):
        with pytest.raises(ValueError, match="0/kernel is the kernel of an adder product"):
            scale_by_adder().init(nnx.Sequential(by_argument(nnx.Rngs(0))))
        model = nnx.Sequential(adder(nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        assert jax.tree.leaves(scale_by_adder().init(model)) == [True, False, False]


class TestErrors:
    def test_a_mask_that_marks_nothing(self, make):
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
        for mask in (False, {"a": False, "b": False}, lambda params: False):
            with pytest.raises(ValueError, match="marks no adder kernel"):
                make(mask=mask).init(params)

    def test_a_part_of_the_parameters_need_not_have_adder_kernels(self, make):
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
        for mask in ({"a": True, "b": False}, lambda p: jax.tree.map(lambda x: x.ndim == 2, p)):
            tx = optax.masked(make(mask=mask), {"a": False, "b": True})
            updates, _ = tx.update(params, tx.init(params), params)
            assert updates["b"].shape == (3,)

    def test_arrays_among_variables(self, make):
        params = {"net": nnx.state(adder(nnx.Rngs(0))), "temperature": jnp.ones(())}
        with pytest.raises(ValueError, match=r"no AdderKernel.*arrays, as at \['temperature'\]"):
            make().init(params)

    def test_adder_mask_of_arrays(self):
        params = {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
        with pytest.raises(ValueError, match="only arrays, which do not tell"):
            adder_mask(params)

    def test_linen_modules_show_no_layers_before_they_are_called(self):
        dense = linen.Dense(3, dot_general=jadder.adder_dot_general)
        with pytest.raises(
            ValueError, match=r"Dense is a Linen module.*adder_mask\(module, inputs"
        ):
            adder_mask(dense)
        model = nnx.Dict(inner=nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="ToNNX at 'inner' has a Linen module"):
            adder_mask(model)
        with pytest.raises(ValueError, match="only a Linen module takes inputs"):
            adder_mask(adder(nnx.Rngs(0)), jnp.ones((1, 3)))

    def test_adder_mask_knows_all_parameters(self):
        """A leaf that the model does not have may be an adder kernel under another name."""
        model = nnx.Sequential(adder(nnx.Rngs(0)), adder(nnx.Rngs(0)))
        params = nnx.to_pure_dict(nnx.state(model))
        mask = adder_mask(model)
        text_keys = {"layers": {str(key): value for key, value in params["layers"].items()}}
        assert jax.tree.leaves(mask(text_keys)) == [True, True]
        params["layers"][2] = params["layers"].pop(1)
        with pytest.raises(ValueError, match=r"not the model's.*\['layers'\]\[2\]\['kernel'\]"):
            mask(params)

    def test_functions_that_inject_hyperparams_takes_for_schedules(self):
        """google-deepmind/optax#1373 and its kin."""
        model = adder(nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model))
        for mask, message in (
            (adder_mask(model), "number in place of parameters.*static_args='mask'"),
            (lambda p: jax.tree.map(lambda x: x.ndim > 1, p), "static_args='mask'"),
        ):
            with pytest.raises(ValueError, match=message):
                optax.inject_hyperparams(adder_sgd)(0.1, mask=mask).init(params)
            named = optax.inject_hyperparams(adder_sgd, static_args=("mask", "stack_axes"))
            tx = named(learning_rate=optax.constant_schedule(0.1), mask=mask)
            plain = adder_sgd(0.1, mask=mask)
            update = [t.update(params, t.init(params), params)[0] for t in (tx, plain)]
            np.testing.assert_allclose(*(u["kernel"] for u in update), rtol=1e-6)


class TestPublicReports:
    """What others have met with Flax and optax, with these recipes."""

    @pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
    def test_partition_in_nnx_optimizer(self, combine, make):
        """google/flax#5372, google-deepmind/optax#1148: masked nodes inside of variables."""
        model = nnx.Sequential(adder(nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))

        def labels(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: str(path[1].key), params
            )  # the variables stay, with labels inside

        parts = {"0": make(), "1": optax.set_to_zero()}
        optimizer = nnx.Optimizer(model, combine(parts, labels), wrt=nnx.Param)
        reference = nnx.clone(model.layers[0])
        alone = nnx.Optimizer(reference, make(), wrt=nnx.Param)
        x = jnp.linspace(-1, 1, 6).reshape(2, 3)
        for _ in range(2):
            grads = nnx.grad(lambda net: (net(x) ** 2).sum())(reference)
            both = nnx.state(model, nnx.Param)
            both = jax.tree.map(jnp.ones_like, both)
            both["layers"][0] = grads
            optimizer.update(model, both)
            alone.update(reference, grads)
        np.testing.assert_allclose(model.layers[0].kernel, reference.kernel, rtol=1e-6)
        np.testing.assert_array_equal(model.layers[1].scale, 1)

    def test_trees_that_can_be_called(self, make):
        """google-deepmind/optax#1373: a mask that is a module is no function."""
        model = nnx.Sequential(adder(nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        params = jax.tree.map(
            lambda leaf: leaf.get_value(), model, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        mask = jax.tree.map(lambda leaf: leaf.shape == (3, 4), params)
        assert callable(mask)
        tx = make(mask=mask)
        updates, _ = tx.update(params, tx.init(params), params)
        named = {"kernel": params.layers[0].kernel}
        alone = make(mask=True)
        expected, _ = alone.update(named, alone.init(named), named)
        np.testing.assert_allclose(updates.layers[0].kernel, expected["kernel"], rtol=1e-6)

    def test_linen_scan(self):
        """google/flax#2618: scanned layers are one parameter."""

        class Block(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                dense = linen.Dense(4, use_bias=False, dot_general=AdderDotGeneral(), name="dense")
                return 0.1 * dense(x), None

        class Net(linen.Module):
            @linen.compact
            def __call__(self, x, train):
                blocks = linen.scan(
                    Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
                )
                y, _ = blocks(name="blocks")(x, None)
                return linen.Dense(2, name="head")(y) if train else y

        net, x = Net(), jnp.ones((2, 4))
        mask = adder_mask(net, jax.ShapeDtypeStruct(x.shape, x.dtype), train=True)
        variables = jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), x)
        for params in (variables["params"], variables):
            tx = scale_by_adder(1.0, mask=mask)
            grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), params)
            stack = grads.get("params", grads)["blocks"]["dense"]
            stack["kernel"] *= 10.0 ** jnp.arange(3)[:, None, None]
            updates, _ = tx.update(grads, tx.init(params))
            updates = updates.get("params", updates)
            np.testing.assert_allclose(updates["blocks"]["dense"]["kernel"], 1, rtol=1e-5)
            np.testing.assert_array_equal(updates["head"]["kernel"], 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("recipe", [adder_sgd, adder_adamw])
def test_sharded_layers_and_stacks_of_them(kind, recipe):
    """google/flax#5112, with axes of the mesh for layers and features."""
    if len(jax.devices()) != 8:
        pytest.skip("needs the eight devices that tests/conftest.py makes of a CPU")
    mesh = jax.make_mesh((2, 4), ("layers", "features"), axis_types=(kind,) * 2)
    out = {"out_sharding": (None, "features")}

    class Net(nnx.Module):
        def __init__(self, metadata, partition):
            rngs = nnx.Rngs(0)
            layer = functools.partial(jadder.AdderLinear, 8, 4, kernel_metadata=metadata)
            self.one = layer(rngs=rngs)
            self.stack = stacked(
                lambda rngs: layer(rngs=rngs), 2, transform_metadata={nnx.PARTITION_NAME: partition}
            )

    def train(metadata, partition):
        net = Net(metadata, partition)
        optimizer = nnx.Optimizer(net, recipe(0.1), wrt=nnx.Param)
        for scale in (1.0, -2.0):
            grads = nnx.state(net, nnx.Param)
            slope = jnp.array([1, 1e-3])[:, None, None]
            grads = jax.tree.map(lambda w: w * scale * slope if w.ndim == 3 else w, grads)  # noqa: B023
            optimizer.update(net, grads)
        return net

    expected = train({}, None)
    with jax.set_mesh(mesh):
        net = nnx.jit(lambda: train(out, "layers"))()
    assert net.stack.kernel.sharding.spec == P("layers", None, "features")
    for name in ("one", "stack"):
        ours, theirs = getattr(net, name).kernel, getattr(expected, name).kernel
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-6)
