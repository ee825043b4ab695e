"""Any implementation of the products, on many devices: each computes the blocks that it holds.

XLA's partitioner sees a foreign call, or a loop that cuts its operands into slices, as a whole:
where an operand is sharded, it gathers it. Here the six functions are one JAX primitive, and it is
decided when a program is lowered how the primitive is computed:

- by the kernels as they are, on one device;
- where JAX's partitioner places the operands (automatic mesh axes), by the kernels on blocks, told
  to the partitioner with ``custom_partitioning``;
- where the operands' types say how they are sharded (explicit mesh axes), in a ``jax.shard_map``.

Inside of the caller's own ``jax.shard_map`` there is no primitive: the blocks are at hand. Where
JAX has no custom partitioning, the kernels are used as they are, and XLA gathers what it must:
in a program that is exported for many devices, or lowered for another platform, for several of
them, or for more devices than there are; under GSPMD; and on TPU, whose compiler refuses it.
`jadder.kernels.layout` says which indices of a product are shared out, and when.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from jadder.kernels import reference, xla
from jadder.kernels.by_platform import ByPlatform
from jadder.kernels.interface import ByName, Kernels
from jadder.kernels.layout import (
    Dimensions,
    Layout,
    Plan,
    Sharding,
    gradient_of,
    name_axes,
    plan,
)
from jadder.kernels.varying import vary_alike


@dataclasses.dataclass(frozen=True)
class Partitioned(ByName):
    """``kernels``, each device computing with its blocks of sharded operands.

    Attributes:
      kernels: of the six functions.
      formula: what they compute, in operations that JAX has; None: the adder product.
    """

    kernels: Kernels
    formula: Kernels | None = None

    def _call(self, function: str, *operands: Array, **options: Any) -> Array:
        wide = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        product = Product(
            self.kernels, function, tuple(options.items()), wide, formula=self.formula
        )
        if jax.sharding.get_abstract_mesh().manual_axes:
            return product(*operands)
        return _product_p.bind(*operands, product=product)


@dataclasses.dataclass(frozen=True)
class Product:
    """One of the six functions, complete but for its operands.

    Attributes:
      wide: whether 64-bit types are enabled. The kernels may be traced later, and elsewhere.
      mapped: for each `jax.vmap` around it, the outermost first, which operands it maps over their
        leading dimension.
      formula: as in `Partitioned`.
    """

    kernels: Kernels
    function: str
    options: tuple[tuple[str, Any], ...]
    wide: bool
    mapped: tuple[tuple[bool, ...], ...] = ()
    formula: Kernels | None = None

    def __call__(self, *operands: Array) -> Array:
        """The result of operands of which this device holds all, or whole blocks."""
        product = self._unmapped
        for mapped in reversed(self.mapped):
            product = jax.vmap(product, [0 if each else None for each in mapped])
        with jax.enable_x64(self.wide):
            return product(*operands)

    def _unmapped(self, *operands: Array) -> Array:
        return getattr(self.kernels, self.function)(*operands, **dict(self.options))

    def on(self, platform: str) -> "Product":
        """The same for one platform."""
        if not isinstance(self.kernels, ByPlatform):
            return self
        return dataclasses.replace(self, kernels=self.kernels.on(platform))

    def of_groups(self, parts: int) -> "Product":
        """The product of operands that have one of ``parts`` of a convolution's groups."""
        if parts == 1:
            return self
        options = dict(self.options)
        groups = options["spec"].feature_group_count // parts
        options["spec"] = dataclasses.replace(options["spec"], feature_group_count=groups)
        return dataclasses.replace(self, options=tuple(options.items()))

    def literal(self) -> "Product":
        """The same function by its formula, in operations that JAX has."""
        if self.formula is not None:
            return dataclasses.replace(self, kernels=self.formula)
        clip = dict(self.options).get("clip")
        factors = clip is not None and clip.is_linear
        return dataclasses.replace(self, kernels=xla if factors else reference)

    @property
    def is_adder(self) -> bool:
        """Whether it is a sum of absolute differences, or a gradient of one."""
        return self.formula is None

    def layout(self, operands: Sequence[Any]) -> Layout:
        """Of operands that have shapes."""
        spec = dict(self.options).get("spec")
        return Layout.of(self.function, spec, self.mapped, [each.shape for each in operands])


def _on_blocks(product: Product, plan: Plan, mesh: Mesh | AbstractMesh) -> Callable[..., Array]:
    """A function from each device's blocks of the operands to its block of the result."""
    product = product.of_groups(math.prod(mesh.shape[axis] for axis in plan.axes.get("g", ())))

    def on_blocks(*operands: Array) -> Array:
        result = product(*vary_alike(*operands))
        return lax.psum(result, plan.summed) if plan.summed else result

    return on_blocks


# -- The primitive ---------------------------------------------------------------------------------

lowered_literally = cast(Any, jax).make_user_context(False)
"""A context in which programs are lowered with each product's formula, for XLA to count."""

