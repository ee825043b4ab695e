"""Device-varying types inside ``jax.shard_map``.

There, each value's type names the mesh axes over which it differs between devices, and a custom
derivative must return each operand's own type. Casting the operands to a common type *outside* the
custom derivative lets JAX transpose the cast: a replicated kernel's gradient is then summed over
the devices that hold parts of the batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def varying_axes(*operands: Array) -> frozenset[str]:
    """The mesh axes over which any of ``operands`` differs between devices."""
    return frozenset().union(
        *(jax.typeof(operand).manual_axis_type.varying for operand in operands)
    )


def vary_alike(*operands: Array) -> tuple[Array, ...]:
    """``operands``, each cast to vary over all axes that any of them varies over."""
    axes = varying_axes(*operands)
    return tuple(_vary_over(operand, axes) for operand in operands)


def zeros_like_operands(shape: Sequence[int], dtype: DTypeLike, *operands: Array) -> Array:
    """Zeros that vary as a result computed from ``operands`` does: a loop's initial value."""
    return _vary_over(jnp.zeros(shape, dtype), varying_axes(*operands))


def result_like_operands(
    shape: Sequence[int], dtype: DTypeLike, *operands: Array
) -> jax.ShapeDtypeStruct:
    """The type of a foreign result, which varies as its operands do."""
    axes = varying_axes(*operands)
    if not axes:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.ShapeDtypeStruct(
        tuple(shape),
        dtype,
        manual_axis_type=jax.sharding.ManualAxisType(varying=axes),
        sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )


def _vary_over(operand: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - varying_axes(operand)))
    return lax.pcast(operand, missing, to="varying") if missing else operand
