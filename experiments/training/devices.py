"""Data parallelism: each device takes its part of a batch, all of them hold the parameters."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from experiments.common.errors import UserError
from experiments.images.streamed import StreamedImages
from experiments.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run, of all its processes.

    Attributes:
        mesh: the devices along the axis "data".
    """

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """Each device has the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sharded(self) -> NamedSharding:
        """Each device has its part of the first axis."""
        return NamedSharding(self.mesh, PartitionSpec("data"))

    def replicate(self, tree: Any) -> Any:
        """A tree of arrays, the same in every process, on each device."""
        return multihost_utils.host_local_array_to_global_array(tree, self.mesh, PartitionSpec())

    def rows(
        self, array: NDArray[Any] | StreamedImages, index: NDArray[np.integer[Any]]
    ) -> jax.Array:
        """`array[index]`, sharded; a process reads only the rows of its own devices."""

        def part(place: Any) -> NDArray[Any]:
            chosen: NDArray[Any] = array[index[place[0]]]
            return chosen

        shape = (len(index), *array.shape[1:])
        return jax.make_array_from_callback(shape, self.sharded, part)


def choose(config: TrainConfig) -> Devices:
    """The devices that the configuration asks for: by default all that there are.

    Raises:
        UserError: there are fewer, or a batch cannot be shared out among them evenly.
    """
    local = jax.local_device_count()
    if config.devices is not None and config.devices > local:
        raise UserError(f"--devices {config.devices}: this process has {local}")
    devices = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process)[: config.devices]
    ]
    if config.batch_size % len(devices):
        raise UserError(
            f"--batch-size {config.batch_size} is not a multiple of the {len(devices)} devices "
            "that share each batch; --devices takes fewer of them"
        )
    return Devices(Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,)))
