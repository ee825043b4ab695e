"""A run's network as a file that others open without the run or its data: model.safetensors."""

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from experiments.common.errors import UserError
from experiments.common.files import is_there, write_bytes
from experiments.images.dataset import Dataset
from experiments.training.config import from_record
from experiments.training.data import dataset_of
from experiments.training.folder import Result, read_fingerprint, read_result
from experiments.training.start import trained
from jadder.models import Description, SavedModel, load
from jadder.models.files import to_bytes

NAME = "model.safetensors"
"""In the folder of a finished run. A network of --bits has none: a file does not hold its grids."""


def content(
    model: nnx.Module, dataset: Dataset, about: dict[str, Any], param_dtype: Any = None
) -> bytes:
    """The file of a network for a data set's images and classes."""
    return to_bytes(
        model, class_names=dataset.class_names, mean=dataset.mean, std=dataset.std, about=about,
        param_dtype=param_dtype,
    )  # fmt: skip


def about(result: Result) -> dict[str, Any]:
    """What a file says of the run that it comes from."""
    kept = ("test_accuracy", "epochs", "command", "note")
    said = {"data": result["run"].get("dataset"), "seed": result["run"].get("seed")}
    return said | {key: result[key] for key in kept if key in result}


def write(folder: Path, model: nnx.Module, dataset: Dataset, result: Result) -> None:
    """Writes the file into a run's folder, unless the network has --bits."""
    if result["run"].get("bits") is None:
        write_bytes(folder / NAME, content(model, dataset, about(result)))


def read(path: Path) -> SavedModel:
    """The network of a file.

    Raises:
        UserError: there is none, or the file holds something else.
    """
    try:
        return load(path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None


def open_model(place: Path, data_dir: str | None = None) -> SavedModel:
    """The network of a file, or of a finished run.

    A run that left no file, because it ended before there were any or has --bits, is read from its
    checkpoint. That needs the images it was trained on.

    Args:
        place: the file or the run's folder.
        data_dir: as of experiments.train, for such a run.

    Raises:
        UserError: there is neither, or the images are not to be had.
    """
    if not place.is_dir():
        return read(place)
    result = read_result(place)
    if result is None:
        raise UserError(f"{place}: expected a model file or the folder of a finished run")
    if is_there(place / NAME):
        return read(place / NAME)
    dataset, model = of_checkpoint(place, data_dir)
    model.eval()
    return SavedModel(model, Description(
        model.architecture, dataset.class_names, dataset.mean, dataset.std, about(result)
    ))  # fmt: skip


def of_checkpoint(folder: Path, data_dir: str | None) -> tuple[Dataset, Any]:
    """The images of a finished run, and its network as its last checkpoint has it.

    Raises:
        UserError: there is no such run, or the images are not to be had.
    """
    config = from_record(read_fingerprint(folder), folder / "config.json")
    try:
        dataset = dataset_of(dataclasses.replace(config, data_dir=data_dir))
        graphdef, (params, rest) = trained(folder, dataset)
    except UserError as error:
        raise UserError(f"{folder}: {error}", error.status) from None
    return dataset, nnx.merge(graphdef, params, rest)
