"""Counts equal sums by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jadder
from jadder import count_operations, counted_flops
from tests.integer.resnet20 import resnet20
from tests.strategies import ConvCase, conv_cases


def floats(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def multiplied(counts: Any) -> list[str]:
    return [layer.name for layer in counts.multiplying]


# ResNet-20, of one image of 32 x 32 pixels, from the publication's table of layers.
STEM = 32 * 32 * 16 * (3 * 3 * 3)
STAGE_1 = 6 * 32 * 32 * 16 * (3 * 3 * 16)
STAGE_2 = 16 * 16 * 32 * (3 * 3 * 16) + 5 * 16 * 16 * 32 * (3 * 3 * 32) + 16 * 16 * 32 * 16
STAGE_3 = 8 * 8 * 64 * (3 * 3 * 32) + 5 * 8 * 8 * 64 * (3 * 3 * 64) + 8 * 8 * 64 * 32
CLASSIFIER = 64 * 10
BODY = STAGE_1 + STAGE_2 + STAGE_3
OF_EACH_STAGE = 32 * 32 * 16 + 16 * 16 * 32 + 8 * 8 * 64  # elements of one activation of each
NORMALIZED = 7 * OF_EACH_STAGE + 10  # six products of each stage, and the stem or a shortcut
CHANNELS = 7 * (16 + 32 + 64) + 10
RESIDUALS = 3 * OF_EACH_STAGE
MEAN = 8 * 8 * 64
RELUS = 32 * 32 * 16 + 6 * OF_EACH_STAGE
KERNELS = (27 * 16 + 6 * 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 16 * 32
           + 9 * 32 * 64 + 5 * 9 * 64 * 64 + 32 * 64 + 640)  # fmt: skip


@pytest.mark.parametrize("family", ["adder", "conv"])
def test_resnet20_by_hand(family: str) -> None:
    create = jadder.models.create
    model = nnx.eval_shape(lambda: create("resnet20", family=family, rngs=nnx.Rngs(0)))
    model.eval()
    counts = count_operations(model, floats(1, 32, 32, 3))
    assert BODY == 40_370_176
    adds, multiplies = (BODY, 0) if family == "adder" else (0, BODY)
    assert counts.total.operations == {
        key: count
        for key, count in {
            # A normalisation: x - mean, var + epsilon, root, times scale, times that, plus bias.
            ("subtract", "float32"): adds + NORMALIZED,
            ("absolute", "float32"): adds,
            ("add", "float32"): STEM + BODY + CLASSIFIER + NORMALIZED + CHANNELS + RESIDUALS + MEAN,
            ("multiply", "float32"): STEM + multiplies + CLASSIFIER + NORMALIZED + CHANNELS,
            ("square root", "float32"): CHANNELS,
            ("compare", "float32"): RELUS,
            ("divide", "float32"): 64,
        }.items()
        if count
    }
    assert counts.total.parameter_bytes == 4 * (KERNELS + 4 * CHANNELS)
    products = [layer for layer in counts.layers if layer.kind in ("AdderConv", "Conv", "Linear")]
    norms = [layer.name for layer in counts.layers if layer.kind == "BatchNorm"]
    assert (len(products), len(norms)) == (22, 22)
    if family == "adder":
        assert multiplied(counts) == [
            layer.name for layer in counts.layers if layer.name in ("conv1", "fc", *norms)
        ]
    block = counts["layer2.0.conv2"]
    assert block.subtractions + block.multiplications == 16 * 16 * 32 * 288
    assert block.parameter_bytes == 4 * 288 * 32
    assert block.activation_bytes == 4 * 2 * 16 * 16 * 32
    # Its two ReLUs and its sum: three activations in, two out.
    assert counts["layer2.0"].activation_bytes == 4 * 5 * 16 * 16 * 32


def test_a_program_by_hand() -> None:
    program = resnet20()
    counts = count_operations(program, floats(2, 32, 32, 3, dtype=jnp.uint8))
    requantized = NORMALIZED + 64  # the mean is one more of them
    one = {
        ("subtract", "uint8"): BODY,
        ("absolute", "uint8"): BODY,
        ("add", "int32"): STEM + BODY + CLASSIFIER + MEAN,
        ("multiply", "int8"): STEM + CLASSIFIER,
        # The normalisations, folded: a multiplier and a bias; residuals have multipliers too.
        ("multiply", "int32"): requantized + RESIDUALS,
        ("add", "int64"): requantized + RESIDUALS,
        ("shift", "int64"): requantized + RESIDUALS,
        ("compare", "int64"): 2 * requantized,
    }
    assert counts.total.operations == {key: 2 * count for key, count in one.items()}
    assert counts.total.parameter_bytes == KERNELS + (4 + 8) * (CHANNELS + 64)
    by_product = {layer.kind: layer for layer in counts.layers}
    assert by_product["Convolution (adder)"].operations["multiply", "int32"] > 0
    first = counts["0"]
    assert first.activation_bytes == 2 * (32 * 32 * 3 + 32 * 32 * 16)
    assert counts["2"].activation_bytes == 2 * 3 * 32 * 32 * 16  # with a residual
    assert count_operations(program).total.operations == one
    with pytest.raises(TypeError, match=r"images \(count, \*\(32, 32, 3\)\) expected"):
        count_operations(program, np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(TypeError, match="nothing else"):
        count_operations(program, 1, 2)


def adder_terms(function: Any, *inputs: Any, **options: Any) -> tuple[int, int, int]:
    total = count_operations(function, *inputs, **options).total
    assert not total.multiplications
    return total.subtractions, total.absolute_values, total.additions


@settings(max_examples=20)
@given(case=conv_cases(), mapped=st.sampled_from([None, (0, None), (None, 0), (0, 0)]))
def test_adder_convolutions_have_a_term_for_each_tap(case: ConvCase, mapped: Any) -> None:
    def convolve(x: Any, w: Any) -> Any:
        return jadder.adder_conv(x, w, *case.arguments)

    terms = math.prod(case.out) * math.prod(case.w[:-1])
    x, w = case.x, case.w
    if mapped:
        convolve, terms = jax.vmap(convolve, mapped), 3 * terms
        x, w = ((3, *x) if mapped[0] == 0 else x), ((3, *w) if mapped[1] == 0 else w)
    assert adder_terms(convolve, floats(*x), floats(*w)) == (terms, terms, terms)


@settings(max_examples=5)
@given(case=conv_cases())
def test_multiplying_convolutions_have_a_term_for_each_tap(case: ConvCase) -> None:
    rank = len(case.w) - 2
    numbers = lax.ConvDimensionNumbers(
        (0, rank + 1, *range(1, rank + 1)), (rank + 1, rank, *range(rank)),
        (0, rank + 1, *range(1, rank + 1)),
    )  # fmt: skip

    def convolve(x: Any, w: Any) -> Any:
        *arguments, groups = case.arguments
        return lax.conv_general_dilated(x, w, *arguments, numbers, groups)

    total = count_operations(convolve, floats(*case.x), floats(*case.w)).total
    terms = math.prod(case.out) * math.prod(case.w[:-1])
    assert total.operations == {("multiply", "float32"): terms, ("add", "float32"): terms}


@pytest.mark.parametrize("implementation", [None, "xla", "cpu_fast"])
def test_matmuls_of_every_implementation(implementation: Any) -> None:
    if implementation == "cpu_fast" and not jadder.implementations()["cpu_fast"].available:
        pytest.skip("no native code")

    def product(x: Any, w: Any) -> Any:
        return jadder.adder_matmul(x, w, implementation=implementation)

    assert adder_terms(product, floats(2, 5, 7), floats(7, 3)) == (210, 210, 210)


@pytest.mark.skipif(not jadder.implementations()["cpu"].available, reason="no native code")
def test_native_euclid_products_multiply() -> None:
    def product(x: Any, w: Any) -> Any:
        return jadder.euclid_matmul(x, w, implementation="cpu")

    counts = count_operations(product, floats(2, 5, 7), floats(7, 3))
    names = ("subtract", "multiply", "add")
    assert counts.total.operations == {(name, "float32"): 210 for name in names}


def test_the_reference_counts_as_it_is_written() -> None:
    def product(x: Any, w: Any) -> Any:
        return jadder.adder_conv(x, w, implementation="reference")

    total = count_operations(product, floats(1, 5, 5, 4), floats(3, 3, 4, 6)).total
    terms = 5 * 5 * 6 * 36
    assert (total.subtractions, total.absolute_values, total.additions) == (terms, terms, terms)
    assert total.others == {("negate", "float32"): 5 * 5 * 6}


def test_widths() -> None:
    half = count_operations(jadder.adder_matmul, *[floats(4, 4, dtype=jnp.bfloat16)] * 2).total
    assert half.operations["subtract", "float32"] == half.operations["add", "float32"] == 64
    size = floats(4, 4, dtype=jnp.uint8)
    sad = count_operations(jadder.adder_matmul, size, size, preferred_element_type=jnp.int32).total
    assert sad.operations == {
        ("subtract", "uint8"): 64, ("absolute", "uint8"): 64, ("add", "int32"): 64,
    }  # fmt: skip


def test_gradients_by_hand() -> None:
    def loss(x: Any, w: Any) -> Any:
        return jadder.adder_matmul(x, w).sum()

    total = count_operations(jax.grad(loss, (0, 1)), floats(3, 5), floats(5, 7)).total
    terms, kernel, outputs = 3 * 5 * 7, 5 * 7, 3 * 7
    # The input's: (w - x) clipped, times g, in sum. The kernel's: xᵀ g - w · Σ g, times a scale.
    assert total.subtractions == terms + terms + kernel
    assert total.absolute_values == terms
    assert total.additions == (terms + outputs) + terms + (terms + outputs)
    assert total.multiplications == terms + (terms + 2 * kernel)
    assert total.others["compare", "float32"] == 2 * terms


def test_a_function_has_its_scopes_and_loops() -> None:
    weights = jnp.ones((6, 6))

    def function(x: Any) -> Any:
        with jax.named_scope("first"):
            x = jadder.adder_matmul(x, weights)
        with jax.named_scope("second"), jax.named_scope("loop"):
            x = lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ weights), x)
        return lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x**3, x)

    counts = count_operations(jax.remat(function), floats(2, 6))
    assert counts["first"].subtractions == 72
    assert counts["first"].parameter_bytes == counts.total.parameter_bytes == 6 * 6 * 4
    assert counts["first"].activation_bytes == 2 * 2 * 6 * 4
    loop = counts["second/loop"]
    assert (loop.multiplications, loop.others["transcendental", "float32"]) == (5 * 72, 5 * 12)
    assert loop.activation_bytes == 5 * 2 * (2 * 6 * 4 + 4)  # what goes round, and its counter
    assert counts[""].multiplications == 2 * 12
    with pytest.raises(KeyError, match="no layer 'third'; there are"):
        counts["third"]


class Net(nnx.Module):
    """Scanned, rematerialised and shared layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> jadder.AdderLinear:
            return jadder.AdderLinear(8, 8, rngs=rngs)

        self.layers = stack(rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any, *, twice: bool = False) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer: Any, x: Any) -> Any:
            return nnx.relu(layer(x))

        x = nnx.remat(lambda head, x: head(x))(self.head, run(self.layers, x))
        return self.head(x) if twice else x


