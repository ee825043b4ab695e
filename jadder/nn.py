"""Flax NNX layers whose products are adder or Euclid products.

The layers are Flax's own with another product: same arguments, same parameters. What differs by
default is what AdderNet does: kernels start from N(0, 1), and there is no bias, because a
normalisation with a bias follows every adder layer.

Adder kernels are `AdderKernel` variables. ``nnx.state(model, AdderKernel)`` selects them, and
`adder_mask` marks them among the parameters for an optimizer (`jadder.masks` says how).
`jadder.conversion` makes such layers of those of a whole model.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike, PromoteDtypeFn
from jax import Array, lax

from jadder import ops
from jadder.adder_kernels import AdderKernel as AdderKernel
from jadder.adder_kernels import mark_kernel
from jadder.implementations import Implementation
from jadder.masks import adder_mask as adder_mask
from jadder.products import AdderConvGeneralDilated as AdderConvGeneralDilated
from jadder.products import AdderDotGeneral as AdderDotGeneral
from jadder.products import AdderEinsum as AdderEinsum
from jadder.rules import ADDER_VIT, ADDERNET, GradientRule

if TYPE_CHECKING:
    from jadder.conversion import adderize as adderize

_NO_METADATA: Mapping[str, Any] = types.MappingProxyType({})

default_kernel_init = nnx.initializers.normal(stddev=1.0)
default_bias_init = nnx.initializers.zeros_init()


_Arrays = TypeVar("_Arrays", bound=tuple[Any, ...])


def promote_to_float32(arrays: _Arrays, /, *, dtype: Any = None, inexact: bool = True) -> _Arrays:
    """Promotes ``arrays`` to one dtype of at least float32, whatever dtype the result will have.

    As a Flax normalisation's ``promote_dtype``: it then computes in that dtype and rounds to its
    own at the end.
    """
    del dtype
    present = [array.dtype for array in arrays if array is not None]
    wide = jnp.result_type(jnp.float32, *present)
    return dtypes.promote_dtype(arrays, dtype=wide, inexact=inexact)


class AdderLinear(nnx.Linear):
    """``nnx.Linear`` with the adder product: y = -Σ_k |x_k - kernel_k|, plus a bias if asked for.

    Args:
      in_features: the size of the input's last dimension.
      out_features: the size of the output's.
      use_bias: whether to add a bias.
      kernel_init: N(0, 1) by default, as published.
      rule: how the product differentiates.
      implementation: which kernels compute it, as in `jadder.ops`.
      rngs: where the kernel's initial values are drawn from.
      **kwargs: the other arguments of ``nnx.Linear``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> AdderLinear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
      (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = default_kernel_init,
        rule: GradientRule = ADDERNET,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            dot_general=AdderDotGeneral(rule, implementation),
            rngs=rngs,
            **kwargs,
        )
        mark_kernel(self)


class MaskedConv(nnx.Conv):
    """``nnx.Conv`` with a product of distances, which is told the mask.

    Flax multiplies the kernel with the mask. To a distance a zero in the kernel is one like others.
    """

    def __init__(self, *args: Any, mask: Array | None = None, **kwargs: Any) -> None:
        super().__init__(*args, mask=mask, **kwargs)
        if mask is not None:
            ops.check_mask(jnp.shape(mask), self.kernel_shape)

    def __call__(self, inputs: Array, out_sharding: ops.OutSharding = None) -> Array:
        """Applies the convolution to (..., *spatial, in_features)."""
        if self.mask is None:
            return super().__call__(inputs, out_sharding)
        masked = functools.partial(self.conv_general_dilated, mask=self.mask)
        layer: Any = types.SimpleNamespace(**{**vars(self), "conv_general_dilated": masked})
        return nnx.Conv.__call__(layer, inputs, out_sharding)


