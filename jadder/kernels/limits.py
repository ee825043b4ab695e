"""What kernels of few types and dimensions cannot take."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jadder.kernels.spec import ConvSpec


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