def test_transformed_layers_keep_their_names_and_the_model_is_left_alone() -> None:
    model = Net(nnx.Rngs(0))
    before = [(type(each), sorted(vars(each))) for _, each in nnx.iter_modules(model)]
    counts = count_operations(model, floats(2, 8), twice=True)
    assert [(type(each), sorted(vars(each))) for _, each in nnx.iter_modules(model)] == before
    assert counts["layers"].subtractions == 3 * 2 * 64
    assert counts["layers"].parameter_bytes == 3 * 64 * 4
    assert counts["head"].multiplications == 2 * 2 * 64
    assert counts["head"].parameter_bytes == (64 + 8) * 4
    assert count_operations(model, floats(2, 8))["head"].multiplications == 2 * 64


def test_a_transformer_is_counted() -> None:
    model = nnx.eval_shape(lambda: jadder.models.create("vit", family="conv", rngs=nnx.Rngs(0)))
    counts = count_operations(model, floats(1, 32, 32, 3))
    assert counts.total.others["exponential", "float32"] > 0
    assert counts.total.multiplications > 1e7


def test_what_hides_its_operations_is_refused() -> None:
    def until(x: Any) -> Any:
        with jax.named_scope("search"):
            return lax.while_loop(lambda x: x[0] < 1, lambda x: x + 1, x)

    with pytest.raises(ValueError, match="'while' in layer 'search': a loop whose number of turns"):
        count_operations(until, floats(1))

    def pallas(x: Any, w: Any) -> Any:
        return jadder.adder_matmul(x, w, implementation="mosaic_tpu")

    with pytest.raises(
        ValueError, match="a Pallas kernel; products count with implementation=None"
    ):
        count_operations(pallas, floats(8, 128), floats(128, 128))
    with pytest.raises(ValueError, match=r"'sort' in layer '.*': count_operations does not"):
        count_operations(jnp.sort, floats(8))


