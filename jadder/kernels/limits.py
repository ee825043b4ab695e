"""What the products cannot take: sizes that no arithmetic holds, and types of some kernels."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jadder.kernels.spec import ConvSpec

FACTOR = 2**31 - 1
"""The largest stride, dilation or padding: their products with sizes stay far from 2⁶³."""
POSITION = 2**56
"""The most values of an array, or of an image with its zeros."""


def overflow(dtype: jnp.dtype, terms: int) -> str | None:
    """Why an int32 need not hold the sum of so many differences; None if it does.

    Differences of 32 bits and more are not judged: only their values say whether they fit.

    Example:
      >>> overflow(jnp.dtype("uint8"), 8_421_505)
      'an int32 holds the sum of 8421504 differences of uint8, not of 8421505'
    """
    width = jnp.iinfo(dtype)
    most = int(jnp.iinfo(jnp.int32).max) // (int(width.max) - int(width.min))
    if width.bits >= 32 or terms <= most:
        return None
    return f"an int32 holds the sum of {most} differences of {dtype}, not of {terms}"


def unsupported(
    dtype: jnp.dtype,
    spec: ConvSpec | None,
    out_dtype: jnp.dtype,
    *,
    floats: Sequence[DTypeLike] = (jnp.float32, jnp.bfloat16, jnp.float16),
    integers: Sequence[DTypeLike] = (jnp.uint8, jnp.int8),
) -> str | None:
    """Why operands of ``dtype``, summed in ``out_dtype``, cannot be taken; None if they can.

    Args:
      dtype: of the operands.
      spec: of a convolution; None for a matmul.
      out_dtype: float32, or int32 of integers.
      floats: the floating types that the kernels take.
      integers: and the integers.
    """
    if jnp.issubdtype(dtype, jnp.integer) and integers:
        if dtype not in integers:
            return f"of integers it takes uint8 and int8, not {dtype}"
    elif dtype not in floats or out_dtype != jnp.float32:
        *most, last = (jnp.dtype(each).name for each in floats)
        return f"it sums {', '.join(most)} and {last} in float32, not {dtype} in {out_dtype}"
    if spec is not None and len(spec.window_strides) > 2:
        return f"it takes one or two spatial dimensions, not {len(spec.window_strides)}"
    return None
