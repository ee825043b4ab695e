"""Networks of integers: a trained adder network in bytes."""

from jadder.integer import native
from jadder.integer.program import (
    Activation,
    Convolution,
    IntegerProgram,
    MaxPool,
    Requantization,
    Rescale,
    Reshape,
    Residual,
    SumPool,
)
from jadder.integer.dispatch import DISABLED_CHECKS, run

__all__ = [
    "DISABLED_CHECKS",
    "Activation",
    "Convolution",
    "IntegerProgram",
    "MaxPool",
    "Requantization",
    "Rescale",
    "Reshape",
    "Residual",
    "SumPool",
    "run",
]

# So that a process which loads an exported function has the foreign call.
native.register()
