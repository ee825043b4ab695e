"""Running an integer program: which implementation, and compiled once."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jadder.integer import native, xla
from jadder.integer.program import IntegerProgram

Implementation = Literal["cpu", "xla"]


def run(
    program: IntegerProgram, images: Any, implementation: Implementation | None = None
) -> Array:
    """The int32 outputs of images on the program's grid, equal to the last bit everywhere.

    It can be called inside of ``jax.jit``, ``jax.vmap`` and ``jax.export``, and images that are
    sharded by batch are computed where they are. By itself it compiles once for each batch size.

    Args:
      program: the network.
      images: uint8 (batch, *program.input.shape); any number of batch dimensions.
      implementation: "cpu" for one call of native code, "xla" for JAX's operations, or None for
        native code where the program is lowered for a CPU that has it, JAX's operations elsewhere.

    Returns:
      int32 (batch, *program.output.shape).

    Raises:
      TypeError: images that are not uint8.
      ValueError: images of another shape, or an implementation that cannot run the program.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {get_args(Implementation)}, "
            f"got {implementation!r}"
        )
    images = _array(images)
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim < 3 or images.shape[-3:] != program.input.shape:
        raise ValueError(
            f"images of shape (batch, *{program.input.shape}) expected, got {images.shape}"
        )
    make = functools.partial(_function, program, implementation)
    result: Array = _compiled(program, implementation, make)(images)
    return result


def logits(program: IntegerProgram, images: Any) -> Array:
    """``program(images)``, which see, compiled as one function."""
    result: Array = _compiled(
        program, "logits", lambda: functools.partial(_logits, _bare(program))
    )(_array(images))
    return result


def _logits(program: IntegerProgram, images: Array) -> Array:
    floats = _function(program, None, in_floats=True)(program.to_integers(images))
    height, width, channels = program.output.shape
    return floats.reshape(-1, channels) if height == width == 1 else floats


def _array(images: Any) -> Any:
    """What `jax.jit` takes as an array; NumPy's go there as they are, which is quicker."""
    return images if isinstance(images, jax.Array | np.ndarray) else jnp.asarray(images)


# -- Compiled programs -----------------------------------------------------------------------------


class _Compiled:
    """What has been compiled for a program, kept with it. Copies and pickles begin anew."""

    def __init__(self) -> None:
        self.functions: dict[str | None, Callable[[Array], Array]] = {}

    def __reduce__(self) -> Any:
        return _Compiled, ()


def _compiled(
    program: IntegerProgram, name: str | None, make: Callable[[], Callable[[Array], Array]]
) -> Callable[[Array], Array]:
    kept: _Compiled = vars(program).setdefault("_compiled", _Compiled())
    if name not in kept.functions:
        kept.functions[name] = jax.jit(make())
    return kept.functions[name]


def _bare(program: IntegerProgram) -> IntegerProgram:
    """The same without what has been compiled for it.

    JAX's caches hold what a compiled function refers to, and the program holds the function.
    """
    bare = copy.copy(program)
    vars(bare).pop("_compiled", None)
    return bare


def _function(
    program: IntegerProgram, implementation: Implementation | None, *, in_floats: bool = False
) -> Callable[[Array], Array]:
    scale = float(np.float32(program.output.scale[0])) if in_floats else None
    if implementation == "xla":
        return functools.partial(_portable, _bare(program), scale)
    refusal = native.unavailable() or native.unsupported(program)
    if refusal is not None and implementation == "cpu":
        raise ValueError(f"implementation='cpu' cannot be used: {refusal}")
    if refusal is not None:
        return functools.partial(_portable, _bare(program), scale)
    native_only = implementation == "cpu"
    network = _Network(native.serialize(program), _bare(program), native_only, scale)
    return functools.partial(_network_p.bind, network=network)


def _portable(program: IntegerProgram, scale: float | None, images: Array) -> Array:
    batch = images.shape[:-3]
    outputs = xla.run(program, images.reshape(-1, *program.input.shape))
    if scale is not None:
        outputs = outputs.astype(jnp.float32) * np.float32(scale)
    return outputs.reshape(*batch, *program.output.shape)