_product_p = Primitive("adder_product")


def _compute(product: Product, *operands: Array) -> Array:
    """Without the primitive, as far as the operands' types say how."""
    mesh = explicit_mesh([jax.typeof(each) for each in operands])
    return product(*operands) if mesh is None else _on_explicit_axes(product, mesh)(*operands)


def _result_type(*operands: ShapedArray, product: Product) -> ShapedArray:
    layout = product.layout(operands)
    mesh = explicit_mesh(operands)
    sharding: Sharding = () if mesh is None else _explicit_plan(product, mesh, operands)[1]
    return operands[0].update(
        shape=layout.shape(layout.result),
        dtype=jax.dtypes.canonicalize_dtype(dict(product.options)["out_dtype"]),
        weak_type=False,
        sharding=_named(mesh or jax.sharding.get_abstract_mesh(), sharding),
    )


def _map(
    operands: Sequence[Array], dimensions: Sequence[int | None], *, product: Product
) -> tuple[Array, int]:
    """`jax.vmap`: a mapped dimension is one more index, which may be sharded as others are."""
    moved = [
        each if d is None else jax.numpy.moveaxis(each, d, 0)
        for each, d in zip(operands, dimensions, strict=True)
    ]
    mapped = (tuple(d is not None for d in dimensions), *product.mapped)
    return _product_p.bind(*moved, product=dataclasses.replace(product, mapped=mapped)), 0


def _differentiate(
    primals: Sequence[Array], tangents: Sequence[Any], *, product: Product
) -> tuple[Array, Array]:
    """The kernels' own derivative, where they have one: a second derivative of the product."""
    compute = functools.partial(_compute, product)
    return jax.jvp(compute, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _lower(context: mlir.LoweringRuleContext, *operands: Any, product: Product) -> Any:
    types, module = cast(Sequence[ShapedArray], context.avals_in), context.module_context
    if len(module.platforms) == 1:
        product = product.on(module.platforms[0])
    compute: Callable[..., Array] = functools.partial(_compute, product)
    if lowered_literally.value:
        compute = product.literal()
    elif explicit_mesh(types) is None and (devices := _partitioned_over(module)):
        compute = _on_automatic_axes(product, types, devices)
        # Any devices will do: a partitioned program has their positions only.
        axes = mlir.ShardingContext(len(devices), tuple(devices))
        context = context.replace(module_context=module.replace(axis_context=axes))
    before = len(module.keepalives)
    with jax.enable_x64(product.wide):
        result = mlir.lower_fun(compute, multiple_results=False)(context, *operands)
    module.keepalives[before:] = map(_ForCompiler, module.keepalives[before:])
    return result


class _ForCompiler:
    """What a program points to while it is compiled. A pickled program is compiled already."""

    def __init__(self, target: Any = None):
        self.target = target

    def __reduce__(self) -> Any:
        return _ForCompiler, ()


def _partitioned_over(module: mlir.ModuleContext) -> Sequence[jax.Device] | None:
    """As many devices as JAX's partitioner will place this program on, if it can be told how."""
    axes, settings = module.axis_context, cast(Any, jax.config)
    if not isinstance(axes, mlir.ShardingContext) or axes.num_devices < 2:
        return None
    if module.lowering_parameters.for_export or not settings.jax_use_shardy_partitioner:
        return None
    backend, (platform, *others) = module.backend, module.platforms
    if backend is None or others or platform == "tpu":
        return None
    native = {"gpu": ("cuda", "rocm")}.get(backend.platform, (backend.platform,))
    if platform not in native or axes.num_devices > len(backend.devices()):
        return None
    return backend.devices()[: axes.num_devices]


_product_p.def_impl(lambda *operands, product: _compute(product, *operands))
_product_p.def_abstract_eval(_result_type)
batching.primitive_batchers[_product_p] = _map
ad.primitive_jvps[_product_p] = _differentiate
mlir.register_lowering(_product_p, _lower)


# -- Explicit mesh axes ----------------------------------------------------------------------------


def explicit_mesh(operands: Sequence[ShapedArray]) -> AbstractMesh | None:
    """The mesh with explicit axes that the operands' types name, or that is set, if there is."""
    meshes = [*(each.sharding.mesh for each in operands), jax.sharding.get_abstract_mesh()]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _explicit_plan(
    product: Product, mesh: AbstractMesh, operands: Sequence[ShapedArray]
) -> tuple[Plan, Sharding]:
    """What the operands' types ask for, and the result's sharding: a gradient's is its operand's.

    A custom derivative has to return each operand's own type.
    """
    layout = product.layout(operands)
    shardings = [_sharding(each) for each in operands]
    chosen = plan(layout, mesh.shape, shardings)
    result = chosen.sharding(layout.result)
    of = gradient_of(product.function)
    if of is None:
        return chosen, result
    own = dict(zip(layout.operands[of], shardings[of], strict=True))
    taken = {axis for axes in own.values() for axis in axes}
    mapped = (() if taken.intersection(axes) else axes for axes in result)
    return chosen, tuple(map(own.get, layout.result, mapped))


def _on_explicit_axes(product: Product, mesh: AbstractMesh) -> Callable[..., Array]:
    def sharded(*operands: Array) -> Array:
        chosen, wanted = _explicit_plan(product, mesh, [jax.typeof(each) for each in operands])
        layout = chosen.layout
        shardings = [chosen.sharding(each) for each in layout.operands]
        y = jax.shard_map(
            _on_blocks(product, chosen, mesh),
            mesh=mesh,
            in_specs=tuple(PartitionSpec(*each) for each in shardings),
            out_specs=PartitionSpec(*chosen.sharding(layout.result)),
            axis_names=set(mesh.explicit_axes),
        )(*(_move(mesh, *each) for each in zip(operands, shardings, strict=True)))
        return _move(mesh, y, wanted)

    return sharded


def _move(mesh: AbstractMesh, array: Array, sharding: Sharding) -> Array:
    if _sharding(jax.typeof(array)) == sharding:
        return array
    return jax.sharding.reshard(array, _named(mesh, sharding))


def _sharding(aval: ShapedArray) -> Sharding:
    axes = (*aval.sharding.spec, *[None] * aval.ndim)[: aval.ndim]
    return tuple((each,) if isinstance(each, str) else tuple(each or ()) for each in axes)


def _named(mesh: Mesh | AbstractMesh, sharding: Sharding) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(each or None for each in sharding)))


