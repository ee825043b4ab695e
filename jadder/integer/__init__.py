"""Networks of integers: a trained adder network in bytes."""

from jadder.integer import native
from jadder.integer.c import export_c
from jadder.integer.dispatch import run
from jadder.integer.fake import RoundedProduct, fake_quantize
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
    "RoundedProduct",
    "SumPool",
    "export_c",
    "export_hex",
    "fake_quantize",
    "quantize",
    "run",
]

# So that a process which loads an exported function has the foreign call.
native.register()
