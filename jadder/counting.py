"""What a network computes: operations by kind and width, bytes of parameters and of activations.

`count_operations` counts what a model or function is, as JAX traces it, or what an integer program
is; nothing is run. The conventions, of which publications have several:

- A sum of K terms counts K additions, as a multiply-accumulate counts one: each term is added to
  something, zero or a bias or a partial sum. So an adder product counts K subtractions, K absolute
  values and K additions for each output, and a multiplying one K multiplications and K additions;
  where a publication counts "2K additions" of an adder, it adds up subtractions and additions. The
  adder's sign is taken as the terms are added.
- Every tap of every window counts, whether it meets an input, padding or a hole of a dilated input.
  (XLA's own cost analysis leaves out multiplications with padding.)
- A model is counted as it is: its batch normalisation in evaluation mode has a subtraction, a
  multiplication and an addition for each element, and a few operations for each channel. In an
  `IntegerProgram` it is folded into one multiplier and one bias for each output.
- Widths are dtypes. Floats are subtracted and added in what they accumulate in, float32 at least;
  differences of bytes count as bytes ("uint8", the width of ``psadbw`` and ``USADA8``), their sums
  as "int32". The multiplier of an integer program counts as "int32", what is added to its 64-bit
  product as "int64".
- Parameters are a model's variables or a function's constants that a layer reads. Activations are
  what a layer reads that another one made, and what it makes for others: all that has to be moved
  if each layer is one pass that keeps nothing from another.
- A scan counts as often as it turns, a conditional as its branch with the most operations.
- What only moves, selects or retypes data (reshapes, slices, gathers) is no operation, but
  conversions and selections count among the others.
"""

import dataclasses
import functools
import math
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from flax import nnx

from jadder.integer.program import Convolution, IntegerProgram, MaxPool, Reshape, SumPool
from jadder.kernels.partitioned import Product, lowered_literally

Operations = Mapping[tuple[str, str], int]
"""How many of each (operation, width)."""

_MAIN = ("subtract", "absolute", "add", "multiply")


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """What one layer computes.

    Attributes:
      name: the module's path in its model, the number of a program's operation, or the function's
        ``jax.named_scope``s.
      kind: the module's class, or the kind of a program's operation.
      operations: how many of each (operation, width): 'subtract', 'absolute', 'add', 'multiply',
        and others by their name.
      parameter_bytes: of the parameters that it reads.
      activation_bytes: of what it reads of other layers, and what it makes for others.
    """

    name: str
    kind: str
    operations: Operations
    parameter_bytes: int
    activation_bytes: int

    @property
    def subtractions(self) -> int:
        """Of all widths."""
        return self._of("subtract")

    @property
    def absolute_values(self) -> int:
        """Of all widths."""
        return self._of("absolute")

    @property
    def additions(self) -> int:
        """Of all widths."""
        return self._of("add")

    @property
    def multiplications(self) -> int:
        """Of all widths."""
        return self._of("multiply")

    @property
    def others(self) -> Operations:
        """All but subtractions, absolute values, additions and multiplications."""
        return {key: count for key, count in self.operations.items() if key[0] not in _MAIN}

    def _of(self, operation: str) -> int:
        return sum(count for (each, _), count in self.operations.items() if each == operation)


@dataclasses.dataclass(frozen=True)
class OperationCounts:
    """What a network computes, layer by layer and in sum; as text, a table.

    Attributes:
      layers: in the order in which they first compute something.
      total: the sum; parameters that layers share count once.
    """

    layers: tuple[LayerCount, ...]
    total: LayerCount

    def __getitem__(self, name: str) -> LayerCount:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[layer.name for layer in self.layers]}")

    @property
    def multiplying(self) -> tuple[LayerCount, ...]:
        """The layers that multiply."""
        return tuple(layer for layer in self.layers if layer.multiplications)

    def energy(self, table: str) -> "Energy":
        """The energy of the arithmetic alone, by a published table.

        It is no estimate of what a network needs: moving the operands takes most of it. By the same
        table a byte's subtraction, absolute value and addition take 0.16 pJ, a byte's
        multiplication and addition 0.30, and 8 bytes from an 8 KB memory 10: with two bytes read
        for each term, adding and multiplying differ by 5 %. A microcontroller was measured at some
        3,000 times the arithmetic's energy, and there time is the better proxy.

        Args:
          table: its name: 'horowitz_45nm' is M. Horowitz, "Computing's energy problem (and what we
            can do about it)", ISSCC 2014, for 45 nm and 0.9 V. A subtraction or a comparison counts
            as an addition, an integer's absolute value too; a float's is its sign bit, for nothing.

        Raises:
          ValueError: another name.
        """
        if table not in ENERGY_TABLES:
            raise ValueError(f"table must be one of {sorted(ENERGY_TABLES)}, got {table!r}")
        return _energy(table, self.total.operations)

    def __str__(self) -> str:
        return _table(self)