def test_energy_is_the_tables_arithmetic_and_says_so() -> None:
    bytes_of = floats(1, 100, dtype=jnp.uint8), floats(100, 1, dtype=jnp.uint8)
    sad = count_operations(jadder.adder_matmul, *bytes_of, preferred_element_type=jnp.int32)
    assert sad.energy("horowitz_45nm").picojoules == pytest.approx(100 * 0.16)
    signed = floats(1, 100, dtype=jnp.int8), floats(100, 1, dtype=jnp.int8)
    mac = count_operations(jnp.matmul, *signed, preferred_element_type=jnp.int32)
    assert mac.energy("horowitz_45nm").picojoules == pytest.approx(100 * 0.30)
    energy = count_operations(lambda x: jnp.exp(x) * x, floats(10)).energy("horowitz_45nm")
    assert energy.picojoules == pytest.approx(37)
    assert energy.left_out == {("exponential", "float32"): 10}
    assert "without 10 exponential float32" in str(energy)
    assert "Not the energy of the network" in str(energy)
    with pytest.raises(ValueError, match=r"table must be one of \['horowitz_45nm'\], got '7nm'"):
        sad.energy("7nm")


def test_the_table_has_every_layer_and_what_multiplies() -> None:
    text = str(count_operations(resnet20()))
    head, *lines = text.splitlines()
    for column in ("layer", "subtract uint8", "multiply int8", "parameters B", "activations B"):
        assert column in head
    assert sum(line.split()[1:3] == ["Convolution", "(adder)"] for line in lines) == 20
    assert any(line.startswith("total") and "40,370,176" in line for line in lines)
    assert lines[-1].startswith("multiplies: 0, 1, 2")


