"""Neural networks that add instead of multiply, in JAX and Flax NNX.

`jadder.ops` has the adder and Euclid products, `jadder.rules` their gradient rules, `jadder.nn`
the layers, `jadder.optim` the optimizers and `jadder.models` whole networks. The names here are
those that most programs need.
"""

from jadder import annealing, integer, models, nn, ops, optim, rules
from jadder.annealing import set_l1_share
from jadder.checks import check_model
from jadder.conversion import adderize, set_implementation
from jadder.counting import count_operations, counted_flops
from jadder.exporting import DISABLED_CHECKS
from jadder.implementations import implementations
from jadder.integer import IntegerProgram, export_c, export_hex, fake_quantize, quantize
from jadder.nn import (
    AdderAttention,
    AdderConv,
    AdderConvTranspose,
    AdderKernel,
    AdderLinear,
    EuclidConv,
    EuclidConvTranspose,
    EuclidLinear,
    ScaledAdderLinear,
    adder_mask,
)
from jadder.ops import (
    adder_conv,
    adder_conv_general_dilated,
    adder_dot_general,
    adder_einsum,
    adder_matmul,
    euclid_conv,
    euclid_conv_general_dilated,
    euclid_dot_general,
    euclid_einsum,
    euclid_matmul,
)
from jadder.optim import adder_adamw, adder_sgd, clip_adder_kernels, scale_by_adder
from jadder.rules import ADDER_VIT, ADDERNET, SIGN, GradientRule
from jadder.warning import AdderWarning

__version__ = "0.1.0"

__all__ = [
    "ADDERNET",
    "ADDER_VIT",
    "DISABLED_CHECKS",
    "SIGN",
    "AdderAttention",
    "AdderConv",
    "AdderConvTranspose",
    "AdderKernel",
    "AdderLinear",
    "AdderWarning",
    "EuclidConv",
    "EuclidConvTranspose",
    "EuclidLinear",
    "GradientRule",
    "IntegerProgram",
    "ScaledAdderLinear",
    "adder_adamw",
    "adder_conv",
    "adder_conv_general_dilated",
    "adder_dot_general",
    "adder_einsum",
    "adder_mask",
    "adder_matmul",
    "adder_sgd",
    "adderize",
    "annealing",
    "check_model",
    "clip_adder_kernels",
    "count_operations",
    "counted_flops",
    "euclid_conv",
    "euclid_conv_general_dilated",
    "euclid_dot_general",
    "euclid_einsum",
    "euclid_matmul",
    "export_c",
    "export_hex",
    "fake_quantize",
    "implementations",
    "integer",
    "models",
    "nn",
    "ops",
    "optim",
    "quantize",
    "rules",
    "scale_by_adder",
    "set_implementation",
    "set_l1_share",
]
