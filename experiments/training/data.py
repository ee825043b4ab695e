"""The images that a configuration names."""

from typing import Any

from experiments.images.dataset import Dataset
from experiments.images.load import load
from experiments.training.config import TrainConfig


def dataset_of(config: TrainConfig) -> Dataset:
    """Reads them.

    Raises:
        UserError: they are not to be had.
    """
    return load(**source_of(config))


def source_of(config: TrainConfig) -> dict[str, Any]:
    """What decides which images they are: the arguments of `load`."""
    return {
        "name": config.dataset,
        "data_dir": config.data_dir,
        "image_size": config.image_size,
        "limit_train": config.limit_train,
        "validation": config.validation,
        "image_memory": config.image_memory,
        "random_crops": config.random_crop is not None,
        "seed": config.seed if config.dataset.startswith("folder:") else 0,
    }