@dataclasses.dataclass(frozen=True)
class Energy:
    """Arithmetic energy by a table; as text, with what it leaves out.

    Attributes:
      table: the table's name.
      picojoules: of the operations that the table has.
      left_out: the operations that it does not have.
    """

    table: str
    picojoules: float
    left_out: Operations

    def __str__(self) -> str:
        lines = [f"arithmetic alone, by {self.table}: {self.picojoules / 1e6:,.6g} uJ"]
        if self.left_out:
            lines.append(f"without {_listed(self.left_out)}, which the table does not have")
        lines.append(
            "Not the energy of the network: moving its bytes, which is not in here, takes most of "
            "it."
        )
        return "\n".join(lines)


ENERGY_TABLES: Mapping[str, Mapping[tuple[str, str], float]] = types.MappingProxyType(
    {
        "horowitz_45nm": types.MappingProxyType(
            {
                ("add", "8"): 0.03,
                ("add", "32"): 0.1,
                ("add", "float16"): 0.4,
                ("add", "float32"): 0.9,
                ("multiply", "8"): 0.2,
                ("multiply", "32"): 3.1,
                ("multiply", "float16"): 1.1,
                ("multiply", "float32"): 3.7,
            }
        )
    }
)
"""Picojoules of (operation, bits of an integer or a float's dtype), by table."""

_LIKE_ADDITION = ("add", "subtract", "compare", "absolute", "negate")


def _energy(table: str, operations: Operations) -> Energy:
    picojoules, left_out = 0.0, {}
    for (operation, width), count in operations.items():
        floating = "float" in width
        if floating and operation in ("absolute", "negate"):
            continue
        like = "add" if operation in _LIKE_ADDITION else operation
        bits = width if floating else width.removeprefix("u").removeprefix("int")
        each = ENERGY_TABLES[table].get((like, bits))
        if each is None:
            left_out[operation, width] = count
        else:
            picojoules += count * each
    return Energy(table, picojoules, left_out)


def count_operations(
    network: nnx.Module | IntegerProgram | Callable[..., Any], /, *inputs: Any, **options: Any
) -> OperationCounts:
    """Counts the operations of a model, a function or an integer program. Nothing is run.

    See the module's docstring for what is counted how.

    Args:
      network: an NNX model, which is left as it is: call ``model.eval()`` before if that is meant.
        Its layers are its modules, and what a module computes beside its parts is its own. Or a
        function, whose layers are its ``jax.named_scope``s. Or an `IntegerProgram`, whose layers
        are its operations.
      *inputs: what it is called with: arrays or ``jax.ShapeDtypeStruct``s. Of a program the images,
        of which only the number counts; without them it is one.
      **options: keyword arguments of the call.

    Raises:
      ValueError: a primitive that hides what it computes (a foreign call, a Pallas kernel, a while
        loop of unknown length), with the layer that it is in.
      TypeError: inputs that a program does not take.

    Example:
      >>> import jax, jax.numpy as jnp, jadder
      >>> from flax import nnx
      >>> layer = jadder.AdderLinear(64, 10, rngs=nnx.Rngs(0))
      >>> total = count_operations(layer, jax.ShapeDtypeStruct((1, 64), jnp.float32)).total
      >>> total.subtractions, total.absolute_values, total.additions, total.multiplications
      (640, 640, 640, 0)
    """
    if isinstance(network, IntegerProgram):
        return _count_program(network, inputs, options)
    if isinstance(network, nnx.Module):
        return _count_module(network, inputs, options)
    return _count_function(network, inputs, options)


# -- Integer programs ------------------------------------------------------------------------------