class AdderConv(MaskedConv):
    """``nnx.Conv`` with the adder product; the zeros of the padding take part in the sums.

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: the window, one number for each spatial dimension.
      strides: as in ``nnx.Conv``.
      use_bias: whether to add a bias.
      kernel_init: N(0, 1) by default, as published.
      rule: how the product differentiates.
      implementation: which kernels compute it, as in `jadder.ops`.
      rngs: where the kernel's initial values are drawn from.
      **kwargs: the other arguments of ``nnx.Conv``. Taps at which ``mask``, of the kernel's shape,
        is 0 take no part in the sums; XLA's loops compute what has a mask, on any platform.

    Raises:
      TypeError, ValueError: a rule, an implementation or a mask that cannot be.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> AdderConv(3, 16, (3, 3), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
      (2, 4, 4, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = default_kernel_init,
        rule: GradientRule = ADDERNET,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            use_bias=use_bias,
            kernel_init=kernel_init,
            conv_general_dilated=AdderConvGeneralDilated(rule, implementation),
            rngs=rngs,
            **kwargs,
        )
        mark_kernel(self)


class _ConvTranspose(nnx.ConvTranspose):
    """``nnx.ConvTranspose`` with a product of one's own, for which Flax has no argument."""

    conv_general_dilated: Callable[..., Array]

    def __init__(self, *args: Any, mask: Array | None = None, **kwargs: Any) -> None:
        super().__init__(*args, mask=mask, **kwargs)
        if mask is not None:
            ops.check_mask(jnp.shape(mask), self.kernel_shape)

    def __call__(self, inputs: Array) -> Array:
        """Applies the transposed convolution to (..., *spatial, in_features)."""
        rank = len(self.kernel_size)
        kernel, mask = self.kernel[...], self.mask
        if mask is not None:
            ops.check_mask(jnp.shape(mask), self.kernel_shape)
            kernel = kernel * mask
        if self.transpose_kernel:
            kernel = _flip(kernel)
            mask = None if mask is None else _flip(mask)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)

        batch = inputs.shape[: inputs.ndim - rank - 1]
        strides = _for_each(self.strides, rank)
        dilation = _for_each(self.kernel_dilation, rank)
        y = self.conv_general_dilated(
            inputs.reshape(-1, *inputs.shape[len(batch) :]),
            kernel,
            (1,) * rank,
            _transpose_padding(self.padding, self.kernel_size, strides, dilation),
            lhs_dilation=strides,
            rhs_dilation=dilation,
            dimension_numbers=_channels_last(rank),
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            **({} if mask is None else {"mask": mask}),
        )
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + _leading(bias, y)


class AdderConvTranspose(_ConvTranspose):
    """``nnx.ConvTranspose`` with the adder product.

    The zeros between the inputs take part in the sums, as |0 - w|. Arguments are those of
    ``nnx.ConvTranspose`` and `AdderConv`; padding ``"CIRCULAR"`` is refused, since it adds parts of
    outputs up, which has no meaning for distances.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = AdderConvTranspose(3, 8, (4, 4), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 5, 3))).shape
      (2, 10, 10, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = default_kernel_init,
        rule: GradientRule = ADDERNET,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            use_bias=use_bias,
            kernel_init=kernel_init,
            rngs=rngs,
            **kwargs,
        )
        self.conv_general_dilated = AdderConvGeneralDilated(rule, implementation)
        mark_kernel(self)


class EuclidLinear(nnx.Linear):
    """``nnx.Linear`` with the Euclid product: y = -Σ_k (x_k - kernel_k)².

    Arguments are those of ``nnx.Linear``, with `AdderLinear`'s defaults.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> EuclidLinear(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
      (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            dot_general=ops.euclid_dot_general,
            rngs=rngs,
            **kwargs,
        )


class EuclidConv(MaskedConv):
    """``nnx.Conv`` with the Euclid product.

    Arguments are those of ``nnx.Conv``, with `AdderConv`'s defaults.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> EuclidConv(3, 16, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((8, 8, 3))).shape
      (8, 8, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            use_bias=use_bias,
            kernel_init=kernel_init,
            conv_general_dilated=ops.euclid_conv_general_dilated,
            rngs=rngs,
            **kwargs,
        )


class EuclidConvTranspose(_ConvTranspose):
    """``nnx.ConvTranspose`` with the Euclid product.

    Arguments are those of ``nnx.ConvTranspose``, with `AdderConvTranspose`'s defaults.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = EuclidConvTranspose(3, 8, (2, 2), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 5, 3))).shape
      (10, 10, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        use_bias: bool = False,
        kernel_init: Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            use_bias=use_bias,
            kernel_init=kernel_init,
            rngs=rngs,
            **kwargs,
        )
        self.conv_general_dilated = ops.euclid_conv_general_dilated


