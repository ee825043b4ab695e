"""Models as files: parameters, statistics and what the model is made of, in one safetensors file.

The header's ``jadder`` entry is JSON: the fields of `Description` and `Architecture`, and a
checksum of these and of all arrays. Nothing in a file is unpickled, imported or evaluated; a model
is built from its description with shapes alone, and no array is read before its name, shape and
dtype are known to be right.
"""

import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray

from jadder.files import (
    PathLike,
    expect,
    expect_fields,
    open_regular,
    parse_json,
    short,
    write_bytes,
)
from jadder.models.family import Family
from jadder.models.registry import Architecture, abstract, architecture_of, build
from jadder.rules import GradientRule

FORMAT = "jadder model"
VERSION = 1

_KEY = "jadder"
_FIELDS = ("format", "version", "sha256", "architecture", "class_names", "mean", "std", "about")
_ARCHITECTURE = tuple(field.name for field in dataclasses.fields(Architecture))
_RULE = ("x", "kernel")
_DTYPES = {"F16": "float16", "F32": "float32", "F64": "float64"}
_LARGEST_SIDE = 1 << 13
_UNREADABLE = (
    safetensors.SafetensorError, ArithmeticError, AttributeError, LookupError, MemoryError,
    NotImplementedError, OSError, RecursionError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file says of its model.

    Attributes:
      architecture: what it is made of.
      class_names: of the classes, in the order of the logits; empty where nobody said them.
      mean, std: of each channel, on the scale on which a byte's 255 is 1: the model takes
        ``(images / 255 - mean) / std``. Empty where nobody said them.
      about: anything else, such as the data, the accuracy and the command that trained it.
    """

    architecture: Architecture
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def normalize(self, images: ArrayLike) -> Array:
        """What the model takes, float32, of images uint8 (..., height, width, channels).

        Raises:
          TypeError: images that are not uint8.
          ValueError: another number of channels, or a file that says no mean.
        """
        given = jnp.asarray(images)
        if given.dtype != jnp.uint8:
            raise TypeError(f"images must be uint8, got {given.dtype}")
        if not self.mean:
            raise ValueError("the file does not say the mean and deviation of the model's images")
        if given.ndim < 3 or given.shape[-1] != len(self.mean):
            raise ValueError(
                f"images (..., height, width, {len(self.mean)}) expected, got {given.shape}"
            )
        mean, std = jnp.asarray(self.mean, jnp.float32), jnp.asarray(self.std, jnp.float32)
        return (given.astype(jnp.float32) / 255 - mean) / std


class SavedModel(NamedTuple):
    """A model that was loaded, ready for evaluation, and what its file says of it."""

    model: Any
    description: Description


def save(
    model: nnx.Module,
    path: PathLike,
    *,
    class_names: Sequence[str] = (),
    mean: Sequence[float] | float = (),
    std: Sequence[float] | float = (),
    about: Mapping[str, Any] | None = None,
    param_dtype: DTypeLike | None = None,
) -> None:
    """Writes a model to one safetensors file, which is there as a whole or not at all.

    Args:
      model: one of `create`'s. Its products may have other implementations by now, which the file
        does not keep.
      path: of the file.
      class_names: of the classes, in the order of the logits.
      mean, std: of each channel of the images, as in `Description`; a number for all of them.
      about: anything else that JSON can hold.
      param_dtype: float16 or float32, in which parameters are written; None: in their own, bfloat16
        as float32. Statistics keep theirs.

    Raises:
      ValueError: a model that ``create`` did not make or that has changed since; names, means or
        deviations that do not fit it; values beyond ``param_dtype``.
      TypeError: an ``about`` that JSON cannot hold.

    Example:
      >>> import jadder, tempfile
      >>> model = jadder.models.create("lenet5", image_size=28, channels=1, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(model, f"{folder}/model.safetensors", mean=0.1307, std=0.3081)
      ...     again, description = load(f"{folder}/model.safetensors")
      >>> description.architecture.model, description.mean
      ('lenet5', (0.1307,))
    """
    write_bytes(
        Path(path),
        to_bytes(
            model, class_names=class_names, mean=mean, std=std, about=about,
            param_dtype=param_dtype,
        ),
    )  # fmt: skip


def to_bytes(
    model: nnx.Module,
    *,
    class_names: Sequence[str] = (),
    mean: Sequence[float] | float = (),
    std: Sequence[float] | float = (),
    about: Mapping[str, Any] | None = None,
    param_dtype: DTypeLike | None = None,
) -> bytes:
    """What `save` writes."""
    try:
        architecture = architecture_of(model)
    except ValueError as error:
        raise ValueError(f"save: {error}") from None
    channels = architecture.channels
    means, stds = (
        tuple(map(float, np.broadcast_to(each, channels))) if np.ndim(each) == 0
        else tuple(map(float, cast(Sequence[float], each)))
        for each in (mean, std)
    )  # fmt: skip
    description = Description(
        architecture, tuple(class_names), means, stds, {} if about is None else dict(about)
    )
    _check(description, "save: ")
    arrays = {}
    for name, variable in _variables(model).items():
        arrays[name] = _array(name, variable, param_dtype)
    header = {
        "format": FORMAT, "version": VERSION, **dataclasses.asdict(description),
        "architecture": _encode(architecture),
    }  # fmt: skip
    text = json.dumps({**header, "sha256": _checksum(header, arrays)}, allow_nan=False)
    return safetensors.numpy.save(arrays, {_KEY: text})


def load(path: PathLike) -> SavedModel:
    """The model of a file that `save` wrote, in evaluation mode, and what the file says of it.

    Raises:
      FileNotFoundError: no file.
      ValueError: a file that holds no such model, or a damaged one; what was found in it.
    """
    return load_as(path)


def load_as(
    path: PathLike, *, family: Family | None = None, dtypes: Mapping[str, Any] | None = None
) -> SavedModel:
    """`load`, with the caller's own family of the file's name, and other dtypes to compute in.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    try:
        with open_regular(path):
            pass
        with safetensors.safe_open(path, framework="np") as file:
            header, description = _header(file.metadata())
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            _check_numbers(description.architecture, shapes)
            model = abstract(description.architecture)
            _check_arrays(_variables(model), shapes, {n: p.get_dtype() for n, p in parts.items()})
            arrays = {name: file.get_tensor(name) for name in shapes}
        if (found := _checksum(header, arrays)) != header["sha256"]:
            raise ValueError(f"it is not as it was saved: its checksum is {found:.16}...")
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        said = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"{path} holds no model of jadder: {said:.500}") from None
    if family is not None or dtypes:
        options = tuple(
            sorted({**dict(description.architecture.options), **(dtypes or {})}.items())
        )
        changed = dataclasses.replace(description.architecture, options=options)
        model = nnx.eval_shape(lambda: build(changed, nnx.Rngs(0), family))
    for name, variable in _variables(model).items():
        variable.set_value(jnp.asarray(arrays[name], variable.get_value().dtype))
    model.eval()
    return SavedModel(model, description)


# -- Arrays ----------------------------------------------------------------------------------------


def _variables(model: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """Parameters and statistics, by their path in the model."""
    found: dict[str, nnx.Variable[Any]] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            name = ".".join(map(str, path))
            if not isinstance(node, nnx.Param | nnx.BatchStat):
                raise ValueError(f"{name} is a {type(node).__name__}, which a file does not hold")
            found[name] = node
    return found


def _array(name: str, variable: nnx.Variable[Any], param_dtype: DTypeLike | None) -> NDArray[Any]:
    value = variable.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"save: {name} has no value, as the model is abstract")
    array = np.asarray(jax.device_get(value))
    dtype = jnp.dtype(array.dtype)
    if param_dtype is not None and isinstance(variable, nnx.Param):
        dtype = jnp.dtype(param_dtype)
    if dtype.name not in _DTYPES.values():
        dtype = jnp.dtype(jnp.float32)
    with np.errstate(over="ignore"):
        cast_to = np.ascontiguousarray(array.astype(dtype))
    if np.isfinite(array.astype(np.float64)).all() > np.isfinite(cast_to).all():
        raise ValueError(f"save: {name} has values beyond {dtype.name}")
    return cast_to


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the header's other fields, in order, and of each array in order of the names.

    Of an array: its name, dtype, shape and little-endian values.
    """
    said = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _check_arrays(
    variables: Mapping[str, nnx.Variable[Any]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
) -> None:
    if missing := sorted(variables.keys() - shapes.keys()):
        raise ValueError(f"the array {missing[0]!r} of its model is missing")
    if extra := sorted(shapes.keys() - variables.keys()):
        raise ValueError(f"it has an array {extra[0]!r:.80} that its model has not")
    for name, variable in variables.items():
        if shapes[name] != variable.get_value().shape:
            expected = variable.get_value().shape
            raise ValueError(f"{name} has the shape {shapes[name]}, its model's is {expected}")
        if dtypes[name] not in _DTYPES:
            raise ValueError(f"{name} is {dtypes[name]!r:.20}, expected {', '.join(_DTYPES)}")


# -- The header ------------------------------------------------------------------------------------


def _encode(architecture: Architecture) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(architecture, name) for name in _ARCHITECTURE}
    rule = architecture.rule
    if rule is not None:
        fields["rule"] = {half: list(map(_finite, getattr(rule, half))) for half in _RULE}
    return fields | {"options": dict(architecture.options)}


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"


def _header(metadata: Any) -> tuple[dict[str, Any], Description]:
    if not metadata or _KEY not in metadata:
        raise ValueError(f"its header has no entry {_KEY!r}, which models of this package have")
    header = parse_json(metadata[_KEY], "its header")
    expect(header, isinstance(header, dict), "an object", "its header")
    for name, value in (("format", FORMAT), ("version", VERSION)):
        expect(header.get(name), header.get(name) == value, repr(value), name)
    expect_fields(header, _FIELDS, "its header")
    names, about, given = header["class_names"], header["about"], header["architecture"]
    expect(names, isinstance(names, list), "a list", "class_names")
    expect(about, isinstance(about, dict), "an object", "about")
    means = {name: _numbers(header[name], name) for name in ("mean", "std")}
    description = Description(
        _architecture(given), tuple(names), **means, about=types.MappingProxyType(about)
    )
    _check(description, "")
    return header, description


def _architecture(given: Any) -> Architecture:
    where = "architecture"
    expect_fields(given, _ARCHITECTURE, where)
    for name, kind in (("model", str), ("family", str), ("num_classes", int), ("channels", int)):
        fits = isinstance(given[name], kind) and not isinstance(given[name], bool)
        expect(given[name], fits, f"a {kind.__name__}", f"{where}.{name}")
    options, size, rule = given["options"], given["image_size"], given["rule"]
    expect(options, isinstance(options, dict), "an object", f"{where}.options")
    pair = isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)
    expect(size, size is None or pair, "null or [height, width]", f"{where}.image_size")
    if rule is not None:
        expect(rule, isinstance(rule, dict), "null or an object", f"{where}.rule")
        expect_fields(rule, _RULE, f"{where}.rule")
        x, kernel = (tuple(math.inf if n == "inf" else n for n in rule[half]) for half in _RULE)
        rule = GradientRule(cast(Any, x), cast(Any, kernel))
    plain = {
        name: _hashable(value, f"{where}.options.{name:.80}") for name, value in options.items()
    }
    return Architecture(
        given["model"], given["family"], given["num_classes"],
        None if size is None else tuple(size), given["channels"],
        tuple(sorted(plain.items())), rule,
    )  # fmt: skip


def _hashable(value: Any, where: str) -> Any:
    expect(value, not isinstance(value, dict), "a plain value", where)
    return tuple(_hashable(one, where) for one in value) if isinstance(value, list) else value


def _check(description: Description, who: str) -> None:
    """Of a description by itself: whether it is one of a model with such images and classes.

    Raises:
      ValueError: what is not.
    """
    architecture, names = description.architecture, description.class_names
    if names and len(names) != architecture.num_classes:
        raise ValueError(f"{who}class_names: {architecture.num_classes} expected, got {len(names)}")
    if any(not isinstance(name, str) for name in names):
        raise ValueError(f"{who}class_names: strings expected, got {short(names)}")
    mean, std = description.mean, description.std
    if len(mean) != len(std) or len(mean) not in (0, architecture.channels):
        raise ValueError(
            f"{who}mean and std: {architecture.channels} numbers each expected, got "
            f"{short(mean)} and {short(std)}"
        )
    if not all(map(math.isfinite, (*mean, *std))) or any(one <= 0 for one in std):
        raise ValueError(
            f"{who}finite means and positive deviations expected, got {short(mean)} and "
            f"{short(std)}"
        )


def _check_numbers(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a description of a network that its arrays cannot be of, before it is built.

    Each number of an architecture is a size of an array, or at most one, or counts layers that
    have arrays of their own.
    """
    most = max(len(shapes), *(max(shape, default=1) for shape in shapes.values()), 1)
    if any(0 in shape for shape in shapes.values()):
        raise ValueError("it has an empty array")
    left: list[Any] = [architecture.options, architecture.num_classes, architecture.channels]
    while left:
        value = left.pop()
        if isinstance(value, tuple):
            left += value
        elif isinstance(value, int) and not 0 <= value <= most:
            raise ValueError(f"architecture: numbers from 0 to {most} expected, got {value}")
    for side in architecture.image_size or ():
        if not 1 <= side <= _LARGEST_SIDE:
            raise ValueError(f"image_size: 1 to {_LARGEST_SIDE} expected, got {side}")
    wide = "float64" in dict(architecture.options).values()
    if wide and jnp.result_type(float) != jnp.float64:
        raise ValueError("a model of float64 needs the environment variable JAX_ENABLE_X64=1")


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    fits = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    return tuple(map(float, expect(value, fits, "a list of numbers", where)))