def _count_program(
    program: IntegerProgram, inputs: Sequence[Any], options: Mapping[str, Any]
) -> OperationCounts:
    if len(inputs) > 1 or options:
        raise TypeError("count_operations of an IntegerProgram takes images and nothing else")
    images = 1
    if inputs:
        shape = np.shape(inputs[0]) if not hasattr(inputs[0], "shape") else inputs[0].shape
        if len(shape) != 4 or tuple(shape[1:]) != program.input.shape:
            raise TypeError(f"images (count, *{program.input.shape}) expected, got shape {shape}")
        images = shape[0]
    layers = tuple(
        _program_layer(program, index, images) for index in range(len(program.operations))
    )
    operations: Counter[tuple[str, str]] = Counter()
    for layer in layers:
        operations.update(layer.operations)
    return OperationCounts(layers, LayerCount(
        "total", "IntegerProgram", dict(operations), sum(each.parameter_bytes for each in layers),
        sum(each.activation_bytes for each in layers),
    ))  # fmt: skip


def _program_layer(program: IntegerProgram, index: int, images: int) -> LayerCount:
    operation = program.operations[index]
    kind, output = type(operation).__name__, operation.output
    counts: Counter[tuple[str, str]] = Counter()
    parameters, read = 0, {operation.input}
    if isinstance(operation, Convolution):
        kind = f"{kind} ({operation.product})"
        terms = output.size * math.prod(operation.kernel.shape[:3])
        counts["add", "int32"] += terms
        if operation.product == "adder":
            counts["subtract", "uint8"] += terms
            counts["absolute", "uint8"] += terms
        else:
            counts["multiply", "int8"] += terms
        if operation.center:  # F · S - Σ S
            for each in ("multiply", "add", "subtract"):
                counts[each, "int32"] += output.size
        parameters += operation.kernel.nbytes
    elif isinstance(operation, SumPool):
        counts["add", "int32"] += output.size * math.prod(operation.window)
    elif isinstance(operation, MaxPool):
        counts["compare", "uint8"] += output.size * math.prod(operation.window)
    if not isinstance(operation, MaxPool | Reshape):
        epilogue = operation.requantization
        counts["multiply", "int32"] += output.size * (1 + len(epilogue.residuals))
        counts["add", "int64"] += output.size * (1 + len(epilogue.residuals))
        shifts = 1 + sum(residual.left_shift > 0 for residual in epilogue.residuals)
        counts["shift", "int64"] += output.size * shifts
        counts["compare", "int64"] += output.size * 2
        parameters += epilogue.multiplier.nbytes + epilogue.bias.nbytes
        read |= {residual.value for residual in epilogue.residuals}
    moved = [*(program.values[value] for value in read), output]
    size = sum(each.size * np.dtype(each.dtype).itemsize for each in moved)
    every = {key: count * images for key, count in counts.items()}
    return LayerCount(str(index), kind, every, parameters, size * images)


# -- Models and functions --------------------------------------------------------------------------

_SCOPE = "jadder.layer:"


def _count_module(
    model: nnx.Module, inputs: Sequence[Any], options: Mapping[str, Any]
) -> OperationCounts:
    graphdef, state = nnx.split(model)
    kinds: dict[str, str] = {}

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        own = nnx.merge(graphdef, state)  # what follows is done to this copy
        kinds.update(_name_modules(own))
        return own(*args, **kwargs)

    jaxpr = _trace(call, state, inputs, options)
    variables = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    parameters = [
        not isinstance(variable, nnx.RngState)
        for variable in variables
        for _ in jax.tree.leaves(variable)
    ]
    return _Count(kinds, type(model).__name__).of(jaxpr, parameters)


def _count_function(
    function: Callable[..., Any], inputs: Sequence[Any], options: Mapping[str, Any]
) -> OperationCounts:
    jaxpr = _trace(lambda _, *args, **kwargs: function(*args, **kwargs), (), inputs, options)
    return _Count({}, getattr(function, "__name__", type(function).__name__)).of(jaxpr, [])


