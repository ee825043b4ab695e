"""The native handlers, called as any program can call them: they rely on nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jadder
from jadder import adder_conv, adder_matmul
from tests.native.search import search

FOUND = jadder.implementations()["cpu"]
pytestmark = pytest.mark.skipif(not FOUND.available, reason=f"cpu: {FOUND.about}")

CLIP = {"scale": np.float64(1), "bound": np.float64(1)}
WINDOW = {
    "strides": np.array([1, 1]),
    "padding": np.array([0, 0, 0, 0]),
    "lhs_dilation": np.array([1, 1]),
    "rhs_dilation": np.array([1, 1]),
    "groups": np.int64(1),
}
FAST = {"fast": np.bool_(False)}
MATMUL = ((2, 4, 3), (2, 3, 5), (2, 4, 5))  # x, w and y or g
CONV = ((2, 6, 5, 4), (3, 2, 4, 6), (2, 4, 4, 6))
# Each handler's operands among x, w and y, its result, and attributes.
HANDLERS = {
    "matmul": (MATMUL, 2, 2, FAST),
    "matmul_dx": (MATMUL, 3, 0, CLIP),
    "matmul_dw": (MATMUL, 3, 1, CLIP),
    "int16_matmul": (MATMUL, 2, 2, {}),
    "int16_matmul_dx": (MATMUL, 3, 0, CLIP),
    "int16_matmul_dw": (MATMUL, 3, 1, CLIP),
    "euclid_matmul": (MATMUL, 2, 2, {}),
    "int16_euclid_matmul": (MATMUL, 2, 2, {}),
    "integer_matmul": (MATMUL, 2, 2, {}),
    "conv": (CONV, 2, 2, WINDOW | FAST),
    "conv_dx": (CONV, 3, 0, WINDOW | CLIP),
    "conv_dw": (CONV, 3, 1, WINDOW | CLIP),
    "int16_conv": (CONV, 2, 2, WINDOW),
    "int16_conv_dx": (CONV, 3, 0, WINDOW | CLIP),
    "int16_conv_dw": (CONV, 3, 1, WINDOW | CLIP),
    "euclid_conv": (CONV, 2, 2, WINDOW),
    "int16_euclid_conv": (CONV, 2, 2, WINDOW),
    "integer_conv": (CONV, 2, 2, WINDOW),
}
CONVOLUTIONS = [name for name in HANDLERS if "conv" in name]


def call(name, shapes, result, attributes):
    """The handler's result of ones."""
    integer = name.startswith("integer")
    operands = [jnp.ones(shape, jnp.uint8 if integer else jnp.float32) for shape in shapes]
    kind = jax.ShapeDtypeStruct(result, jnp.int32 if integer else jnp.float32)
    return np.asarray(jax.ffi.ffi_call(f"jadder_{name}", kind)(*operands, **attributes))


def refused(name, shapes, result, attributes, why):
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"INVALID_ARGUMENT: jadder: .*{why}"):
        call(name, shapes, result, attributes)


@pytest.mark.parametrize("name", HANDLERS)
def test_operands_and_results_of_other_shapes_are_refused(name):
    shapes, count, of, attributes = HANDLERS[name]
    operands, result = shapes[:count], shapes[of]
    assert call(name, operands, result, attributes).shape == result
    for axis in range(len(result)):
        for change in (-1, 3):
            wrong = tuple(n + change * (d == axis) for d, n in enumerate(result))
            refused(name, operands, wrong, attributes, "the result has shape")
    refused(name, operands, (1,), attributes, "the result has shape")
    refused(name, operands, (2, *result), attributes, "mapped dimensions")
    for i in range(count):
        for axis in range(len(result)):
            wrong = list(operands)
            wrong[i] = tuple(n + (d == axis) for d, n in enumerate(wrong[i]))
            refused(name, wrong, result, attributes, "")


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize(
    ("outer", "of_result"),
    [(((3,), (1,), (1,)), (2,)), (((3,), (2,), (1,)), (3,)), (((1,), (1,), (1,)), (3,)),
     (((3, 1), (1, 2), (1, 1)), (2, 3)), (((3,), (3,), (3,)), (1,)), (((3,), (), (3,)), (3,))],
)  # fmt: skip
def test_dimensions_mapped_in_different_ways_are_refused(name, outer, of_result):
    shapes, count, of, attributes = HANDLERS[name]
    mapped = [(*o, *s) for o, s in zip(outer, shapes, strict=True)][:count]
    refused(name, mapped, (*of_result, *shapes[of]), attributes, "mapped dimensions")


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40, 2**63 - 1, -(2**63)])
def test_attributes_beyond_all_sizes_are_refused(name, value):
    shapes, count, of, attributes = HANDLERS[name]
    operands, result = shapes[:count], shapes[of]
    for argument, why in (
        ("strides", "a stride of"), ("lhs_dilation", "a dilation of"),
        ("rhs_dilation", "a dilation of"), ("padding", "a padding of"),
    ):  # fmt: skip
        if argument == "padding" and abs(value) < 2**31:
            continue
        for place in range(len(attributes[argument])):
            changed = attributes[argument].copy()
            changed[place] = value
            refused(name, operands, result, attributes | {argument: changed}, f"{why} {value} is")
    groups = attributes | {"groups": np.int64(value)}
    refused(name, operands, result, groups, f"for {value} groups")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_attributes_of_another_number_are_refused(name):
    shapes, count, of, attributes = HANDLERS[name]
    for argument in ("strides", "padding", "lhs_dilation", "rhs_dilation"):
        for changed in (attributes[argument][:1], np.repeat(attributes[argument], 2)):
            wrong = attributes | {argument: changed}
            refused(name, shapes[:count], shapes[of], wrong, "a window has two strides")


