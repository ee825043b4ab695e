"""Networks of integers: a trained adder network in bytes."""

from jadder.integer.c import export_c
from jadder.integer.grid import Grid
from jadder.integer.hexadecimal import export_hex
from jadder.integer.hybrid import HybridProgram
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
from jadder.integer.quantize import quantize

__all__ = [
    "Activation",
    "Convolution",
    "Grid",
    "HybridProgram",
    "IntegerProgram",
    "MaxPool",
    "Requantization",
    "Rescale",
    "Reshape",
    "Residual",
    "SumPool",
    "export_c",
    "export_hex",
    "quantize",
]
