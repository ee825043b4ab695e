"""The implementations of the adder products: which there are, and which one a call gets."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jadder.kernels import cpu, reference, xla
from jadder.kernels.by_platform import ByPlatform, Refused
from jadder.kernels.differentiable import Differentiable, XlaLoops
from jadder.kernels.euclid import EuclidXlaKernels
from jadder.kernels.interface import Kernels
from jadder.kernels.partitioned import Partitioned
from jadder.kernels.spec import ConvSpec
from jadder.warning import AdderWarning

Implementation = Literal[
    "xla", "cpu", "cpu_fast", "cpu_int16", "mosaic_gpu", "mosaic_tpu", "reference"
]


def _on_many_devices(kernels: Kernels) -> Kernels:
    return Differentiable(Partitioned(kernels), by=Partitioned(XlaLoops()))


def _only_on(
    platform: str, name: str, kernels: Kernels, unavailable: Callable[[], str | None]
) -> Kernels:
    reason = f"implementation={name!r} computes on {platform} only"
    return ByPlatform(platform, kernels, default=Refused(reason, unavailable))


def _native(name: str, kernels: cpu.CpuKernels) -> Kernels:
    return _on_many_devices(_only_on("cpu", name, kernels, cpu.unavailable))


_KERNELS: Mapping[str, Kernels] = MappingProxyType(
    {
        "xla": _on_many_devices(xla),
        "cpu": _native("cpu", cpu.CpuKernels()),
        "cpu_fast": _native("cpu_fast", cpu.CpuKernels("fast")),
        "cpu_int16": _native("cpu_int16", cpu.CpuKernels("int16")),
        "reference": reference,
    }
)
_MOSAIC = {
    "mosaic_gpu": ("cuda", "MosaicGpuKernels"),
    "mosaic_tpu": ("tpu", "MosaicTpuKernels"),
}
_BEST = _on_many_devices(ByPlatform("cpu", cpu.CpuKernels(), default=xla))


class Availability(NamedTuple):
    """Whether an implementation can be used here, and what it is or why it cannot."""

    available: bool
    about: str


def implementations() -> dict[str, Availability]:
    """Which implementations of the adder products can be used here, and why others cannot.

    Example:
      >>> import jadder
      >>> jadder.implementations()["xla"]
      Availability(available=True, about='loops that XLA compiles, on any platform')
    """
    missing = cpu.unavailable()
    native = fast = int16 = Availability(False, missing or "")
    if missing is None:
        code = f"native code for the CPU ({cpu.instruction_set()}): floats in float32, and bytes"
        native = Availability(True, code)
        fast = Availability(True, f"{code}; forward products a third quicker, less exact")
        int16 = Availability(True, f"{code}; products and gradients of 16-bit integers, less exact")
    gpu, tpu = (_mosaic(name).unavailable() for name in ("mosaic_gpu", "mosaic_tpu"))
    return {
        "cpu": native,
        "cpu_fast": fast,
        "cpu_int16": int16,
        "mosaic_gpu": Availability(gpu is None, gpu or "experimental: Pallas for Hopper or newer"),
        "mosaic_tpu": Availability(tpu is None, tpu or "experimental: Pallas for TPU"),
        "reference": Availability(True, "the literal definition, for small tests"),
        "xla": Availability(True, "loops that XLA compiles, on any platform"),
    }


def select(
    name: str,
    implementation: str | None,
    dtype: jnp.dtype,
    spec: ConvSpec | None,
    out_dtype: jnp.dtype,
) -> Kernels:
    """The kernels for operands of ``dtype`` that are summed in ``out_dtype``.

    Args:
      name: of the caller, for errors.
      implementation: None for the best that can do it; the platform is then chosen when the
        program is lowered.
      spec: of a convolution; None for a matmul.

    Raises:
      ValueError: an implementation that there is not, or that cannot do it.
    """
    check_implementation(name, implementation)
    if implementation in ("xla", "reference"):
        return _KERNELS[implementation]
    if implementation in _MOSAIC:
        module = _mosaic(implementation)
        refusal = module.unsupported(dtype, spec, out_dtype)
        platform, name_of_kernels = _MOSAIC[implementation]
        there = getattr(module, name_of_kernels)()
        kernels: Kernels = _only_on(platform, implementation, there, module.unavailable)
        kernels = Differentiable(kernels, by=XlaLoops())
    else:
        refusal = cpu.unavailable() or cpu.unsupported(dtype, spec, out_dtype)
        kernels = _BEST if implementation is None else _KERNELS[implementation]
    if refusal is None:
        return kernels
    if implementation is None:
        if cpu.unsupported(dtype, spec, out_dtype) is None:
            _say_why_not_native()
        return _KERNELS["xla"]
    raise ValueError(f"{name}: implementation={implementation!r} cannot be used: {refusal}")


def select_euclid(
    name: str,
    implementation: str | None,
    dtype: jnp.dtype,
    spec: ConvSpec | None,
    out_dtype: jnp.dtype,
    precision: lax.PrecisionLike,
) -> Kernels | None:
    """The kernels of the Euclid product, or None for XLA's matrix products.

    Args are those of `select`, and ``precision``: where None leaves a program to XLA after all.

    Raises:
      ValueError: an implementation that there is not, or native code that cannot do it.
    """
    check_implementation(name, implementation)
    if implementation is not None and not implementation.startswith("cpu"):
        return None
    refusal = cpu.unavailable() or cpu.unsupported(dtype, spec, out_dtype)
    if refusal is not None:
        if implementation is None:
            return None
        raise ValueError(f"{name}: implementation={implementation!r} cannot be used: {refusal}")
    form: Literal["exact", "int16"] = "int16" if implementation == "cpu_int16" else "exact"
    native, by_xla = cpu.CpuKernels(form, "l2"), EuclidXlaKernels(precision)
    if implementation is None:
        kernels: Kernels = ByPlatform("cpu", native, default=by_xla)
    else:
        kernels = _only_on("cpu", implementation, native, cpu.unavailable)
    return Differentiable(Partitioned(kernels, by_xla), by=Partitioned(by_xla, by_xla))


def _say_why_not_native() -> None:
    """Warns where the best would be native code; Python shows a warning of one line but once."""
    missing = cpu.unavailable()
    if missing is not None and jax.default_backend() == "cpu":
        warnings.warn(
            f"the adder products run without native code, several times slower: {missing} "
            "(jadder.implementations() says what there is)",
            AdderWarning,
            stacklevel=1,
        )


def check_implementation(name: str, implementation: str | None) -> None:
    """Refuses a name that no implementation has; whether it can be used here is `select`'s to say.

    Raises:
      ValueError: with the names that there are.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"{name}: implementation must be None or one of {sorted(get_args(Implementation))}, "
            f"got {implementation!r}"
        )


def _mosaic(name: str) -> Any:
    """A module of Pallas kernels; not imported before, as Pallas takes a tenth of a second."""
    return importlib.import_module(f"jadder.kernels.{name}")
