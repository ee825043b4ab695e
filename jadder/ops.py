"""The adder product ``-Σ|x - w|`` and the Euclid product ``-Σ(x - w)²``.

Each comes in five forms: with the arguments of ``lax.dot_general``, of
``lax.conv_general_dilated`` and of an einsum, so that Flax's layers accept it in their place, and
as a short matmul and convolution. The left operand is the input and the right one the kernel, which
matters to the adder product's gradients (see `jadder.rules`).

All forms take float16, bfloat16, float32 and, where enabled, float64, accumulate in at least
float32, and work under ``jit``, ``grad``, ``vmap``, ``remat``, ``scan`` and ``shard_map``. The
adder forms also take integers with ``preferred_element_type=jnp.int32``: exact, and refused where
sums of so many 8- or 16-bit differences need not fit. Differences and sums of wider integers must
fit for themselves.

The first derivative of an adder form follows its rule. A second one, with any implementation, is
the derivative of the first one as the function that it is, with d|d|/dd = sign(d). Forward-mode
differentiation (``jvp``, ``jacfwd``) of an adder form raises, as for every ``jax.custom_vjp``; of
its gradient, as in ``jax.hessian``, it works.

Of sharded arrays each device computes with its blocks: batch, features, contraction and groups stay
as they are sharded, and a sum over devices is one all-reduce (docs/guides/devices.md).

Shared arguments:
  precision: of the matrix products inside (Euclid's, and the full-precision gradients'), as in
    ``lax.dot_general``. None means ``HIGHEST``: those products are followed by a subtraction of
    nearly equal numbers.
  preferred_element_type: the result's dtype; None means the operands'.
  out_sharding: the result's sharding, as in ``lax.dot_general``.
  rule: how the adder product differentiates, a `GradientRule`.
  implementation: ``"cpu"`` (native code, in float32 and of bytes), ``"cpu_fast"`` (the same, its
    forward product as Σx + Σw - 2 Σ max(x, w): a third quicker, with rounding errors of the size
    of Σ|x| + Σ|w|), ``"cpu_int16"`` (operands rounded to 16-bit integers for the forward product
    and both gradients of a training step: about twice as quick, with errors of some tenths of a
    percent), ``"xla"`` (loops, on any platform), ``"reference"`` (the literal definition, for small
    tests), ``"mosaic_gpu"`` and ``"mosaic_tpu"`` (Pallas kernels, experimental), or None: ``"cpu"``
    on a CPU if it can do the job, else ``"xla"``, chosen when the program is lowered.
    `jadder.implementations` says which there are. Of a Euclid form ``"cpu"`` and ``"cpu_fast"`` are
    native code that adds (a - b)² up, ``"cpu_int16"`` that of rounded operands, neither in forward
    mode; any other name, as a mask, leaves it to XLA's dot product or convolution, which JAX
    differentiates in every mode; None chooses as for adder forms.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jadder.implementations import Implementation, select, select_euclid
from jadder.kernels import limits, linear, masked
from jadder.kernels.interface import Kernels
from jadder.kernels.spec import ConvSpec
from jadder.kernels.varying import vary_alike
from jadder.rules import ADDERNET, Clip, GradientRule, check_rule

OutSharding = NamedSharding | PartitionSpec | None
Padding = str | int | Sequence[int | tuple[int, int]]
DotDimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


def adder_dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: OutSharding = None,
    rule: GradientRule = ADDERNET,
    implementation: Implementation | None = None,
) -> Array:
    """``lax.dot_general`` with each product a·b replaced by -|a - b|.

    Args:
      lhs: the input.
      rhs: the kernel, of the same dtype.
      dimension_numbers: ``((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))``.

    The other arguments are the module's shared ones.

    Returns:
      Batch dimensions, then the input's free dimensions, then the kernel's.

    Raises:
      TypeError, ValueError: operands that do not fit together, at trace time.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, kernel = jnp.ones((8, 3, 4)), jnp.zeros((4, 5))
      >>> adder_dot_general(x, kernel, (((2,), (0,)), ((), ())))[0, 0]
      Array([-4., -4., -4., -4., -4.], dtype=float32)
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    _check_dot("adder_dot_general", lhs, rhs, dimension_numbers)
    x, kernel, shape = _as_matmul(lhs, rhs, dimension_numbers)
    product = _Product.of(
        "adder_dot_general", x, None, rule, implementation, precision, preferred_element_type
    )
    return _reshard(product(x, kernel).reshape(shape), out_sharding)