class ScaledAdderLinear(nnx.Module):
    """Adder-ViT's linear layer, F ⊙ ((E ⊙ x) ⊕ W) + b, with ⊕ the adder product.

    The learned scales E, one for each input feature, and F, one for each output feature, let the
    layer weigh features, which a sum of absolute differences cannot do by itself.

    Args:
      in_features: the size of the input's last dimension.
      out_features: the size of the output's.
      use_bias: whether b is there.
      dtype: of the computation; None infers it from the input and the parameters. The product, far
        from zero, is kept in at least float32 until F and b have been applied to it.
      param_dtype: of the parameters.
      precision: of matrix products inside, as in `jadder.ops`.
      kernel_init: of W.
      bias_init: of b.
      promote_dtype: Flax's promotion function, or one's own.
      preferred_element_type: dtype of the result; None: that of the computation.
      rule: how the product differentiates; HardTanh(4d) for the input by default.
      implementation: which kernels compute it, as in `jadder.ops`.
      rngs: where the kernel's initial values are drawn from.
      kernel_metadata: of W's variable, e.g. ``{"out_sharding": (None, "model")}``.
      bias_metadata: of b's.
      input_scale_metadata: of E's.
      output_scale_metadata: of F's.

    Raises:
      TypeError, ValueError: a rule or implementation that there is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = ScaledAdderLinear(3, 4, rngs=nnx.Rngs(0))
      >>> layer.input_scale.shape, layer.output_scale.shape, layer(jnp.ones((2, 3))).shape
      ((3,), (4,), (2, 4))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rule: GradientRule = ADDER_VIT,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        input_scale_metadata: Mapping[str, Any] = _NO_METADATA,
        output_scale_metadata: Mapping[str, Any] = _NO_METADATA,
    ) -> None:
        self.kernel = AdderKernel(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata
        )
        self.input_scale = nnx.Param(jnp.ones(in_features, param_dtype), **input_scale_metadata)
        self.output_scale = nnx.Param(jnp.ones(out_features, param_dtype), **output_scale_metadata)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(
                bias_init(rngs.params(), (out_features,), param_dtype), **bias_metadata
            )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.dot_general = AdderDotGeneral(rule, implementation)

    def __call__(self, inputs: Array, out_sharding: ops.OutSharding = None) -> Array:
        """Applies the layer to (..., in_features)."""
        arrays = (
            inputs,
            self.kernel[...],
            self.input_scale[...],
            self.output_scale[...],
            None if self.bias is None else self.bias[...],
        )
        x, kernel, e, f, bias = self.promote_dtype(arrays, dtype=self.dtype)
        result = self.preferred_element_type or x.dtype
        contract_last = (((x.ndim - 1,), (0,)), ((), ()))
        y = self.dot_general(
            _leading(e, x) * x,
            kernel,
            contract_last,
            precision=self.precision,
            preferred_element_type=jnp.promote_types(result, jnp.float32),
            out_sharding=out_sharding,
        )
        y = _leading(f, y) * y
        y = y if bias is None else y + _leading(bias, y)
        return y.astype(result)


class AdderAttention(nnx.Module):
    """Multi-head attention whose projections are adder products.

    A projection is a `ScaledAdderLinear` followed by a layer norm, unless another is given: adder
    products are sums of one sign, and unnormalised their scores would be far from zero. The sum of
    values, weighted with the softmax of the scores, multiplies.

    Args:
      num_heads: heads that share the features.
      in_features: the size of the input's last dimension.
      qkv_features: the size of queries, keys and values over all heads; default in_features.
      out_features: the size of the output's last dimension; default in_features.
      scores: ``"dot"`` for q·k / √d, ``"adder"`` for -Σ|q - k| / √d, d the size of a head. For the
        latter both operands differentiate with ``rule.x``: neither is a kernel.
      identity: whether each position's own value is added to its sum of values, which keeps the
        rank of the attention map up (Adder Attention, NeurIPS 2021).
      projection: makes a projection from (in_features, out_features, rngs=rngs).
      out_projection: the same for the last projection; default ``projection``.
      dtype: of the default projections' results; None infers it from the input and the parameters.
        Adder products, and scores made of them, are kept in at least float32 until they are
        normalised.
      param_dtype: of the default projections' parameters.
      rule: how adder products differentiate.
      implementation: which kernels compute them, as in `jadder.ops`.
      rngs: where the initial values are drawn from.
      kernel_metadata: of the default projections' kernels, as in ``nnx.MultiHeadAttention``.
      out_kernel_metadata: of the last one's; None: ``kernel_metadata``.
      bias_metadata: of their biases.
      out_bias_metadata: of the last one's; None: ``bias_metadata``.

    Raises:
      ValueError: features that the heads do not divide, an unknown kind of scores, or metadata for
        a projection of one's own.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = AdderAttention(num_heads=2, in_features=8, scores="adder", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 5, 8))).shape
      (4, 5, 8)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        scores: Literal["dot", "adder"] = "dot",
        identity: bool = False,
        projection: Callable[..., nnx.Module] | None = None,
        out_projection: Callable[..., nnx.Module] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rule: GradientRule = ADDER_VIT,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] | None = None,
        out_kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        out_bias_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        qkv_features = in_features if qkv_features is None else qkv_features
        out_features = in_features if out_features is None else out_features
        if num_heads < 1 or qkv_features % num_heads:
            raise ValueError(
                f"AdderAttention: qkv_features ({qkv_features}) must be divisible by "
                f"num_heads ({num_heads})"
            )
        if scores not in ("dot", "adder"):
            raise ValueError(f"AdderAttention: scores must be 'dot' or 'adder', got {scores!r}")

        metadata = {"kernel_metadata": kernel_metadata, "bias_metadata": bias_metadata}
        out_metadata = {
            "kernel_metadata": out_kernel_metadata or kernel_metadata,
            "bias_metadata": out_bias_metadata or bias_metadata,
        }
        if projection is not None and any({**metadata, **out_metadata}.values()):
            raise ValueError(
                "AdderAttention: metadata is for the default projections; give it to those that "
                "`projection` makes"
            )

        def normalized(metadata: Mapping[str, Any]) -> Callable[..., nnx.Module]:
            return functools.partial(
                _normalized_projection,
                dtype=dtype,
                param_dtype=param_dtype,
                rule=rule,
                implementation=implementation,
                **{name: given for name, given in metadata.items() if given},
            )

        make = normalized(metadata) if projection is None else projection
        make_out = normalized(out_metadata) if projection is None else projection
        make_out = make_out if out_projection is None else out_projection
        self.query = make(in_features, qkv_features, rngs=rngs)
        self.key = make(in_features, qkv_features, rngs=rngs)
        self.value = make(in_features, qkv_features, rngs=rngs)
        self.out = make_out(qkv_features, out_features, rngs=rngs)
        self.num_heads = num_heads
        self.scores = scores
        self.identity = identity
        self.score_product = AdderDotGeneral(GradientRule(rule.x, rule.x), implementation)

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        bias: Array | None = None,
        sow_weights: bool = False,
    ) -> Array:
        """Attends from (..., queries, features) to (..., keys, features).

        Args:
          inputs_q: what queries are projected from.
          inputs_k: what keys are projected from; default inputs_q.
          inputs_v: what values are projected from; default inputs_k.
          mask: broadcastable to (..., num_heads, queries, keys); False where not to look.
          bias: broadcastable to the same; added to the scores.
          sow_weights: whether to sow the attention map as ``attention_weights``, for
            ``nnx.capture(layer, nnx.Intermediate)``.
        """
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query, key, value = (
            self._heads(project(inputs))
            for project, inputs in (
                (self.query, inputs_q),
                (self.key, inputs_k),
                (self.value, inputs_v),
            )
        )
        logits = self._logits(query, key)
        if bias is not None:
            logits = logits + _with_rank(bias, logits.ndim)
        if mask is not None:
            logits = jnp.where(_with_rank(mask, logits.ndim), logits, jnp.finfo(logits.dtype).min)
        dtype = query.dtype if bias is None else jnp.result_type(query, bias)
        weights = jax.nn.softmax(logits).astype(dtype)
        if sow_weights:
            self.sow(nnx.Intermediate, "attention_weights", weights)
        mixed = weights @ value
        if self.identity:
            if mixed.shape != value.shape:
                raise ValueError(
                    "AdderAttention: identity=True needs as many queries as values, got "
                    f"{mixed.shape[-2]} and {value.shape[-2]}"
                )
            mixed = mixed + value
        mixed = jnp.swapaxes(mixed, -3, -2)
        return self.out(mixed.reshape(*mixed.shape[:-2], -1))

    def _heads(self, projected: Array) -> Array:
        """(..., length, features) as (..., heads, length, features of a head)."""
        split = projected.reshape(*projected.shape[:-1], self.num_heads, -1)
        return jnp.swapaxes(split, -3, -2)

    def _logits(self, query: Array, key: Array) -> Array:
        scale = query.shape[-1] ** -0.5
        if self.scores == "dot":
            return scale * (query @ jnp.swapaxes(key, -1, -2))
        batch = tuple(range(query.ndim - 2))
        last = query.ndim - 1
        numbers = (((last,), (last,)), (batch, batch))
        wide = jnp.promote_types(query.dtype, jnp.float32)
        return scale * self.score_product(query, key, numbers, preferred_element_type=wide)