# -- Automatic mesh axes ---------------------------------------------------------------------------


def _on_automatic_axes(
    product: Product, operands: Sequence[ShapedArray], devices: Sequence[jax.Device]
) -> Callable[..., Array]:
    """The product of whole operands, for a partitioner that is told how to compute blocks."""
    layout = product.layout(operands)

    def partition(_: Mesh, given: Sequence[Any], wanted: Any) -> tuple[Any, ...]:
        mesh, (*operands, result) = _shardings([*given, wanted], devices)
        chosen = plan(layout, mesh.shape, operands, result)
        shardings = [_named(mesh, chosen.sharding(each)) for each in layout.operands]
        y = _named(mesh, chosen.sharding(layout.result))
        return mesh, _on_blocks(product, chosen, mesh), y, tuple(shardings)

    def whole(*operands: Array) -> Array:
        return _product_p.bind(*operands, product=product)

    # The program has no more of the product than a pointer to `partition`, which JAX can be told to
    # leave out of the key of its compilation cache. The name is then what tells products apart.
    code = str(jax.make_jaxpr(product)(*operands))
    partitionable = custom_partitioning(whole)
    partitionable.def_partition(
        partition,
        sharding_rule=_sharding_rule(layout),
        decode_shardings=False,  # JAX's decoder fails where a part of an axis shards a dimension
    )

    def named(*operands: Array) -> Array:
        return partitionable(*operands)

    named.__name__ = f"adder_{product.function}_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    return jax.jit(named)


def _sharding_rule(layout: Layout) -> SdyShardingRule:
    """For Shardy. Which indices are summed over is left unsaid: `_on_blocks` does it."""

    # It takes no index of size 1 beside others of one dimension.
    def factors(dimensions: Dimensions) -> list[tuple[str, ...]]:
        return [(d[0], *(i for i in d[1:] if layout.sizes[i] > 1)) for d in dimensions]

    def mapping(dimensions: Dimensions) -> ArrayMapping:
        return ArrayMapping(*(CompoundFactor(*d) if d[1:] else d[0] for d in factors(dimensions)))

    every = [d for each in (*layout.operands, layout.result) for d in factors(each)]
    by_appearance = dict.fromkeys(index for d in every for index in d)  # as it asks
    alone = {d[0] for d in every if len(d) == 1}
    compound: Any = {i: layout.sizes[i] for i in by_appearance if i not in alone}
    return SdyShardingRule(
        tuple(mapping(each) for each in layout.operands),
        (mapping(layout.result),),
        need_replication_factors=tuple(i for i in by_appearance if i in layout.whole),
        **compound,
    )


def _shardings(arrays: Sequence[Any], devices: Sequence[jax.Device]) -> tuple[Mesh, list[Sharding]]:
    """A mesh whose axes name how the compiler shards all of the arrays, and their shardings."""
    sizes, shardings = name_axes([_starts(each, devices) for each in arrays])
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes)), shardings


def _starts(array: Any, devices: Sequence[jax.Device]) -> list[NDArray[Any]]:
    """Where each device's block starts in each dimension, were it as long as there are devices."""
    rank, length = len(array.shape), len(devices)
    if array.sharding is None:
        return [np.zeros(length, int)] * rank
    # The number of blocks divides the number of devices, though perhaps not the real dimension.
    blocks = array.sharding.devices_indices_map((length,) * rank)
    return [np.array([blocks[device][d].start or 0 for device in devices]) for d in range(rank)]
