"""The adder products as native code for the CPU, through XLA's foreign function interface.

The library is C++ without any part of Python in it: it is loaded with ctypes, and its symbols are
registered with JAX on first use. Floating-point products compute in float32, of float32, bfloat16
or float16 operands; those of bytes sum in int32. Matmuls, and convolutions of one or two spatial
dimensions; `unsupported` says what is not taken.

On its own it uses the instruction set that the processor has, AVX-512 or AVX2 or the baseline; the
environment variable ``JADDER_CPU_ISA=avx2`` or ``=baseline`` asks for a lower one. (``=avx512``
keeps `jadder.integer` and "cpu_int16" from AVX-512's VNNI, which nothing else uses.)
"""

import ctypes
import dataclasses
import functools
import importlib.resources
import os
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jadder.kernels import limits
from jadder.kernels.spec import ConvSpec
from jadder.kernels.varying import result_like_operands
from jadder.rules import Clip

_LIBRARY = "libjadder_cpu.so"
_REASON = "missing.txt"
TARGETS = (
    "matmul",
    "matmul_dx",
    "matmul_dw",
    "conv",
    "conv_dx",
    "conv_dw",
    "euclid_matmul",
    "euclid_conv",
    "int16_matmul",
    "int16_matmul_dx",
    "int16_matmul_dw",
    "int16_conv",
    "int16_euclid_matmul",
    "int16_euclid_conv",
    "int16_conv_dx",
    "int16_conv_dw",
    "integer_matmul",
    "integer_conv",
)
# Of these, and of no others, a program has native code by itself, and an exported one never has.
_NORMALIZATIONS = ("standardize", "standardize_gradient")
_ISAS = ("avx512", "avx2", "baseline")


def unavailable() -> str | None:
    """Why the native code cannot be used at all, or None if it can."""
    return _load()[1]


unsupported = limits.unsupported


def instruction_set() -> str:
    """``"avx512"``, ``"avx2"`` or ``"baseline"``: what the native code runs on here."""
    name: bytes = library().jadder_isa()
    return name.decode()


