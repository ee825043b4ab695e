"""Flax NNX layers whose products are adder or Euclid products, and `adderize` for whole models.

The layers are Flax's own with another product: same arguments, same parameters. What differs by
default is what AdderNet does: kernels start from N(0, 1), and there is no bias, because a
normalisation with a bias follows every adder layer.

Adder kernels are `AdderKernel` variables. ``nnx.state(model, AdderKernel)`` selects them, and
`adder_mask` marks them among the parameters for an optimizer (`jadder.masks` says how).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike, PromoteDtypeFn
from jax import Array, lax

from jadder import ops
from jadder.adder_kernels import AdderKernel as AdderKernel
from jadder.adder_kernels import AdderOperator, mark_kernel
from jadder.implementations import Implementation
from jadder.masks import adder_mask as adder_mask
from jadder.rules import ADDER_VIT, ADDERNET, GradientRule

Where = Callable[[tuple[Any, ...], nnx.Module], bool]

default_kernel_init = nnx.initializers.normal(stddev=1.0)
default_bias_init = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class AdderDotGeneral(AdderOperator):
    """`jadder.ops.adder_dot_general` with its rule and implementation, for ``nnx.Linear``.

    Unlike a ``functools.partial``, two of these with the same fields are equal, so a model whose
    layers have one each compiles once.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Linear(3, 4, dot_general=AdderDotGeneral(), rngs=nnx.Rngs(0))
    """

    rule: GradientRule = ADDERNET
    implementation: Implementation | None = None

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        kwargs |= {"rule": self.rule, "implementation": self.implementation}
        return ops.adder_dot_general(lhs, rhs, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class AdderConvGeneralDilated(AdderOperator):
    """`jadder.ops.adder_conv_general_dilated` with its rule and implementation, for ``nnx.Conv``.

    Example:
      >>> from flax import nnx
      >>> conv = AdderConvGeneralDilated(implementation="xla")
      >>> layer = nnx.Conv(3, 4, (3, 3), conv_general_dilated=conv, rngs=nnx.Rngs(0))
    """

    rule: GradientRule = ADDERNET
    implementation: Implementation | None = None

    def __call__(self, lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
        kwargs |= {"rule": self.rule, "implementation": self.implementation}
        return ops.adder_conv_general_dilated(lhs, rhs, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class AdderEinsum(AdderOperator):
    """`jadder.ops.adder_einsum` with its rule and implementation, for ``nnx.Einsum``.

    Example:
      >>> from flax import nnx
      >>> layer = nnx.Einsum("nta,ab->ntb", (2, 4), einsum_op=AdderEinsum(), rngs=nnx.Rngs(0))
    """

    rule: GradientRule = ADDERNET
    implementation: Implementation | None = None

    def __call__(self, subscripts: str, x: Array, kernel: Array, **kwargs: Any) -> Array:
        kwargs |= {"rule": self.rule, "implementation": self.implementation}
        return ops.adder_einsum(subscripts, x, kernel, **kwargs)


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


class AdderConv(nnx.Conv):
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
      **kwargs: the other arguments of ``nnx.Conv``.

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

    def __call__(self, inputs: Array) -> Array:
        """Applies the transposed convolution to (..., *spatial, in_features)."""
        rank = len(self.kernel_size)
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        if self.transpose_kernel:
            kernel = jnp.swapaxes(jnp.flip(kernel, range(rank)), -1, -2)
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
        )
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + bias


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


class EuclidConv(nnx.Conv):
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
      dtype: of the computation; None infers it from the input and the parameters.
      param_dtype: of the parameters.
      precision: of matrix products inside, as in `jadder.ops`.
      kernel_init: of W.
      bias_init: of b.
      promote_dtype: Flax's promotion function, or one's own.
      preferred_element_type: dtype of the product, and so of the result.
      rule: how the product differentiates; HardTanh(4d) for the input by default.
      implementation: which kernels compute it, as in `jadder.ops`.
      rngs: where the kernel's initial values are drawn from.

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
    ) -> None:
        self.kernel = AdderKernel(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        )
        self.input_scale = nnx.Param(jnp.ones(in_features, param_dtype))
        self.output_scale = nnx.Param(jnp.ones(out_features, param_dtype))
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
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
        contract_last = (((x.ndim - 1,), (0,)), ((), ()))
        y = f * self.dot_general(
            e * x,
            kernel,
            contract_last,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
        )
        return y if bias is None else y + bias


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
      dtype: of the default projections; None infers it from the input and the parameters.
      param_dtype: of the default projections' parameters.
      rule: how adder products differentiate.
      implementation: which kernels compute them, as in `jadder.ops`.
      rngs: where the initial values are drawn from.

    Raises:
      ValueError: features that the heads do not divide, or an unknown kind of scores.

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

        def normalized(into: int, out: int, *, rngs: nnx.Rngs) -> nnx.Module:
            return nnx.Sequential(
                ScaledAdderLinear(
                    into,
                    out,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rule=rule,
                    implementation=implementation,
                    rngs=rngs,
                ),
                # E[x²] - E[x]², Flax's fast variance, has no digits left so far from zero.
                nnx.LayerNorm(
                    out,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    use_fast_variance=False,
                    rngs=rngs,
                ),
            )

        make = normalized if projection is None else projection
        make_out = make if out_projection is None else out_projection
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
            logits = logits + bias
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits)
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
        return scale * self.score_product(query, key, (((last,), (last,)), (batch, batch)))


def adderize(
    model: nnx.Module,
    where: Where | None = None,
    *,
    rule: GradientRule = ADDERNET,
    implementation: Implementation | None = None,
    kernel_init: Initializer | None = None,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """A copy of ``model`` whose products are adder products.

    ``nnx.Linear``, ``LinearGeneral``, ``Einsum``, ``Conv``, ``ConvTranspose`` and everything made
    of them (``nnx.MultiHeadAttention``'s projections, recurrent cells) change; so do subclasses
    that keep Flax's ``__call__``. Parameters, biases and the rest of the model stay. An adder
    network needs a normalisation after each product to train, and its kernels want to be of the
    inputs' size: to train the copy from scratch, give ``kernel_init`` and ``rngs``.

    Args:
      model: any NNX module; it is not changed.
      where: ``where(path, layer)`` says whether a layer changes; default every layer.
      rule: how the products differentiate.
      implementation: which kernels compute them, as in `jadder.ops`.
      kernel_init: draws new kernels for the layers that change, in their dtype; default keep them.
      rngs: what ``kernel_init`` draws from.

    Raises:
      ValueError: no layer would change, ``kernel_init`` without ``rngs``, or a layer that has no
        adder form.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> mlp = nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs))
      >>> half = adderize(mlp, lambda path, layer: layer.out_features > 1)
      >>> [type(layer.kernel).__name__ for layer in half.layers]
      ['AdderKernel', 'Param']
    """
    if kernel_init is not None and rngs is None:
        raise ValueError("adderize: kernel_init needs rngs to draw from")
    model = nnx.clone(model)
    products: dict[type[nnx.Module], tuple[str, Any]] = {
        nnx.Linear: ("dot_general", AdderDotGeneral(rule, implementation)),
        nnx.LinearGeneral: ("dot_general", AdderDotGeneral(rule, implementation)),
        nnx.Einsum: ("einsum_op", AdderEinsum(rule, implementation)),
        nnx.Conv: ("conv_general_dilated", AdderConvGeneralDilated(rule, implementation)),
        nnx.ConvTranspose: ("conv_general_dilated", AdderConvGeneralDilated(rule, implementation)),
    }
    changed = 0
    modules: list[tuple[tuple[Any, ...], Any]] = list(nnx.iter_modules(model))
    for path, layer in modules:
        kind = next((kind for kind in products if isinstance(layer, kind)), None)
        if kind is None or not (where is None or where(path, layer)):
            continue
        if kind is nnx.ConvTranspose and not isinstance(layer, _ConvTranspose):
            _give_product_to(path, layer)
        if getattr(layer, "dot_general_cls", None) is not None:
            layer.dot_general_cls = None
        name, product = products[kind]
        setattr(layer, name, product)
        if kernel_init is not None and rngs is not None:
            old = layer.kernel[...]
            layer.kernel[...] = kernel_init(rngs.params(), old.shape, old.dtype)
        mark_kernel(layer)
        changed += 1
    if not changed:
        raise ValueError("adderize: no product of the model was selected; nothing to change")
    return model


def _give_product_to(path: Sequence[Any], layer: nnx.ConvTranspose) -> None:
    if type(layer) is not nnx.ConvTranspose:
        raise ValueError(
            f"adderize: {type(layer).__name__} at {'/'.join(map(str, path))} is a subclass of "
            "nnx.ConvTranspose, whose product cannot be replaced; leave it out with `where`"
        )
    object.__setattr__(layer, "__class__", AdderConvTranspose)


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
