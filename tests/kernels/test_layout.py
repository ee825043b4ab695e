"""Which dimensions of a product are shared out over a mesh, and how."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jadder.kernels.layout import Layout, name_axes, plan
from jadder.kernels.spec import ConvSpec
from tests.strategies import conv_cases

MESH = {"i": 2, "j": 3}
FUNCTIONS = ["", "_dx", "_dw"]


def matmul(function, x, w, *g, mapped=()):
    return Layout.of(f"matmul{function}", None, mapped, (x, w, *g))


@pytest.mark.parametrize(("function", "summed"), [("", "k"), ("_dx", "n"), ("_dw", "m")])
def test_a_matmul_sums_over_the_index_that_its_result_lacks(function, summed):
    g = [(2, 6, 4)] if function else []
    layout = matmul(function, (2, 6, 5), (2, 5, 4), *g)
    assert layout.sizes == {"b": 2, "m": 6, "k": 5, "n": 4}
    assert layout.summed == {summed}
    assert not layout.whole
    assert (
        layout.shape(layout.result) == {"": (2, 6, 4), "_dx": (2, 6, 5), "_dw": (2, 5, 4)}[function]
    )


@given(case=conv_cases())
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_convolution_needs_all_of_its_space(function, case):
    spec = ConvSpec(case.strides, case.padding, case.lhs_dilation, case.rhs_dilation, case.groups)
    g = [case.out] if function else []
    layout = Layout.of(f"conv{function}", spec, (), (case.x, case.w, *g))
    expected = {"": case.out, "_dx": case.x, "_dw": case.w}[function]
    assert layout.shape(layout.result) == tuple(expected)
    free = {"b", "g"} if case.groups > 1 else {"b", "c", "f"}
    assert set(layout.sizes) - layout.whole == free
    assert layout.summed == ({"": {"c"}, "_dx": {"f"}, "_dw": {"b"}}[function] & free)


def test_a_mapped_dimension_is_an_index_of_what_has_it():
    layout = matmul("", (7, 1, 6, 5), (9, 1, 5, 4), mapped=((False, True), (True, False)))
    x, w = layout.operands
    assert (x[0], w[0], layout.result[:2]) == (("v1",), ("v0",), (("v0",), ("v1",)))
    assert layout.shape(layout.result) == (9, 7, 1, 6, 4)
    assert layout.summed == {"k"}


def test_the_largest_operand_stays_where_it_is():
    layout = matmul("", (1, 60, 6), (1, 6, 6))
    over_rows, over_terms = ((), ("i",), ()), ((), ("i",), ())
    assert plan(layout, MESH, (over_rows, over_terms)).axes == {"m": ("i",)}
    layout = matmul("", (1, 6, 6), (1, 6, 60))
    assert plan(layout, MESH, (over_rows, over_terms)).axes == {"k": ("i",)}
    assert plan(layout, MESH, (over_rows, over_terms)).summed == ("i",)


def test_what_no_operand_shards_is_sharded_as_the_result_is_wanted():
    layout = matmul("", (1, 6, 6), (1, 6, 6))
    nowhere, wanted = ((), (), ()), ((), ("i",), ("j",))
    assert plan(layout, MESH, (nowhere, nowhere)).axes == {}
    assert plan(layout, MESH, (nowhere, nowhere), wanted).axes == {"m": ("i",), "n": ("j",)}


def test_axes_that_do_not_divide_an_index_are_not_used():
    layout = matmul("", (1, 4, 6), (1, 6, 9))
    both = ((), ("i", "j"), ()), ((), (), ("i",))
    assert plan(layout, MESH, both).axes == {"m": ("i",)}


def test_groups_are_shared_out_whole():
    spec = ConvSpec((1,), ((0, 0),), (1,), (1,), 4)
    layout = Layout.of("conv", spec, (), ((2, 5, 8), (3, 2, 12)))
    assert layout.sizes == {"b": 2, "s0": 5, "g": 4, "c": 2, "t0": 3, "f": 3, "o0": 3}
    shared = plan(layout, {"i": 4}, (((), (), ("i",)), ((), (), ())))
    assert shared.axes == {"g": ("i",)}
    assert [shared.sharding(each) for each in (*layout.operands, layout.result)] == [
        ((), (), ("i",)),
        ((), (), ("i",)),
        ((), (), ("i",)),
    ]
    assert not shared.summed


axes = st.sampled_from([(), ("i",), ("j",), ("i", "j"), ("j", "i")])


@given(
    sizes=hnp.array_shapes(min_dims=4, max_dims=4, max_side=12),
    function=st.sampled_from(FUNCTIONS),
    wishes=st.lists(st.tuples(axes, axes, axes), min_size=4, max_size=4),
)
def test_plans_can_be_carried_out(sizes, function, wishes):
    b, m, k, n = sizes
    shapes = [(b, m, k), (b, k, n), *([(b, m, n)] if function else [])]
    layout = matmul(function, *shapes)
    chosen = plan(layout, MESH, wishes[: len(shapes)], wishes[-1])
    used = [axis for each in chosen.axes.values() for axis in each]
    assert len(used) == len(set(used))
    for index, each in chosen.axes.items():
        assert layout.sizes[index] % np.prod([MESH[axis] for axis in each]) == 0


def starts(mesh, sharding):
    """What `name_axes` takes: of an array whose dimensions are sharded over these axes."""
    devices = np.prod(list(mesh.values()))
    position = dict(zip(mesh, np.indices(tuple(mesh.values())), strict=True))
    found = []
    for axes in sharding:
        block, start = devices, np.zeros(tuple(mesh.values()), int)
        for axis in axes:
            block //= mesh[axis]
            start = start + block * position[axis]
        found.append(start.reshape(-1))
    return found


@given(
    shape=st.sampled_from([(2, 3), (3, 2), (4, 2), (8, 1), (2, 2, 3), (6, 2)]),
    shardings=st.lists(st.permutations(range(3)), min_size=1, max_size=3),
    cuts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_axes_of_any_mesh_are_found(shape, shardings, cuts):
    mesh = {str(i): size for i, size in enumerate(shape)}
    low, high = sorted(cuts)
    named = [[str(i) for i in order if i < len(shape)] for order in shardings]
    arrays = [starts(mesh, (axes[:low], axes[low:high], axes[high:])) for axes in named]
    sizes, found = name_axes(arrays)
    for array, sharding in zip(arrays, found, strict=True):
        for ours, theirs in zip(starts(sizes, sharding), array, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_blocks_that_no_axes_lead_to_count_as_whole():
    zigzag = np.array([0, 6, 2, 4, 1, 3, 5, 7])
    assert name_axes([[zigzag, np.arange(8)]])[1] == [((), ("p0", "p1", "p2"))]