@dataclasses.dataclass(frozen=True)
class CpuKernels:
    """The native products.

    ``form`` says how products of floats are computed:

    * "exact": in float32, as written.
    * "fast": forward products as Σ_k x + Σ_k w - 2 Σ_k max(x, w): a third quicker, and inexact by
      rounding errors of Σ|x| + Σ|w| rather than of Σ|x - w|.
    * "int16": of operands rounded to multiples of a step, 16-bit integers, whose sums are exact.
      For y, x and w have the step (max x - min x) / 2046, zero counting among the values of x. For
      dx, where ψ has a limit = clip.bound / clip.scale, theirs is at most (max|x| + limit) / 3900
      and that of g max|g| / 8191. What of w lies beyond the values of x, or beyond the limit from
      them, is not rounded but cut off, and counted apart. For dw with ψ(d) = scale · d, on
      processors with AVX-512's VNNI, x has the step max|x| / 2047 and g max|g| / 4095, both over
      256 positions or fewer. Anything else is "exact": values that are not finite, bfloat16
      gradients, steps that floats do not hold, max|x| > 126 limit, groups narrower than a vector,
      input dilation, and products that take too few terms of a value to repay its rounding.

    With ``distance="l2"`` they are the Euclid product -Σ (x - w)², whose gradients are those of the
    rule ψ(d) = 2 d, for callers to ask for. "fast" is "exact" then; "int16" has for y the step
    (max - min) / 4094 over the values of x and w, zero counting among them, and for dx, whose x
    stays as it is, max|w| / 4095 and max|g| / 8191.
    """

    form: Literal["exact", "fast", "int16"] = "exact"
    distance: Literal["l1", "l2"] = "l1"

    def matmul(self, x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
        """y[b, m, n] = -Σ_k |x[b, m, k] - w[b, k, n]|."""
        shape = (*x.shape[:2], w.shape[2])
        if jnp.issubdtype(x.dtype, jnp.integer):
            return _call("integer_matmul", shape, jnp.int32, (x, w))
        target, attributes = self._forward("matmul")
        return _call(target, shape, out_dtype, (x, w), **attributes)

    def matmul_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dx[b, m, k] = Σ_n ψ(w[b, k, n] - x[b, m, k]) g[b, m, n]."""
        del precision
        return _call(self._target("matmul_dx"), x.shape, out_dtype, (x, w, g), **_clip(clip))

    def matmul_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dw[b, k, n] = Σ_m ψ(x[b, m, k] - w[b, k, n]) g[b, m, n], in float32 at least."""
        del precision
        return _call(self._target("matmul_dw"), w.shape, out_dtype, (x, w, g), **_clip(clip))

    def conv(self, x: Array, w: Array, spec: ConvSpec, *, out_dtype: DTypeLike) -> Array:
        """y[b, o, f] = -Σ_{tap, c} |x[b, position(o, tap), c] - w[tap, c, f]|, zeros included."""
        out = (x.shape[0], *spec.out_spatial(x.shape[1:-1], w.shape[:-2]), w.shape[-1])
        shape, operands = _planar_shape(out), (_planar(x, 1), _planar(w, 0))
        if jnp.issubdtype(x.dtype, jnp.integer):
            y = _call("integer_conv", shape, jnp.int32, operands, **_spec(spec))
        else:
            target, attributes = self._forward("conv")
            y = _call(target, shape, out_dtype, operands, **_spec(spec), **attributes)
        return y.reshape(out)

    def conv_dx(
        self,
        x: Array,
        w: Array,
        g: Array,
        spec: ConvSpec,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dx[b, p, c] = Σ_{tap, f} ψ(w[tap, c, f] - x[b, p, c]) g[b, output(p, tap), f]."""
        del precision
        operands = _planar(x, 1), _planar(w, 0), _planar(g, 1)
        shape = operands[0].shape
        dx = _call(
            self._target("conv_dx"), shape, out_dtype, operands, **_spec(spec), **_clip(clip)
        )
        return dx.reshape(x.shape)

    def conv_dw(
        self,
        x: Array,
        w: Array,
        g: Array,
        spec: ConvSpec,
        clip: Clip,
        *,
        out_dtype: DTypeLike,
        precision: lax.PrecisionLike = None,
    ) -> Array:
        """dw[tap, c, f] = Σ_{b, o} ψ(x[b, position(o, tap), c] - w[tap, c, f]) g[b, o, f]."""
        del precision
        operands = _planar(x, 1), _planar(w, 0), _planar(g, 1)
        shape = operands[1].shape
        dw = _call(
            self._target("conv_dw"), shape, out_dtype, operands, **_spec(spec), **_clip(clip)
        )
        return dw.reshape(w.shape)

    def _target(self, product: str) -> str:
        """The handler of a product of floats."""
        return f"int16_{product}" if self.form == "int16" else product

    def _forward(self, product: str) -> tuple[str, dict[str, Any]]:
        """The handler of a forward product of floats, and its attributes."""
        if self.distance == "l2":
            return self._target(f"euclid_{product}"), {}
        if self.form == "int16":
            return self._target(product), {}
        return product, {"fast": np.bool_(self.form == "fast")}


def standardize(
    x: Array,
    scale: Array,
    bias: Array,
    *residual: Array,
    epsilon: float,
    center_features: bool,
    rectify: bool,
) -> tuple[Array, Array, Array]:
    """`jadder.models.standardize`'s function of float32, with the features on the last axis."""
    library()
    types = [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (x, scale, scale)]
    call = jax.ffi.ffi_call("jadder_standardize", types)
    attributes = _standardize_attributes(epsilon, center_features, rectify)
    y, mean, var = call(x, scale, bias, *residual, **attributes)
    return y, mean, var


def standardize_gradient(
    *operands: Array, epsilon: float, center_features: bool, rectify: bool
) -> tuple[Array, Array, Array]:
    """The gradients for x, scale and bias, without a residual.

    Args:
      *operands: x, scale, bias, mean and var, and the gradients of y, mean and var.
    """
    library()
    types = [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in operands[:3]]
    call = jax.ffi.ffi_call("jadder_standardize_gradient", types)
    attributes = _standardize_attributes(epsilon, center_features, rectify)
    dx, dscale, dbias = call(*operands, **attributes)
    return dx, dscale, dbias


def _standardize_attributes(epsilon: float, center: bool, rectify: bool) -> dict[str, Any]:
    return {
        "epsilon": np.float32(epsilon),
        "center": np.bool_(center),
        "rectify": np.bool_(rectify),
    }


def _call(
    target: str,
    shape: Sequence[int],
    out_dtype: DTypeLike,
    operands: Sequence[Array],
    **attributes: Any,
) -> Array:
    """One foreign call; vmap maps it without repeating an operand that is not mapped."""
    library()
    result_dtype = jnp.int32 if jnp.dtype(out_dtype) == jnp.int32 else jnp.float32
    bfloat16 = all(operand.dtype == jnp.bfloat16 for operand in operands)
    if result_dtype == jnp.float32 and not bfloat16:
        operands = [operand.astype(jnp.float32) for operand in operands]
    result = result_like_operands(shape, result_dtype, *operands)
    call = jax.ffi.ffi_call(f"jadder_{target}", result, vmap_method="expand_dims")
    y: Array = call(*operands, **attributes)
    return y.astype(out_dtype)


def _clip(clip: Clip) -> dict[str, Any]:
    return {"scale": np.float64(clip.scale), "bound": np.float64(clip.bound)}


def _spec(spec: ConvSpec) -> dict[str, Any]:
    """A spec's attributes in two dimensions: one dimension is a plane one pixel high."""
    missing = 2 - len(spec.window_strides)
    ones, none = (1,) * missing, ((0, 0),) * missing
    return {
        "strides": np.array((*ones, *spec.window_strides), np.int64),
        "padding": np.array((*none, *spec.padding), np.int64).reshape(-1),
        "lhs_dilation": np.array((*ones, *spec.lhs_dilation), np.int64),
        "rhs_dilation": np.array((*ones, *spec.rhs_dilation), np.int64),
        "groups": np.int64(spec.feature_group_count),
    }


def _planar(array: Array, axis: int) -> Array:
    """An array of one spatial dimension, at ``axis``, as one of two."""
    return array if array.ndim == 4 else jnp.expand_dims(array, axis)


def _planar_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape) if len(shape) == 4 else (shape[0], 1, *shape[1:])


def library() -> ctypes.CDLL:
    """The native library, loaded and registered. RuntimeError where there is none."""
    loaded, refusal = _load()
    if loaded is None:
        raise RuntimeError(f"the native CPU kernels are unavailable: {refusal}")
    return loaded


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, its functions registered with JAX, or the reason why there is none."""
    isa = os.environ.get("JADDER_CPU_ISA", _ISAS[0])
    if isa not in _ISAS:
        raise ValueError(f"JADDER_CPU_ISA must be one of {_ISAS}, got {isa!r}")
    folder = importlib.resources.files("jadder").joinpath("_native")
    path = folder.joinpath(_LIBRARY)
    if not path.is_file():
        return None, (
            "this installation has no native library"
            f"{_why_not_built(folder.joinpath(_REASON))}; reinstall jadder where a C++17 compiler "
            "(GCC or Clang) is found"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the native library does not load: {error}"
    library.jadder_jaxlib_version.restype = library.jadder_isa.restype = ctypes.c_char_p
    built = library.jadder_jaxlib_version().decode()
    # XLA would not start at all with handlers that are newer than itself.
    if _release(built) > jaxlib.version.__version_info__[:3]:
        return None, (
            f"the native library was built with the headers of jaxlib {built}, and jaxlib "
            f"{jaxlib.version.__version__} is older"
        )
    for target in (*TARGETS, *_NORMALIZATIONS):
        capsule = jax.ffi.pycapsule(getattr(library, f"jadder_{target}"))
        jax.ffi.register_ffi_target(f"jadder_{target}", capsule, platform="cpu")
    return library, None


def _why_not_built(file: Traversable) -> str:
    """What the installation left to be read where it could not build the library (csrc/attempt)."""
    try:
        reason = file.read_bytes().decode(errors="replace")
    except OSError:
        return ""
    return f": {' '.join(reason.split())[:200]}"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])
