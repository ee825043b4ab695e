"""`jax.export` of functions with products in native code."""

import jax

from jadder.integer import native
from jadder.kernels import cpu

DISABLED_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target)
    for target in (*(f"jadder_{name}" for name in cpu.TARGETS), native.TARGET)
)
"""For ``jax.export.export(function, disabled_checks=jadder.DISABLED_CHECKS)``.

JAX exports no foreign calls that it does not know, as it cannot promise that a later version has
them; these are jadder's own, by name. The process that loads the file imports jadder first, in a
version with the same calls, and has its native code. For a file that runs anywhere, without jadder,
set the products to XLA's loops before (`jadder.set_implementation`); it needs no check disabled.
Batch normalisation in training, which programs for one CPU have in native code, is never exported
as that.

Example:
  >>> import jadder, jax.numpy as jnp
  >>> from flax import nnx
  >>> model = jadder.AdderLinear(3, 4, rngs=nnx.Rngs(0))
  >>> jadder.set_implementation(model, "xla")
  1
  >>> exported = jax.export.export(jax.jit(model))(jnp.zeros((2, 3)))
  >>> exported.call(jnp.ones((2, 3))).shape
  (2, 4)
"""