def adder_conv_general_dilated(
    lhs: ArrayLike,
    rhs: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    *,
    mask: ArrayLike | None = None,
    rule: GradientRule = ADDERNET,
    implementation: Implementation | None = None,
) -> Array:
    """``lax.conv_general_dilated`` with each product a·b replaced by -|a - b|.

    The zeros that padding and ``lhs_dilation`` bring in take part, as -|0 - w|: so do all published
    implementations. Holes of ``rhs_dilation`` do not.

    Args:
      lhs: the input.
      rhs: the kernel, of the same dtype.
      window_strides, padding, lhs_dilation, rhs_dilation: as in ``lax.conv_general_dilated``, for
        any number of spatial dimensions.
      dimension_numbers, feature_group_count, batch_group_count: likewise.
      mask: of the kernel's shape, 0 or False at taps that take no part: they see nothing of the
        input, pass no gradient to it, and get none. (A zero in the kernel would be |x - 0|.) With a
        mask, XLA's loops compute the product and the input's gradient, whatever the implementation.

    The other arguments are the module's shared ones.

    Raises:
      TypeError, ValueError: operands that do not fit together, at trace time.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((1, 1, 5)), jnp.zeros((2, 1, 3))  # NCW and OIW, lax's defaults
      >>> adder_conv_general_dilated(x, kernel, (1,), [(0, 0)]).tolist()
      [[[-3.0, -3.0, -3.0], [-3.0, -3.0, -3.0]]]
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    conv = _Convolution.of(
        "adder_conv_general_dilated",
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
    )
    product = _Product.of(
        "adder_conv_general_dilated",
        lhs,
        conv.spec,
        rule,
        implementation,
        precision,
        preferred_element_type,
    )
    return _reshard(conv.apply(product, lhs, rhs, mask), out_sharding)


def adder_matmul(
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    rule: GradientRule = ADDERNET,
    implementation: Implementation | None = None,
) -> Array:
    """y[..., n] = -Σ_k |x[..., k] - kernel[k, n]|, for x (..., K) and kernel (K, N).

    The operands' dtypes are promoted to a common one. Keywords are the module's shared ones.
    AdderNet (CVPR 2020), eq. 2.

    Raises:
      TypeError, ValueError: operands that do not fit together, at trace time.

    Example:
      >>> import jax.numpy as jnp
      >>> float(adder_matmul(jnp.array([1.0, 2.0]), jnp.array([[0.0], [5.0]]))[0])
      -4.0
    """
    x, kernel = _promote(x, kernel)
    return adder_dot_general(
        x,
        kernel,
        _matmul_dimension_numbers("adder_matmul", x, kernel),
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
        rule=rule,
        implementation=implementation,
    )


def adder_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    *,
    mask: ArrayLike | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    rule: GradientRule = ADDERNET,
    implementation: Implementation | None = None,
) -> Array:
    """The adder convolution, channels last: AdderNet (CVPR 2020), eq. 1.

    Args:
      x: (..., *spatial, C), with any number of batch dimensions, none included.
      kernel: (*window, C / feature_group_count, F), with one to three window dimensions.
      strides, input_dilation, kernel_dilation: one number for all dimensions, or one for each.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, one number for all sides, or for each
        dimension a number or a pair (low, high). The zeros take part in the sum.
      feature_group_count: groups of channels, each with its own F / groups filters.
      mask: of the kernel's shape, as in `adder_conv_general_dilated`.

    The operands' dtypes are promoted to a common one. The other keywords are the module's shared
    ones.

    Returns:
      (..., *out_spatial, F).

    Raises:
      TypeError, ValueError: operands that do not fit together, at trace time.

    Example:
      >>> import jax.numpy as jnp
      >>> adder_conv(jnp.ones((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16)), strides=2).shape
      (2, 4, 4, 16)
    """
    convolution = functools.partial(
        adder_conv_general_dilated, mask=mask, rule=rule, implementation=implementation
    )
    return _short_conv(
        "adder_conv",
        convolution,
        x,
        kernel,
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        feature_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )


def adder_einsum(
    subscripts: str,
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    rule: GradientRule = ADDERNET,
    implementation: Implementation | None = None,
) -> Array:
    """``jnp.einsum`` of two operands with each product a·b replaced by -|a - b|.

    Args:
      subscripts: explicit, with ``->``. Letters in both operands and not in the result are summed
        over, letters in all three are batch dimensions; x may have an ellipsis, which the result
        then has too. Repeated letters in one operand, and sums over one operand alone, have no
        adder form.
      x: the input.
      kernel: the kernel.

    The operands' dtypes are promoted to a common one. The keywords are the module's shared ones.

    Raises:
      TypeError, ValueError: subscripts or operands that do not fit, at trace time.

    Example:
      >>> import jax.numpy as jnp
      >>> adder_einsum("...a,hab->...hb", jnp.ones((2, 5, 3)), jnp.ones((4, 3, 6))).shape
      (2, 5, 4, 6)
    """
    x, kernel = _promote(x, kernel)
    dimension_numbers, order = _parse_einsum("adder_einsum", subscripts, x, kernel)
    y = adder_dot_general(
        x,
        kernel,
        dimension_numbers,
        precision,
        preferred_element_type,
        rule=rule,
        implementation=implementation,
    )
    return _reshard(jnp.transpose(y, order), out_sharding)


def euclid_dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: OutSharding = None,
    implementation: Implementation | None = "xla",
) -> Array:
    """``lax.dot_general`` with each product a·b replaced by -(a - b)²; exact gradients.

    Arguments, result and errors are those of `adder_dot_general`, floating-point operands only.
    ``"xla"`` computes 2 a·b - Σa² - Σb², with one ordinary dot product.

    Example:
      >>> import jax.numpy as jnp
      >>> float(euclid_dot_general(jnp.array([1.0, 2.0]), jnp.zeros(2), (((0,), (0,)), ((), ()))))
      -5.0
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    _check_dot("euclid_dot_general", lhs, rhs, dimension_numbers)
    x, kernel, shape = _as_matmul(lhs, rhs, dimension_numbers)
    euclid = _Euclid.of(
        "euclid_dot_general", x, None, implementation, precision, preferred_element_type
    )
    return _reshard(euclid(x, kernel).reshape(shape), out_sharding)