def _normalized_projection(
    into: int,
    out: int,
    *,
    dtype: Dtype | None,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """A `ScaledAdderLinear`, which hands on at least float32, and a layer norm that rounds it."""
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    wide = None if dtype is None else jnp.promote_types(dtype, jnp.float32)
    promote = dtypes.promote_dtype if dtype is None else promote_to_float32
    return nnx.Sequential(
        ScaledAdderLinear(into, out, preferred_element_type=wide, **types, **options),
        # E[x²] - E[x]², Flax's fast variance, has no digits left so far from zero.
        nnx.LayerNorm(out, use_fast_variance=False, promote_dtype=promote, **types),
    )


def _flip(kernel: Array) -> Array:
    """A kernel as its transposed convolution has it: window flipped, channels swapped."""
    return jnp.swapaxes(jnp.flip(kernel, range(kernel.ndim - 2)), -1, -2)


def _with_rank(array: Array, rank: int) -> Array:
    return jnp.reshape(array, (1,) * (rank - jnp.ndim(array)) + jnp.shape(array))


def _leading(vector: Array, y: Array) -> Array:
    """A vector of features with y's rank, which JAX may be told not to promote."""
    return vector.reshape((1,) * (y.ndim - 1) + (-1,))


def _for_each(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    last = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)


def _transpose_padding(
    padding: PaddingLike, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """The padding of the dilated input that ``lax.conv_transpose`` gives these words."""
    spans = [(size - 1) * d + 1 for size, d in zip(window, dilation, strict=True)]
    if isinstance(padding, int):
        return [(padding, padding)] * len(spans)
    if not isinstance(padding, str):
        return [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in padding]
    pads = []
    for span, stride in zip(spans, strides, strict=True):
        if padding == "SAME":
            total = span + stride - 2
            low = span - 1 if stride > span - 1 else -(-total // 2)
        elif padding == "VALID":
            total = span + stride - 2 + max(span - stride, 0)
            low = span - 1
        else:
            raise ValueError(
                "a transposed convolution with this product takes padding 'SAME', 'VALID', numbers "
                f"or pairs, got {padding!r}"
            )
        pads.append((low, total - low))
    return pads


def __getattr__(name: str) -> Any:
    # `adderize` is built on models, which are built on this module.
    if name == "adderize":
        from jadder.conversion import adderize

        return adderize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