# -- The primitive ---------------------------------------------------------------------------------
#
# How a program runs is decided when it is lowered, for each platform. For the CPU it is one foreign
# call, with a rule for JAX's partitioner: every dimension of the batch may be sharded.


@dataclasses.dataclass(frozen=True)
class _Network:
    """What is run: outputs are int32, or float32 and times ``scale`` where that is not None."""

    serialized: bytes
    program: IntegerProgram = dataclasses.field(compare=False, repr=False)
    native_only: bool
    scale: float | None


_network_p = Primitive("integer_program")


def _output_type(images: ShapedArray, *, network: _Network) -> ShapedArray:
    batch = images.shape[:-3]
    spec = (*images.sharding.spec, *[None] * images.ndim)[: images.ndim]
    if any(spec[-3:]):
        raise ValueError(f"only the batch of images can be sharded, got {images.sharding.spec}")
    sharding = NamedSharding(images.sharding.mesh, PartitionSpec(*spec))
    return images.update(
        shape=(*batch, *network.program.output.shape),
        dtype=np.dtype(np.int32 if network.scale is None else np.float32),
        weak_type=False,
        sharding=sharding,
    )


def _map(operands: Sequence[Array], axes: Sequence[int], *, network: _Network) -> tuple[Array, int]:
    """`jax.vmap`: one more dimension of the batch."""
    return _network_p.bind(jnp.moveaxis(operands[0], axes[0], 0), network=network), 0


def _lower_native(context: mlir.LoweringRuleContext, images: Any, *, network: _Network) -> Any:
    shapes = [aval.shape for aval in (*context.avals_in, *context.avals_out)]
    axes, attributes = context.module_context.axis_context, {}
    several = isinstance(axes, mlir.ShardingContext) and axes.num_devices > 1
    if several and all(isinstance(size, int) for shape in shapes for size in shape):
        batch_dimensions: dict[str, ir.Attribute] = {
            "num_batch_dims": ir.StringAttr.get(str(len(shapes[0]) - 3))
        }
        attributes = {
            "sdy.sharding_rule": ir.Attribute.parse(_sharding_rule(*shapes)),
            "mhlo.frontend_attributes": ir.DictAttr.get(batch_dimensions),
        }
    call = jax.ffi.ffi_lowering(native.TARGET, extra_attributes=attributes)
    scale = {} if network.scale is None else {"scale": np.float32(network.scale)}
    return call(context, images, program=native.attribute(network.serialized), **scale)


def _sharding_rule(images: Sequence[int], outputs: Sequence[int]) -> str:
    """For Shardy: the dimensions of the batch are shared, all others are their own."""
    batch = len(images) - 3
    letters = "ijklmnopqrstuvwxyz"  # as it names factors
    names = [*letters, *(f"z_{i}" for i in range(1, batch))][: batch + 6]
    sizes = (*images, *outputs[batch:])
    lists = names[: batch + 3], [*names[:batch], *names[batch + 3 :]]
    given, made = ("[" + ", ".join(each) + "]" for each in lists)
    factors = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    whole = ", ".join(names[batch:])
    return (
        f"#sdy.op_sharding_rule<({given})->({made}) {{{factors}}} "
        f"need_replication={{{whole}}}, custom>"
    )


def _lower_portable(context: mlir.LoweringRuleContext, images: Any, *, network: _Network) -> Any:
    if network.native_only:
        platforms = context.platforms or context.module_context.platforms
        raise ValueError(f"implementation='cpu' cannot be used: lowered for {platforms}")
    portable = functools.partial(_portable, network.program, network.scale)
    return mlir.lower_fun(portable, multiple_results=False)(context, images)


def _compute(images: Array, *, network: _Network) -> Array:
    return jax.jit(functools.partial(_network_p.bind, network=network))(images)


_network_p.def_impl(_compute)
_network_p.def_abstract_eval(_output_type)
batching.primitive_batchers[_network_p] = _map
mlir.register_lowering(_network_p, _lower_portable)
mlir.register_lowering(_network_p, _lower_native, platform="cpu")
