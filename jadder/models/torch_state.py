"""Parameters and statistics from PyTorch, given as NumPy arrays."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jadder.nn import AdderKernel

_NORM_NAMES = {"scale": "weight", "mean": "running_mean", "var": "running_var"}


def load_torch_state(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Replaces all parameters and statistics of ``model`` by those of a PyTorch state dict.

    A name is the path of the module in ``model``, then PyTorch's name of the array:
    ``layer2.0.downsample.0.adder`` for an adder kernel, ``.weight`` for any other kernel or scale,
    ``.bias``, ``.running_mean`` and ``.running_var``. The ResNets have the module names of the
    AdderNet repository (and of torchvision, but for the normalisation of the logits). Kernels are
    turned from OIHW to HWIO and from OI to IO; a 1 x 1 kernel fits a linear layer. Values are cast
    to the dtype of the parameter that they replace. ``num_batches_tracked`` is ignored, and so is a
    ``module.`` before every name, as ``DataParallel`` leaves it.

    Args:
      model: a model of this package, changed in place. It may be abstract, as ``nnx.eval_shape``
        makes it, since nothing of its initial values is used.
      arrays: the state dict, e.g. ``{k: v.numpy() for k, v in state_dict.items()}``.

    Raises:
      ValueError: missing, left-over, misshapen or non-floating arrays, all of them listed; the
        model is as it was before.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
      >>> load_torch_state(layer, {"weight": np.ones((3, 2))})
      >>> layer.kernel.shape
      (2, 3)
      >>> load_torch_state(layer, {"kernel": np.ones((3, 2))})
      Traceback (most recent call last):
      ValueError: the PyTorch state does not fit the model:
        kernel: left over
        weight: missing, expected (3, 2)
    """
    arrays = _without_prefix(arrays, "module.")
    variables = {
        _torch_name(path, variable): variable
        for path, variable in nnx.iter_graph(model)
        if isinstance(variable, (nnx.Param, nnx.BatchStat))
    }
    ignored = {
        ".".join(map(str, (*path, "num_batches_tracked")))
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.BatchNorm)
    }
    faults = [f"{name}: left over" for name in arrays.keys() - variables.keys() - ignored]
    values = {}
    for name, variable in variables.items():
        expected = _torch_shape(variable.shape)
        if name not in arrays:
            faults.append(f"{name}: missing, expected {expected}")
            continue
        array = np.asarray(arrays[name])
        one_by_one = (*expected, 1, 1) if len(expected) == 2 else expected
        if array.shape not in (expected, one_by_one):
            faults.append(f"{name}: has shape {array.shape}, expected {expected}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            faults.append(f"{name}: has dtype {array.dtype}, expected a floating one")
        else:
            values[name] = _from_torch(array.reshape(expected))
    if faults:
        listed = "".join(f"\n  {fault}" for fault in sorted(faults))
        raise ValueError(f"the PyTorch state does not fit the model:{listed}")
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(values[name], variable.dtype))


def _without_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
    if not all(name.startswith(prefix) for name in arrays):
        return arrays
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _torch_name(path: tuple[object, ...], variable: nnx.Variable[Any]) -> str:
    *module, name = map(str, path)
    if isinstance(variable, AdderKernel):
        name = "adder"
    elif name == "kernel":
        name = "weight"
    return ".".join((*module, _NORM_NAMES.get(name, name)))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(*window, in, out) to (out, in, *window); a vector stays."""
    return shape if len(shape) < 2 else (shape[-1], shape[-2], *shape[:-2])


def _from_torch(array: np.ndarray) -> np.ndarray:
    """(out, in, *window) to (*window, in, out); a vector stays."""
    return array if array.ndim < 2 else np.moveaxis(array, (0, 1), (-1, -2))
