"""Both recipes in whatever optax and Flax put around them: the same numbers as by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jadder
from jadder import adder_adamw, adder_mask, adder_sgd

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options with which the compiler spends less time on a program."""

LAYERS, INTO, OUT, STEPS = 2, 3, 4, 4
MASK = {"adder": True, "norm": False, "stack": True}
STACK_AXES = {"adder": None, "norm": None, "stack": 0}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tree(seed):
    """One adder layer, a stack of them whose second is a thousand times as small, and a norm."""
    small = np.array([1, 1e-3], np.float32)[:, None, None]
    return {
        "adder": {"kernel": normal(seed, INTO, OUT)},
        "norm": {"bias": normal(seed + 1, OUT), "scale": normal(seed + 2, OUT)},
        "stack": {"kernel": small * normal(seed + 3, LAYERS, INTO, OUT)},
    }


PARAMS, GRADS = tree(0), [tree(10 * step) for step in range(1, STEPS + 1)]


def sgd(learning_rate=0.1, **kwargs):
    return adder_sgd(learning_rate, weight_decay=0.01, eta=0.3, **kwargs)


def adamw(learning_rate=0.1, **kwargs):
    kwargs.pop("stack_axes", None)
    return adder_adamw(learning_rate, adder_learning_rate_multiplier=7.0, **kwargs)


def sgd_by_hand(learning_rate=0.1):
    def scale(path, g):
        def norm(layer):
            return 0.3 * np.sqrt(INTO * OUT) * layer / jnp.sqrt((layer**2).sum())

        name = jax.tree_util.keystr(path)
        if "stack" in name:
            return jnp.stack([norm(layer) for layer in g])
        return norm(g) if "adder" in name else g

    return optax.chain(
        optax.stateless(lambda g, p: jax.tree_util.tree_map_with_path(scale, g)),
        optax.add_decayed_weights(0.01),
        optax.sgd(learning_rate, 0.9),
    )


def adamw_by_hand(learning_rate=0.1):
    def by_kind(path, g, p):
        return 7 * g if "kernel" in jax.tree_util.keystr(path) else g + 0.05 * p

    return optax.chain(
        optax.scale_by_adam(),
        optax.stateless(lambda g, p: jax.tree_util.tree_map_with_path(by_kind, g, p)),
        optax.scale_by_learning_rate(learning_rate),
    )


RECIPES = {"sgd": (sgd, sgd_by_hand), "adamw": (adamw, adamw_by_hand)}


def labels(yes, no, part):
    """A function that labels leaves by whether `part` is in their path, as users write it."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: yes if part in jax.tree_util.keystr(path) else no, params
    )


WRAPPERS = {
    "nothing": lambda make: make(),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make()),
    "partition": lambda make: optax.partition(
        {"kernels": make(), "rest": make(0.2)}, labels("kernels", "rest", "kernel")
    ),
    "multi_transform": lambda make: optax.multi_transform(
        {"0": make(), "1": optax.set_to_zero()}, labels("1", "0", "norm")
    ),
    "masked": lambda make: optax.masked(make(), labels(False, True, "bias")),
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2).gradient_transformation(),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(
        lambda learning_rate: make(learning_rate)
    )(optax.linear_schedule(0.1, 0.3, 4)),
    "schedule_free": lambda make: optax.contrib.schedule_free(make(), 0.1),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 5),
}


def gradients(wrapper):
    grads = list(GRADS)
    if wrapper == "apply_if_finite":
        grads[1] = jax.tree.map(lambda g: np.full_like(g, np.nan), grads[1])
    return grads


def train(tx, params, grads):
    """The parameters after all steps, of which only the first compiles."""
    traces = 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state, g):
        nonlocal traces
        traces += 1
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    assert traces == 1
    return params


@functools.cache
def expected(recipe, wrapper):
    return train(WRAPPERS[wrapper](RECIPES[recipe][1]), PARAMS, gradients(wrapper))


class Net(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def stack(rngs):
            return jadder.AdderLinear(INTO, OUT, rngs=rngs)

        self.adder = jadder.AdderLinear(INTO, OUT, rngs=rngs)
        self.norm = nnx.LayerNorm(OUT, rngs=rngs)
        self.stack = stack(rngs)


def with_values(net, values):
    state = nnx.state(net, nnx.Param)
    nnx.replace_by_pure_dict(state, values)
    return state


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        dense = functools.partial(
            linen.Dense, OUT, use_bias=False, dot_general=jadder.adder_dot_general
        )
        stack = linen.vmap(linen.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        y = linen.LayerNorm(name="norm")(dense(name="adder")(x))
        return y, stack(**dense.keywords, features=OUT, name="stack")(jnp.stack([x] * LAYERS))


def arrays_with_a_mask(make, wrap, grads):
    return train(wrap(functools.partial(make, mask=MASK, stack_axes=STACK_AXES)), PARAMS, grads)


def linen_parameters(make, wrap, grads):
    x = jnp.ones((1, INTO))
    params = LinenNet().init(jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, PARAMS)
    make = functools.partial(make, mask=adder_mask(LinenNet(), x))
    return train(wrap(make), jax.tree.map(jnp.asarray, PARAMS), grads)


def nnx_states(make, wrap, grads):
    net = Net(nnx.Rngs(0))
    grads = [with_values(Net(nnx.Rngs(0)), g) for g in grads]
    return nnx.to_pure_dict(train(wrap(make), with_values(net, PARAMS), grads))


def nnx_optimizer(make, wrap, grads):
    net = Net(nnx.Rngs(0))
    nnx.update(net, with_values(net, PARAMS))
    optimizer = nnx.Optimizer(net, wrap(make), wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def step(net, optimizer, g):
        nonlocal traces
        traces += 1
        optimizer.update(net, g)

    for g in grads:
        step(net, optimizer, with_values(Net(nnx.Rngs(0)), g))
    assert traces == 1
    return nnx.to_pure_dict(nnx.state(net, nnx.Param))


MASKING = ["nothing", "partition", "masked"]
"""Of the wrappers those that matter for how leaves are found."""
CASES = [
    *[(container, name) for container in (arrays_with_a_mask, nnx_optimizer) for name in WRAPPERS],
    *[(container, name) for container in (linen_parameters, nnx_states) for name in MASKING],
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("container", "wrapper"), CASES)
def test_same_numbers_as_by_hand(container, wrapper, recipe):
    result = container(RECIPES[recipe][0], WRAPPERS[wrapper], gradients(wrapper))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        result,
        expected(recipe, wrapper),
    )
