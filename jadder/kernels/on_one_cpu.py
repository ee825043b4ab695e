"""Functions of arrays that native code computes in programs for one CPU, and JAX everywhere else.

Such a function is one JAX primitive, whose derivatives, batches and sharded forms are those of the
formula: what can be done with it does not depend on where it runs. The native form stands in a
program that is lowered for the CPU alone and for one device of it. It never stands in an exported
program, which therefore runs anywhere, without jadder; nor under `jax.vmap`, nor in one whose
operations are counted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jadder.kernels import cpu
from jadder.kernels.partitioned import explicit_mesh, lowered_literally

Results = tuple[Array, ...]


class OnOneCpu:
    """``formula``, or ``native`` in its stead where a program is lowered for one CPU.

    Args:
      name: of the primitive.
      formula: a function of arrays, and of hashable keyword arguments, to a tuple of arrays.
      native: the same in native code, for float32 and at least one value of the first operand;
        None: there is none.
      like: for each result the position of an operand of its type.
    """

    def __init__(
        self,
        name: str,
        formula: Callable[..., Results],
        native: Callable[..., Results] | None,
        like: tuple[int, ...],
    ) -> None:
        self.formula, self.native, self.like = formula, native, like
        self.primitive = Primitive(name)
        self.primitive.multiple_results = True
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self._types)
        ad.primitive_jvps[self.primitive] = self._differentiate
        ad.primitive_transposes[self.primitive] = self._transpose
        batching.primitive_batchers[self.primitive] = self._map
        mlir.register_lowering(self.primitive, self._lower)

    def __call__(self, *operands: Array, **options: Any) -> Results:
        """The results; the formula's operations where the operands' types say how to place them."""
        if not _may_be_native(operands):
            return self.formula(*operands, **options)
        return tuple(self.primitive.bind(*operands, **options))

    def transposed_by(self, other: "OnOneCpu", linear: int) -> None:
        """Says that the last ``linear`` operands are taken linearly, and what the transpose is.

        Args:
          other: a function of the other operands and then of the results' cotangents.
          linear: how many there are; each has a cotangent among the results of ``other``.
        """

        def transpose(cotangents: Sequence[Any], *operands: Any, **options: Any) -> list[Any]:
            known, moving = operands[:-linear], operands[-linear:]
            pulled = other(*known, *map(ad.instantiate_zeros, cotangents), **options)
            given = [ad.is_undefined_primal(each) for each in moving]
            pairs = zip(pulled, given, strict=True)
            return [None] * len(known) + [each if mine else None for each, mine in pairs]

        ad.primitive_transposes[self.primitive] = transpose

    def _run(self, *operands: Array, **options: Any) -> Sequence[Array]:
        with jax.disable_jit(False):
            return _compiled(self.primitive, tuple(options.items()))(*operands)

    def _types(self, *operands: ShapedArray, **_: Any) -> list[ShapedArray]:
        return [operands[i].update(weak_type=False) for i in self.like]

    def _differentiate(
        self, primals: Sequence[Array], tangents: Sequence[Any], **options: Any
    ) -> tuple[Results, Results]:
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

        def of_moving(*values: Array) -> Results:
            given = list(primals)
            for i, value in zip(moving, values, strict=True):
                given[i] = value
            return self.formula(*given, **options)

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])

    def _transpose(
        self, cotangents: Sequence[Any], *operands: Any, **options: Any
    ) -> list[Array | None]:
        moving = [i for i, each in enumerate(operands) if ad.is_undefined_primal(each)]

        def of_moving(*values: Array) -> Results:
            given = list(operands)
            for i, value in zip(moving, values, strict=True):
                given[i] = value
            return self.formula(*given, **options)

        types = [
            jax.ShapeDtypeStruct(operands[i].aval.shape, operands[i].aval.dtype) for i in moving
        ]
        pulled = jax.linear_transpose(of_moving, *types)(
            tuple(map(ad.instantiate_zeros, cotangents))
        )
        results: list[Array | None] = [None] * len(operands)
        for i, value in zip(moving, pulled, strict=True):
            results[i] = value
        return results

    def _map(
        self, operands: Sequence[Array], dimensions: Sequence[int | None], **options: Any
    ) -> tuple[Results, tuple[int, ...]]:
        formula = functools.partial(self.formula, **options)
        mapped = jax.vmap(formula, in_axes=tuple(dimensions))(*operands)
        return mapped, (0,) * len(mapped)

    def _lower(self, context: mlir.LoweringRuleContext, *operands: Any, **options: Any) -> Any:
        chosen = self.formula
        if self.native is not None and _is_for_one_cpu(context):
            chosen = self.native
        compute = functools.partial(chosen, **options)
        return mlir.lower_fun(compute, multiple_results=True)(context, *operands)


@functools.lru_cache(maxsize=1024)
def _compiled(primitive: Primitive, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(primitive.bind, **dict(options)))


def _may_be_native(operands: Sequence[Array]) -> bool:
    """Whether there is native code for such operands, and their types leave their place open."""
    types = [jax.typeof(each) for each in operands]
    return (
        all(each.dtype == jax.numpy.float32 for each in types)
        and explicit_mesh(types) is None
        and not jax.sharding.get_abstract_mesh().manual_axes
        and cpu.unavailable() is None
    )


def _is_for_one_cpu(context: mlir.LoweringRuleContext) -> bool:
    module, (x, *_) = context.module_context, cast(Sequence[ShapedArray], context.avals_in)
    axes = module.axis_context
    return (
        tuple(module.platforms) == ("cpu",)
        and isinstance(axes, mlir.ShardingContext)
        and axes.num_devices == 1
        and not module.lowering_parameters.for_export
        and not lowered_literally.value
        and 0 not in x.shape
    )