def euclid_conv_general_dilated(
    lhs: ArrayLike,
    rhs: ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    *,
    mask: ArrayLike | None = None,
    implementation: Implementation | None = "xla",
) -> Array:
    """``lax.conv_general_dilated`` with each product a·b replaced by -(a - b)²; exact gradients.

    Arguments, result and errors are those of `adder_conv_general_dilated`, floating-point operands
    only; here too, zeros of padding and input dilation take part.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.full((1, 1, 5), 2.0), jnp.zeros((2, 1, 3))
      >>> euclid_conv_general_dilated(x, kernel, (1,), "VALID")[0, 0].tolist()
      [-12.0, -12.0, -12.0]
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    conv = _Convolution.of(
        "euclid_conv_general_dilated",
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
    )
    euclid = _Euclid.of(
        "euclid_conv_general_dilated",
        lhs,
        conv.spec,
        implementation,
        precision,
        preferred_element_type,
    )
    return _reshard(conv.apply(euclid, lhs, rhs, mask), out_sharding)


def euclid_einsum(
    subscripts: str,
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    implementation: Implementation | None = "xla",
) -> Array:
    """``jnp.einsum`` of two operands with each product a·b replaced by -(a - b)²; exact gradients.

    Subscripts, operands, result and errors are those of `adder_einsum`, floating-point only.

    Example:
      >>> import jax.numpy as jnp
      >>> euclid_einsum("...a,hab->...hb", jnp.ones((2, 5, 3)), jnp.ones((4, 3, 6))).shape
      (2, 5, 4, 6)
    """
    x, kernel = _promote(x, kernel)
    dimension_numbers, order = _parse_einsum("euclid_einsum", subscripts, x, kernel)
    y = euclid_dot_general(
        x,
        kernel,
        dimension_numbers,
        precision,
        preferred_element_type,
        implementation=implementation,
    )
    return _reshard(jnp.transpose(y, order), out_sharding)


def euclid_matmul(
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    implementation: Implementation | None = "xla",
) -> Array:
    """y[..., n] = -Σ_k (x[..., k] - kernel[k, n])², for x (..., K) and kernel (K, N).

    The operands' dtypes are promoted to a common one.

    Example:
      >>> import jax.numpy as jnp
      >>> float(euclid_matmul(jnp.array([1.0, 2.0]), jnp.array([[0.0], [5.0]]))[0])
      -10.0
    """
    x, kernel = _promote(x, kernel)
    return euclid_dot_general(
        x,
        kernel,
        _matmul_dimension_numbers("euclid_matmul", x, kernel),
        precision,
        preferred_element_type,
        out_sharding=out_sharding,
        implementation=implementation,
    )


def euclid_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    *,
    mask: ArrayLike | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    implementation: Implementation | None = "xla",
) -> Array:
    """The Euclid convolution, channels last; arguments and result as in `adder_conv`.

    Example:
      >>> import jax.numpy as jnp
      >>> euclid_conv(jnp.ones((8, 8, 3)), jnp.zeros((3, 3, 3, 16)), padding=0).shape
      (6, 6, 16)
    """
    return _short_conv(
        "euclid_conv",
        functools.partial(euclid_conv_general_dilated, mask=mask, implementation=implementation),
        x,
        kernel,
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        feature_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )


@dataclasses.dataclass(frozen=True)
class _Product:
    """One adder product, complete but for its operands: canonical matmuls if spec is None."""

    name: str
    spec: ConvSpec | None
    rule: GradientRule
    kernels: Kernels
    precision: lax.PrecisionLike
    accumulator: jnp.dtype
    result: jnp.dtype

    @classmethod
    def of(
        cls,
        name: str,
        lhs: Array,
        spec: ConvSpec | None,
        rule: GradientRule,
        implementation: str | None,
        precision: lax.PrecisionLike,
        preferred_element_type: DTypeLike | None,
    ) -> "_Product":
        check_rule(name, rule)
        accumulator, result = _dtypes(name, lhs.dtype, preferred_element_type, integers=True)
        kernels = select(name, implementation, lhs.dtype, spec, accumulator)
        return cls(name, spec, rule, kernels, _precision(precision), accumulator, result)

    def __call__(self, x: Array, w: Array, seen: Array | None = None) -> Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            terms = math.prod(w.shape[1 if self.spec is None else 0 : -1])
            if refusal := limits.overflow(x.dtype, terms=terms):
                raise ValueError(f"{self.name}: {refusal}")
            return self.forward(x, w, seen)
        if seen is None:
            return _differentiable(self, *vary_alike(x, w), None)
        return _differentiable(self, *vary_alike(x, w, seen))

    # Compiled on their own, so that calls outside of jit run one program, not one for each line.
    @functools.partial(jax.jit, static_argnums=0)
    def forward(self, x: Array, w: Array, seen: Array | None) -> Array:
        shape = self._out_shape(x, w)
        if 0 in shape or 0 in w.shape:
            return jnp.zeros(shape, self.result)
        if self.spec is None:
            return self.kernels.matmul(x, w, out_dtype=self.accumulator).astype(self.result)
        x, spec = _with_pixels(x, self.spec)
        if seen is None:
            y = self.kernels.conv(x, w, spec, out_dtype=self.accumulator)
        else:
            y = masked.conv(x, w, seen, spec, out_dtype=self.accumulator)
        return y.astype(self.result)

    @functools.partial(jax.jit, static_argnums=0)
    def dx(self, x: Array, w: Array, seen: Array | None, g: Array) -> Array:
        if 0 in g.shape or 0 in w.shape or 0 in x.shape:
            return jnp.zeros_like(x)
        clip, options = self.rule.x, self._options
        if self.spec is None:
            dx = self.kernels.matmul_dx(x, w, g, clip, **options)
        elif seen is None:
            dx = self.kernels.conv_dx(x, w, g, self.spec, clip, **options)
        else:
            dx = masked.conv_dx(x, w, seen, g, self.spec, clip, out_dtype=self.accumulator)
        return dx.astype(x.dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def dw(self, x: Array, w: Array, seen: Array | None, g: Array) -> Array:
        if 0 in g.shape or 0 in w.shape:
            return jnp.zeros_like(w)
        clip, options = self.rule.kernel, self._options
        if self.spec is None:
            return self.kernels.matmul_dw(x, w, g, clip, **options).astype(w.dtype)
        x, spec = _with_pixels(x, self.spec)
        if seen is None:
            dw = self.kernels.conv_dw(x, w, g, spec, clip, **options)
        else:
            dw = masked.conv_dw(self.kernels, x, w, seen, g, spec, clip, **options)
        return dw.astype(w.dtype)

    @property
    def _options(self) -> dict[str, Any]:
        return {"out_dtype": self.accumulator, "precision": self.precision}

    def _out_shape(self, x: Array, w: Array) -> tuple[int, ...]:
        if self.spec is None:
            return (*x.shape[:2], w.shape[2])
        return (x.shape[0], *self.spec.out_spatial(x.shape[1:-1], w.shape[:-2]), w.shape[-1])


_Residuals = tuple[Array, Array, Array | None]


def _with_pixels(x: Array, spec: ConvSpec) -> tuple[Array, ConvSpec]:
    """An image without pixels as one of zeros with as much less padding: its padding takes part."""
    for axis, size in enumerate(x.shape[1:-1], start=1):
        if size == 0:
            x = jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)
            padding = list(spec.padding)
            low, high = padding[axis - 1]
            padding[axis - 1] = low, high - 1
            spec = dataclasses.replace(spec, padding=tuple(padding))
    return x, spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(product: _Product, x: Array, w: Array, seen: Array | None) -> Array:
    return product.forward(x, w, seen)


def _differentiable_fwd(
    product: _Product, x: Array, w: Array, seen: Array | None
) -> tuple[Array, _Residuals]:
    return product.forward(x, w, seen), (x, w, seen)


def _differentiable_bwd(
    product: _Product, residuals: _Residuals, g: Array
) -> tuple[Array, Array, None]:
    return product.dx(*residuals, g), product.dw(*residuals, g), None


_differentiable.defvjp(_differentiable_fwd, _differentiable_bwd)


_EXACT = GradientRule(x=Clip(2.0, math.inf), kernel=Clip(2.0, math.inf))  # of (x - w)²


@dataclasses.dataclass(frozen=True)
class _Euclid:
    """One Euclid product, complete but for its operands: ``native``, or in JAX's own operations."""

    spec: ConvSpec | None
    precision: lax.PrecisionLike
    accumulator: jnp.dtype
    result: jnp.dtype
    native: _Product | None

    @classmethod
    def of(
        cls,
        name: str,
        lhs: Array,
        spec: ConvSpec | None,
        implementation: str | None,
        precision: lax.PrecisionLike,
        preferred_element_type: DTypeLike | None,
    ) -> "_Euclid":
        accumulator, result = _dtypes(name, lhs.dtype, preferred_element_type, integers=False)
        options = _precision(precision), accumulator, result
        kernels = select_euclid(name, implementation, lhs.dtype, spec, accumulator, options[0])
        native = None if kernels is None else _Product(name, spec, _EXACT, kernels, *options)
        return cls(spec, *options, native)

    def __call__(self, x: Array, w: Array, seen: Array | None = None) -> Array:
        if self.native is not None and seen is None:
            return self.native(x, w)
        options: dict[str, Any] = {"out_dtype": self.accumulator, "precision": self.precision}
        if self.spec is None:
            y = linear.euclid_matmul(x, w, **options)
        elif seen is None:
            y = linear.euclid_conv(x, w, self.spec, **options)
        else:
            y = masked.euclid_conv(x, w, seen, self.spec, **options)
        return y.astype(self.result)


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """How the operands of a convolution are laid out, and what it does with them."""

    spec: ConvSpec
    layout: lax.ConvDimensionNumbers
    batch_group_count: int

    @classmethod
    def of(
        cls,
        name: str,
        lhs: Array,
        rhs: Array,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None,
        rhs_dilation: Sequence[int] | None,
        dimension_numbers: Any,
        feature_group_count: int,
        batch_group_count: int,
    ) -> "_Convolution":
        def multiply(lhs: Array, rhs: Array) -> Array:
            return lax.conv_general_dilated(
                lhs,
                rhs,
                window_strides,
                padding,
                lhs_dilation,
                rhs_dilation,
                dimension_numbers,
                feature_group_count,
                batch_group_count,
            )

        factors = {
            "window_strides": window_strides,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
        }
        for argument, values in factors.items():
            if values is not None and not all(1 <= value <= limits.FACTOR for value in values):
                raise ValueError(
                    f"{name}: {argument} must be positive and at most {limits.FACTOR}, "
                    f"got {tuple(values)}"
                )
        sides = () if isinstance(padding, str) else [side for pair in padding for side in pair]
        if not all(abs(side) <= limits.FACTOR for side in sides):
            raise ValueError(
                f"{name}: padding must be at most {limits.FACTOR} on each side, got {padding}"
            )
        _check_with(multiply, name, lhs, rhs)
        rank = lhs.ndim - 2
        layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        spatial = [lhs.shape[d] for d in layout.lhs_spec[2:]]
        window = [rhs.shape[d] for d in layout.rhs_spec[2:]]
        rhs_dilation = tuple(rhs_dilation or (1,) * rank)
        if isinstance(padding, str):
            spans = [(k - 1) * r + 1 if k else 0 for k, r in zip(window, rhs_dilation, strict=True)]
            padding = lax.padtype_to_pads(spatial, spans, window_strides, padding)
        spec = ConvSpec(
            tuple(int(s) for s in window_strides),
            tuple((int(low), int(high)) for low, high in padding),
            tuple(int(d) for d in lhs_dilation or (1,) * rank),
            tuple(int(d) for d in rhs_dilation),
            feature_group_count * batch_group_count,
        )
        out = spec.out_spatial(spatial, window)
        for size, dilation in (
            *zip(spatial, spec.lhs_dilation, strict=True),
            *zip(window, spec.rhs_dilation, strict=True),
        ):
            if size * dilation > limits.POSITION:
                raise ValueError(
                    f"{name}(lhs {list(lhs.shape)}, rhs {list(rhs.shape)}): {size} values with a "
                    f"dilation of {dilation} are too many"
                )
        elements = math.prod(out) * lhs.shape[layout.lhs_spec[0]] * rhs.shape[layout.rhs_spec[0]]
        # A batch that `jax.export` leaves open compares with nothing.
        if isinstance(elements, int) and elements > limits.POSITION:
            raise ValueError(
                f"{name}(lhs {list(lhs.shape)}, rhs {list(rhs.shape)}): the result's spatial shape "
                f"{out} is too large"
            )
        return cls(spec, layout, batch_group_count)

    def apply(
        self, product: _Product | _Euclid, lhs: Array, rhs: Array, mask: ArrayLike | None
    ) -> Array:
        """The product in the canonical layout, channels last, and back.

        Raises:
          ValueError: a mask that has not the kernel's shape.
        """
        batch, feature, *spatial = self.layout.lhs_spec
        x = jnp.transpose(lhs, (batch, *spatial, feature))
        out, into, *window = self.layout.rhs_spec
        kernel = jnp.transpose(rhs, (*window, into, out))
        if self.batch_group_count > 1:
            x = _batch_groups_to_features(x, self.batch_group_count)
        seen = None
        if mask is not None:
            check_mask(jnp.shape(mask), rhs.shape)
            seen = jnp.transpose(jnp.asarray(mask) != 0, (*window, into, out))
        y = product(x, kernel, seen)
        batch, feature, *spatial = self.layout.out_spec
        return jnp.transpose(y, _inverse((batch, *spatial, feature)))


