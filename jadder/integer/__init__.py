"""Networks of integers: a trained adder network in bytes."""

from jadder.integer.hexadecimal import export_hex
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

__all__ = [
    "Activation",
    "Convolution",
    "IntegerProgram",
    "MaxPool",
    "Requantization",
    "Rescale",
    "Reshape",
    "Residual",
    "SumPool",
    "export_hex",
]
