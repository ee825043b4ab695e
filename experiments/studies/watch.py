"""Looking at what the layers of a model are given and what they give."""

from collections.abc import Callable
from typing import Any

from flax import nnx


class Watched(nnx.Module):
    """Stands in a model in a layer's place and lets a function call the layer.

    Args:
        layer: what is replaced.
        call: `call(layer, *args, **kwargs)`, which returns what the model goes on with.

    Example:
        >>> seen = []
        >>> def call(layer, x):
        ...     seen.append(x)
        ...     return layer(x)
        >>> model = nnx.Sequential(nnx.Dropout(0), nnx.Dropout(0))
        >>> model.layers[1] = Watched(model.layers[1], call)
        >>> model(2), seen
        (2, [2])
    """

    def __init__(self, layer: Any, call: Callable[..., Any]):
        self.layer = layer
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.layer, *args, **kwargs)