def check_mask(shape: Sequence[int], kernel_shape: Sequence[int]) -> None:
    """Refuses a convolution's mask that has not the kernel's shape, even if it would broadcast.

    Raises:
      ValueError: with both shapes.
    """
    if tuple(shape) != tuple(kernel_shape):
        raise ValueError(
            f"a convolution's mask must have the kernel's shape {tuple(kernel_shape)}, "
            f"got {tuple(shape)}"
        )


def _batch_groups_to_features(x: Array, groups: int) -> Array:
    """Group i of the batch meets group i of the filters: features of one smaller batch."""
    x = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=lambda d: permutation[d])


def _as_matmul(
    lhs: Array, rhs: Array, dimension_numbers: DotDimensionNumbers
) -> tuple[Array, Array, tuple[int, ...]]:
    """lhs as (B, M, K), rhs as (B, K, N), and the shape that dot_general's result has."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_contract, lhs_batch = ([d % lhs.ndim for d in dims] for dims in (lhs_contract, lhs_batch))
    rhs_contract, rhs_batch = ([d % rhs.ndim for d in dims] for dims in (rhs_contract, rhs_batch))
    lhs_free = [d for d in range(lhs.ndim) if d not in {*lhs_contract, *lhs_batch}]
    rhs_free = [d for d in range(rhs.ndim) if d not in {*rhs_contract, *rhs_batch}]

    def size(array: Array, dims: Sequence[int]) -> int:
        return math.prod(array.shape[d] for d in dims)

    b, m, n = size(lhs, lhs_batch), size(lhs, lhs_free), size(rhs, rhs_free)
    k = size(lhs, lhs_contract)
    x = jnp.transpose(lhs, (*lhs_batch, *lhs_free, *lhs_contract)).reshape(b, m, k)
    kernel = jnp.transpose(rhs, (*rhs_batch, *rhs_contract, *rhs_free)).reshape(b, k, n)
    shape = [lhs.shape[d] for d in (*lhs_batch, *lhs_free)] + [rhs.shape[d] for d in rhs_free]
    return x, kernel, tuple(shape)


def _short_conv(
    name: str,
    convolution: Callable[..., Array],
    x: ArrayLike,
    kernel: ArrayLike,
    strides: int | Sequence[int],
    padding: Padding,
    input_dilation: int | Sequence[int],
    kernel_dilation: int | Sequence[int],
    feature_group_count: int,
    precision: lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
    out_sharding: OutSharding,
) -> Array:
    x, kernel = _promote(x, kernel)
    rank = kernel.ndim - 2
    if rank < 1 or x.ndim < rank + 1:
        raise ValueError(
            f"{name} takes x (..., *spatial, C) and kernel (*window, C / groups, F), "
            f"got shapes {x.shape} and {kernel.shape}"
        )

    def for_each(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * rank if isinstance(value, int) else tuple(value)

    if not isinstance(padding, str):
        sides = (padding,) * rank if isinstance(padding, int) else tuple(padding)
        padding = [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in sides]
    channels_last = (0, rank + 1, *range(1, rank + 1))
    window_first = (rank + 1, rank, *range(rank))
    batch = x.shape[: x.ndim - rank - 1]
    y = convolution(
        x.reshape(math.prod(batch), *x.shape[len(batch) :]),
        kernel,
        for_each(strides),
        padding,
        for_each(input_dilation),
        for_each(kernel_dilation),
        lax.ConvDimensionNumbers(channels_last, window_first, channels_last),
        feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return _reshard(y.reshape(*batch, *y.shape[1:]), out_sharding)


def _matmul_dimension_numbers(name: str, x: Array, kernel: Array) -> DotDimensionNumbers:
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} takes x (..., K) and kernel (K, N), got shapes {x.shape} and {kernel.shape}"
        )
    return (((x.ndim - 1,), (0,)), ((), ()))


def _parse_einsum(
    name: str, subscripts: str, x: Array, kernel: Array
) -> tuple[DotDimensionNumbers, list[int]]:
    """The dot_general that an einsum is, and the order to put its result's dimensions in."""
    given = f"{name}({subscripts!r}, x {list(x.shape)}, kernel {list(kernel.shape)})"
    parts = subscripts.replace(" ", "").replace(",", "->").split("->")
    if len(parts) != 3:
        raise ValueError(f"{given}: subscripts must have the form 'x,kernel->result'")
    ellipsis = "".join(chr(0x100 + d) for d in range(x.ndim - len(parts[0].replace("...", ""))))
    if "..." not in parts[0]:
        ellipsis = ""
    left, right, out = (part.replace("...", ellipsis, 1) for part in parts)
    if "..." in parts[1] or len(left) != x.ndim or len(right) != kernel.ndim:
        raise ValueError(f"{given}: as many letters as dimensions, and '...' in x only")
    summed = [letter for letter in left if letter in right and letter not in out]
    batch = [letter for letter in left if letter in right and letter in out]
    result = (
        batch
        + [letter for letter in left if letter not in right]
        + [letter for letter in right if letter not in left]
    )
    if any(len(set(part)) != len(part) for part in (left, right)) or sorted(out) != sorted(result):
        raise ValueError(
            f"{given}: each letter at most once in an operand, and either in both operands or in "
            "one of them and in the result"
        )
    numbers = tuple(
        ([left.index(letter) for letter in letters], [right.index(letter) for letter in letters])
        for letters in (summed, batch)
    )
    return (numbers[0], numbers[1]), [result.index(letter) for letter in out]