@pytest.mark.parametrize("name", [name for name in HANDLERS if "_d" in name])
@pytest.mark.parametrize(
    ("scale", "bound"), [(0, 1), (1, -1), (np.nan, 1), (1, np.nan), (np.inf, np.inf)]
)
def test_rules_that_are_none_are_refused(name, scale, bound):
    shapes, count, of, attributes = HANDLERS[name]
    wrong = attributes | {"scale": np.float64(scale), "bound": np.float64(bound)}
    refused(name, shapes[:count], shapes[of], wrong, "scale and bound")


@pytest.mark.parametrize("name", ["integer_matmul", "integer_conv"])
def test_sums_that_an_int32_need_not_hold_are_refused(name):
    k = 8_421_505
    shapes = ((1, 1, k), (1, k, 1), (1, 1, 1))
    if name == "integer_conv":
        shapes = ((1, 1, 1, k), (1, 1, k, 1), (1, 1, 1, 1))
    refused(name, shapes[:2], shapes[2], HANDLERS[name][3], f"holds the sum of {k - 1}")


def test_operands_of_other_types_are_refused():
    kind = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
    for x, w in (("float16", "float16"), ("float32", "bfloat16"), ("uint8", "uint8")):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: jadder: .*type"):
            jax.ffi.ffi_call("jadder_matmul", kind)(
                jnp.ones((1, 2, 2), x), jnp.ones((1, 2, 2), w), **FAST
            ).block_until_ready()


@pytest.mark.parametrize("name", ["matmul", "conv"])
def test_an_operand_mapped_along_another_axis_than_the_result(name):
    """`jax.vmap` itself asks for nothing that is refused."""
    if name == "matmul":
        product = functools.partial(adder_matmul, implementation="cpu")
        x, w = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(40.0).reshape(4, 5, 2)
        axes = (0, 2)
    else:
        product = functools.partial(adder_conv, implementation="cpu")
        x, w = jnp.arange(64.0).reshape(4, 2, 2, 4), jnp.arange(48.0).reshape(3, 4, 2, 2)
        axes = (1, 3)
    y = jax.vmap(product, axes, out_axes=1)(x, w)
    for i in range(2):
        one = product(jnp.take(x, i, axes[0]), jnp.take(w, i, axes[1]))
        np.testing.assert_allclose(jnp.take(y, i, 1), one, rtol=1e-6)


def test_a_few_cases_of_the_random_search():
    """`python -m tests.native.search` tries thousands, under sanitizers too."""
    counts = search(12, seed=0)
    assert sum(counts.values()) == 36
    for found in ("configuration: conv", "hostile: refused", "handler: refused"):
        assert counts[found] > 0, counts


STANDARDIZE_ATTRIBUTES = {
    "epsilon": np.float32(1e-5),
    "center": np.bool_(True),
    "rectify": np.bool_(True),
}
X, FEATURES = (4, 5, 3), (3,)
# Each handler's operands and results, the first with a residual.
STANDARDIZE = {
    "standardize": ((X, FEATURES, FEATURES, X), (X, FEATURES, FEATURES)),
    "standardize_gradient": (
        (X, *[FEATURES] * 4, X, FEATURES, FEATURES),
        (X, FEATURES, FEATURES),
    ),
}


@pytest.mark.parametrize("name", STANDARDIZE)
class TestStandardize:
    """Batch normalisation's calls."""

    def call(self, name, operands, results, dtypes=None, **changes):
        dtypes = dtypes or [jnp.float32] * len(operands)
        kinds = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
        given = [jnp.ones(s, d) for s, d in zip(operands, dtypes, strict=True)]
        foreign = jax.ffi.ffi_call(f"jadder_{name}", kinds)
        return jax.block_until_ready(foreign(*given, **(STANDARDIZE_ATTRIBUTES | changes)))

    def refused(self, why, *arguments, **changes):
        with pytest.raises(jax.errors.JaxRuntimeError, match=rf"INVALID_ARGUMENT.*{why}"):
            self.call(*arguments, **changes)

    def test_other_shapes_are_refused(self, name):
        operands, results = STANDARDIZE[name]
        for found, shape in zip(self.call(name, operands, results), results, strict=True):
            assert found.shape == shape
        for shapes in (operands, results):
            for i, right in enumerate(shapes):
                for wrong in ((), (*right[:-1], 2), (*right, 1)):
                    changed = [*shapes[:i], wrong, *shapes[i + 1 :]]
                    both = (changed, results) if shapes is operands else (operands, changed)
                    self.refused("jadder: .*", name, *both)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.uint8])
    def test_other_types_are_refused(self, name, dtype):
        operands, results = STANDARDIZE[name]
        for i in range(len(operands)):
            dtypes = [jnp.float32] * len(operands)
            dtypes[i] = dtype
            self.refused("", name, operands, results, dtypes)

    def test_another_number_of_operands_is_refused(self, name):
        operands, results = STANDARDIZE[name]
        self.refused("", name, (*operands, (3,)), results)
        self.refused("", name, operands[:2], results)

    @pytest.mark.parametrize("epsilon", [-1.0, np.nan])
    def test_an_epsilon_that_is_none_is_refused(self, name, epsilon):
        operands, results = STANDARDIZE[name]
        self.refused("epsilon", name, operands, results, epsilon=np.float32(epsilon))
