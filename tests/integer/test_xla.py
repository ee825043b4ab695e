"""A program in JAX's operations equals the definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jadder.integer import IntegerProgram, xla
from tests.integer import oracle
from tests.integer.programs import images, programs


@settings(max_examples=25)
@given(program=programs(), seed=st.integers(0, 2**32))
def test_every_value_is_as_defined(program: IntegerProgram, seed: int) -> None:
    x = images(program, 2, seed)
    for ours, expected in zip(
        xla.every_value(program, x), oracle.every_value(program, x), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)