def _trace(
    function: Callable[..., Any], state: Any, inputs: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """The jaxpr of a call, whose inputs are the state's arrays and then the other arrays."""
    leaves, structure = jax.tree.flatten((tuple(inputs), dict(options)))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(state: Any, arrays: Sequence[Any]) -> Any:
        given = iter(arrays)
        each = zip(leaves, is_array, strict=True)
        args, kwargs = jax.tree.unflatten(structure, [next(given) if a else x for x, a in each])
        return function(state, *args, **kwargs)

    return jax.make_jaxpr(call)(state, [x for x, a in zip(leaves, is_array, strict=True) if a])


def _name_modules(model: nnx.Module) -> dict[str, str]:
    """Makes each call of a part of ``model`` say, in what it traces, which part it is."""
    kinds = {}
    for path, found in [*nnx.iter_modules(model)]:
        module: Any = found
        if callable(module):
            name = ".".join(map(str, path))
            kinds[name] = type(module).__name__
            module._counted_as = name
            module.__class__ = _saying_its_name(module.__class__)
    return kinds


@functools.cache
def _saying_its_name(cls: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(f"{_SCOPE}{self._counted_as}"):
            return cls.__call__(self, *args, **kwargs)

    return types.new_class(cls.__name__, (cls,), {}, lambda body: body.update(__call__=__call__))


@dataclasses.dataclass(eq=False)
class _Value:
    """What a variable of a jaxpr stands for.

    Attributes:
      size: in bytes.
      times: how often it is made and read, in a loop.
      parameter: the parameter that it is, or a part of.
      writer: the layer that made it, if one did.
      readers: the layers that read it.
      kept: whether something outside of all layers needs it: the result, or a loop.
    """

    size: int
    times: int = 1
    parameter: "_Value | None" = None
    writer: str | None = None
    readers: set[str] = dataclasses.field(default_factory=set)
    kept: bool = False


@dataclasses.dataclass
class _Row:
    operations: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    parameters: dict[int, _Value] = dataclasses.field(default_factory=dict)


class _Count:
    """Walks through a jaxpr and all that are in it."""

    def __init__(self, kinds: Mapping[str, str], name: str) -> None:
        self._kinds, self._name = kinds, name
        self._rows: dict[str, _Row] = {}
        self._values: list[_Value] = []

    def of(self, closed: Any, parameters: Sequence[bool], around: str = "") -> OperationCounts:
        """The counts of a jaxpr, the first of whose inputs are parameters or else of no account."""
        inputs = [self._value(var) for var in closed.jaxpr.invars]
        for value, parameter in zip(inputs, parameters, strict=False):
            value.parameter = value
            value.size *= parameter
        results = self._walk(closed.jaxpr, self._constants(closed.jaxpr), inputs, around, 1)
        for value in results:
            value.kept = True
        return self._sum_up()

    def _value(self, var: Any, **fields: Any) -> _Value:
        value = _Value(_size(var.aval), **fields)
        self._values.append(value)
        return value

    def _constants(self, jaxpr: Any) -> list[_Value]:
        constants = [self._value(var) for var in jaxpr.constvars]
        for value in constants:
            value.parameter = value
        return constants

    def _walk(
        self, jaxpr: Any, constants: list[_Value], inputs: list[_Value], around: str, times: int
    ) -> list[_Value]:
        """Counts a jaxpr that is called ``times`` times in the layer ``around``; its results."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def read(var: Any) -> _Value:
            return _Value(0) if hasattr(var, "val") else known[var]

        for eqn in jaxpr.eqns:
            layer = _layer(eqn, around)
            values = [read(var) for var in eqn.invars]
            known |= zip(eqn.outvars, self._equation(eqn, values, layer, times), strict=True)
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[_Value], layer: str, times: int) -> list[_Value]:
        name = eqn.primitive.name
        if name in _CALLS:
            called = next(eqn.params[key] for key in _CALLED if key in eqn.params)
            inner = getattr(called, "jaxpr", called)
            return self._walk(inner, self._constants(inner), values, layer, times)
        if name == "scan":
            return self._scan(eqn, values, layer, times)
        if name == "cond":
            return self._cond(eqn, values, layer, times)
        row = self._rows.setdefault(layer, _Row())
        for operation, count in _operations(eqn, self._name if layer == "" else layer).items():
            row.operations[operation] += count * times
        for value in values:
            value.readers.add(layer)
            if value.parameter is not None:
                row.parameters[id(value.parameter)] = value.parameter
        return [self._value(var, times=times, writer=layer) for var in eqn.outvars]

    def _scan(self, eqn: Any, values: list[_Value], layer: str, times: int) -> list[_Value]:
        """A loop: each turn reads its slices anew."""
        closed, turns = eqn.params["jaxpr"], eqn.params["length"] * times
        inputs = [
            self._value(var, times=turns, parameter=value.parameter)
            for var, value in zip(closed.jaxpr.invars, values, strict=True)
        ]
        for value in values:
            value.kept = True
        inner = self._constants(closed.jaxpr)
        for value in self._walk(closed.jaxpr, inner, inputs, layer, turns):
            value.kept = True
        return [self._value(var, times=times) for var in eqn.outvars]

    def _cond(self, eqn: Any, values: list[_Value], layer: str, times: int) -> list[_Value]:
        """The branch with the most operations."""
        sizes = []
        for branch in eqn.params["branches"]:
            trial = _Count(self._kinds, self._name)
            sizes.append(sum(trial.of(branch, [], layer).total.operations.values()))
        chosen = eqn.params["branches"][sizes.index(max(sizes))].jaxpr
        return self._walk(chosen, self._constants(chosen), values[1:], layer, times)

    def _sum_up(self) -> OperationCounts:
        moved: Counter[str] = Counter()
        for value in self._values:
            if value.parameter is not None:
                continue
            readers = value.readers - {value.writer}
            for reader in readers:
                moved[reader] += value.size * value.times
            if value.writer is not None and (readers or value.kept):
                moved[value.writer] += value.size * value.times
        layers, operations = [], Counter[tuple[str, str]]()
        parameters: dict[int, _Value] = {}
        for name, row in self._rows.items():
            size = sum(value.size for value in row.parameters.values())
            kind = self._kinds.get(name, "")
            counted = +row.operations
            if counted or size:
                layers.append(LayerCount(name, kind, dict(counted), size, moved[name]))
            operations.update(row.operations)
            parameters |= row.parameters
        size = sum(value.size for value in parameters.values())
        every = sum(layer.activation_bytes for layer in layers)
        return OperationCounts(
            tuple(layers), LayerCount("total", self._name, dict(+operations), size, every)
        )


def _layer(eqn: Any, around: str) -> str:
    """The layer of an equation: the innermost module, and the scopes inside of it."""
    parts = [around] if around else []
    for each in eqn.source_info.name_stack.stack:
        name = getattr(each, "name", "")
        if type(each).__name__ != "Scope":
            continue
        parts = [name.removeprefix(_SCOPE)] if name.startswith(_SCOPE) else [*parts, name]
    return "/".join(part for part in parts if part)


def _size(aval: Any) -> int:
    itemsize = getattr(aval.dtype, "itemsize", 0)
    return math.prod(aval.shape) * int(itemsize)


def counted_flops() -> AbstractContextManager[Any]:
    """Within this context, programs are lowered for XLA's cost analysis to count adder products.

    XLA knows nothing of a foreign call, for which it counts -1, and counts a loop's body once,
    however often it turns. Here products are lowered as their formula instead, of which it counts
    3 K for each output: a subtraction, an absolute value and an addition for each term (the kernel
    gradient that is a matrix product counts as one). The numbers are the same, but such a program
    is slow and may take memory for all M · K · N differences: it is for one small batch, as
    ``nnx.tabulate`` runs. What is compiled outside is another program, which this does not touch.

    Example:
      >>> import jax.numpy as jnp, jadder
      >>> from flax import nnx
      >>> layer = jadder.AdderLinear(64, 10, rngs=nnx.Rngs(0))
      >>> with counted_flops():
      ...     text = nnx.tabulate(layer, jnp.ones((2, 64)), compute_flops=True)
      >>> str(3 * 2 * 64 * 10) in text
      True
    """
    return lowered_literally(True)


# -- Primitives ------------------------------------------------------------------------------------

_CALLS = frozenset(
    ["jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
     "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"]
)  # fmt: skip
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")

_ELEMENTWISE: Mapping[str, str] = types.MappingProxyType(
    {
        "add": "add", "add_any": "add", "sub": "subtract", "mul": "multiply", "square": "multiply",
        "abs": "absolute", "neg": "negate", "div": "divide", "rem": "divide",
        **dict.fromkeys(["max", "min", "eq", "ne", "lt", "le", "gt", "ge", "sign", "is_finite",
                         "eq_to", "le_to", "lt_to"], "compare"),
        "select_n": "select", "convert_element_type": "convert", "reduce_precision": "convert",
        **dict.fromkeys(["floor", "ceil", "round"], "round"),
        **dict.fromkeys(["sqrt", "rsqrt", "cbrt"], "square root"),
        **dict.fromkeys(["exp", "exp2", "expm1"], "exponential"),
        **dict.fromkeys(["log", "log1p"], "logarithm"),
        **dict.fromkeys(["tanh", "logistic", "erf", "erfc", "erf_inv", "sin", "cos", "tan", "asin",
                         "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "pow",
                         "lgamma", "digamma", "nextafter"], "transcendental"),
        **dict.fromkeys(["and", "or", "xor", "not", "population_count", "clz"], "bitwise"),
        **dict.fromkeys(["shift_left", "shift_right_logical", "shift_right_arithmetic"], "shift"),
        **dict.fromkeys(["random_bits", "random_gamma", "threefry2x32"], "random"),
    }
)  # fmt: skip
"""What one element of a primitive's result counts as."""

_REDUCTIONS: Mapping[str, str] = types.MappingProxyType(
    {
        "reduce_sum": "add", "cumsum": "add", "reduce_prod": "multiply", "cumprod": "multiply",
        **dict.fromkeys(["reduce_max", "reduce_min", "argmax", "argmin", "cummax", "cummin"],
                        "compare"),
        **dict.fromkeys(["reduce_and", "reduce_or", "reduce_xor"], "bitwise"),
    }
)  # fmt: skip
"""What one element of a primitive's operand counts as."""

_WINDOWS: Mapping[str, str] = types.MappingProxyType(
    {"reduce_window_sum": "add", "reduce_window_max": "compare", "reduce_window_min": "compare"}
)
_SCATTERS: Mapping[str, str | None] = types.MappingProxyType(
    {"scatter-add": "add", "scatter-sub": "subtract", "scatter-mul": "multiply",
     "scatter-max": "compare", "scatter-min": "compare", "scatter": None}
)  # fmt: skip

_FREE = frozenset(
    ["broadcast_in_dim", "reshape", "transpose", "slice", "dynamic_slice", "dynamic_update_slice",
     "concatenate", "pad", "gather", "squeeze", "expand_dims", "rev", "copy", "copy_p", "iota",
     "stop_gradient", "split", "real", "imag", "bitcast_convert_type", "optimization_barrier",
     "device_put", "sharding_constraint", "reshard", "mesh_cast", "random_seed", "random_wrap",
     "random_unwrap", "random_split", "random_fold_in", "random_clone", "pvary", "name",
     "create_token", "platform_index", "stack", "unstack", "empty", "full", "symbolic_zeros",
     "zeros_like", "pcast", "tile"]
)  # fmt: skip

_PALLAS = "a Pallas kernel; products count with implementation=None, which computes the same sums"
_HIDDEN: Mapping[str, str] = types.MappingProxyType(
    {
        "while": "a loop whose number of turns is not in the program",
        **dict.fromkeys(["pallas_call", "core_map", "mpmd_map", "mosaic_gpu_call"], _PALLAS),
        "shard_map": "the program of each of several devices; count the function that it maps",
        "ffi_call": "a foreign call",
        **dict.fromkeys(["pure_callback", "io_callback", "debug_callback"], "a call into Python"),
    }
)
"""Primitives that do not show what they compute."""


def _operations(eqn: Any, layer: str) -> Counter[tuple[str, str]]:
    """The operations of one equation that is no call."""
    name, operands = eqn.primitive.name, [var.aval for var in eqn.invars]
    results = [var.aval for var in eqn.outvars]
    if name in _FREE:
        return Counter()
    if name in _ELEMENTWISE:
        size = max(math.prod(each.shape) for each in results)
        operand = operands[-1] if name == "select_n" else (operands or results)[0]
        return Counter({(_ELEMENTWISE[name], _width(operand)): size})
    if name in _REDUCTIONS:
        return Counter({(_REDUCTIONS[name], _width(operands[0])): math.prod(operands[0].shape)})
    if name in _WINDOWS:
        terms = math.prod(results[0].shape) * math.prod(eqn.params["window_dimensions"])
        return Counter({(_WINDOWS[name], _width(operands[0])): terms})
    if name in _SCATTERS:
        each = _SCATTERS[name]
        size = math.prod(operands[2].shape)
        return Counter() if each is None else Counter({(each, _width(operands[0])): size})
    if name == "clamp":
        return Counter({("compare", _width(operands[1])): 2 * math.prod(results[0].shape)})
    if name == "integer_pow":
        return _integer_power(eqn.params["y"], operands[0])
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = math.prod(operands[0].shape[d] for d in contracted)
        return _products(terms, operands[0], results[0])
    if name == "conv_general_dilated":
        features = operands[1].shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return _products(math.prod(operands[1].shape) // features, operands[0], results[0])
    if name == "select_and_scatter_add":
        window = math.prod(eqn.params["window_dimensions"]) * math.prod(operands[0].shape)
        counts = Counter({("compare", _width(operands[1])): window})
        counts["add", _width(operands[0])] += math.prod(operands[0].shape)
        return counts
    if name == "adder_product":
        return _adder_product(eqn.params["product"], operands, layer)
    about = _HIDDEN.get(name, "count_operations does not know it")
    raise ValueError(f"cannot count the operations of {name!r} in layer {layer!r}: {about}")


def _products(terms: int, operand: Any, result: Any) -> Counter[tuple[str, str]]:
    every = terms * math.prod(result.shape)
    return Counter({("multiply", _width(operand)): every, ("add", _width(result)): every})


def _integer_power(exponent: int, operand: Any) -> Counter[tuple[str, str]]:
    """By squaring."""
    size, width = math.prod(operand.shape), _width(operand)
    squarings = abs(exponent).bit_length() - 1 + abs(exponent).bit_count() - 1
    counts = Counter({("multiply", width): size * max(squarings, 0)})
    if exponent < 0:
        counts["divide", width] += size
    return +counts


def _adder_product(
    product: Product, operands: Sequence[Any], layer: str
) -> Counter[tuple[str, str]]:
    """K of each for each output; of a gradient, whatever its formula has."""
    if product.function not in ("matmul", "conv"):
        with_formula = product.literal()
        closed = jax.make_jaxpr(with_formula)(*operands)
        return Counter(_Count({}, layer).of(closed, []).total.operations)
    sizes = product.layout(operands).sizes
    # All indices but those of the input's space, which the result's and the window's make up.
    terms = math.prod(size for index, size in sizes.items() if index[0] != "s")
    accumulator = np.dtype(dict(product.options)["out_dtype"])
    floating = not np.issubdtype(accumulator, np.integer)
    operand = accumulator.name if floating else _width(operands[0])
    distance = "absolute" if product.is_adder else "multiply"
    return Counter({("subtract", operand): terms, (distance, operand): terms,
                    ("add", accumulator.name): terms})  # fmt: skip


def _width(aval: Any) -> str:
    return str(getattr(aval.dtype, "name", aval.dtype))


# -- Text ------------------------------------------------------------------------------------------


def _table(counts: OperationCounts) -> str:
    main = [key for name in _MAIN for key in sorted(counts.total.operations) if key[0] == name]
    heads = ["layer", "kind", *(f"{name} {width}" for name, width in main),
             "others", "parameters B", "activations B"]  # fmt: skip
    rows = [
        [
            layer.name or "(itself)",
            layer.kind,
            *(f"{layer.operations.get(key, 0):,}" for key in main),
            f"{sum(layer.others.values()):,}",
            f"{layer.parameter_bytes:,}",
            f"{layer.activation_bytes:,}",
        ]
        for layer in (*counts.layers, counts.total)
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    multiply = ", ".join(layer.name or "(itself)" for layer in counts.multiplying)
    lines = [line(heads), rule, *map(line, rows[:-1]), rule, line(rows[-1])]
    if counts.total.others:
        lines.append(f"others: {_listed(counts.total.others)}")
    lines.append(f"multiplies: {multiply or 'nothing'}")
    return "\n".join(lines)


def _listed(operations: Operations) -> str:
    return ", ".join(f"{count:,} {name} {width}" for (name, width), count in operations.items())