def _promote(x: ArrayLike, kernel: ArrayLike) -> tuple[Array, Array]:
    dtype = jnp.result_type(x, kernel)
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def _check_dot(name: str, lhs: Array, rhs: Array, dimension_numbers: DotDimensionNumbers) -> None:
    _check_with(lambda a, b: lax.dot_general(a, b, dimension_numbers), name, lhs, rhs)


def _check_with(
    multiply: Callable[[Array, Array], Array], name: str, lhs: Array, rhs: Array
) -> None:
    """Refuses what the multiplying product refuses, with its reason."""
    given = f"{name}(lhs {lhs.dtype}{list(lhs.shape)}, rhs {rhs.dtype}{list(rhs.shape)})"
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"{given}: the operands must have the same dtype")
    operands = (jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (lhs, rhs))
    try:
        jax.eval_shape(multiply, *operands)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{given}: {error}") from None


def _dtypes(
    name: str, operand: jnp.dtype, preferred_element_type: DTypeLike | None, *, integers: bool
) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtypes to accumulate in and to return."""
    preferred = operand if preferred_element_type is None else jnp.dtype(preferred_element_type)
    if jnp.issubdtype(operand, jnp.floating) and jnp.issubdtype(preferred, jnp.floating):
        return jnp.promote_types(jnp.promote_types(operand, jnp.float32), preferred), preferred
    if integers and jnp.issubdtype(operand, jnp.integer) and preferred == jnp.int32:
        return preferred, preferred
    allowed = "floating-point operands and preferred_element_type"
    if integers:
        allowed += ", or integer operands and preferred_element_type=jnp.int32"
    raise TypeError(
        f"{name} takes {allowed}, got {operand} and preferred_element_type={preferred_element_type}"
    )


def _precision(precision: lax.PrecisionLike) -> lax.PrecisionLike:
    return lax.Precision.HIGHEST if precision is None else precision


def _reshard(y: Array, out_sharding: OutSharding) -> Array:
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