# -- XLA's cost analysis ---------------------------------------------------------------------------


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = jadder.AdderConv(2, 4, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(4, 3, use_bias=False, dot_general=jadder.adder_dot_general, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.fc(self.conv(x))


def test_flax_tabulates_the_flops_of_adder_layers() -> None:
    model = Small(nnx.Rngs(0))
    wide = {"width": 200, "force_terminal": False}
    with counted_flops():
        text = nnx.tabulate(
            model, jnp.ones((1, 4, 4, 2)), compute_flops=True, compute_vjp_flops=True,
            console_kwargs=wide,
        )  # fmt: skip
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    rows = {row[1]: row for row in cells if len(row) > 6 and row[5].isdigit()}
    conv, fc = 3 * 4 * 4 * 4 * 18, 3 * 4 * 4 * 3 * 4
    flops = {name: int(rows[name][5]) for name in ("conv", "fc")}
    assert flops == {"conv": conv, "fc": fc}
    assert int(rows[""][5]) == conv + fc
    assert all(int(rows[name][6]) > flops[name] for name in flops)


def test_what_is_compiled_outside_of_the_context_is_not_touched() -> None:
    x, w = jnp.arange(12.0).reshape(3, 4), jnp.ones((4, 5))
    product = jax.jit(jadder.adder_matmul)
    before = product.lower(x, w).as_text()
    with counted_flops():
        counted = product.lower(x, w)
        np.testing.assert_allclose(product(x, w), -jnp.abs(x[..., None] - w).sum(1))
    assert counted.cost_analysis()["flops"] == 3 * 3 * 4 * 5
    assert "custom_call" not in counted.as_text()
    assert product.lower(x, w).as_text() == before
