"""Where a run's network begins: anew, or with what an earlier run has learnt."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jadder.models
from experiments.common.errors import UserError
from experiments.common.files import entry
from experiments.images.dataset import Dataset
from experiments.training import steps
from experiments.training.build import build_model, choose_model, refusals
from experiments.training.checkpoint import Checkpoints, describe
from experiments.training.config import TrainConfig, from_record
from experiments.training.folder import read_fingerprint, read_result, saved_steps
from jadder import fake_quantize

CALIBRATION_IMAGES = 512


def starting_model(
    config: TrainConfig, family: str, dataset: Dataset, after: frozenset[str] = frozenset()
) -> nnx.Module:
    """The network of one family as its training finds it.

    Args:
        config: of the run.
        family: of its families.
        dataset: its images.
        after: folders of the runs that begin with this one, directly or not.

    Raises:
        UserError: the network cannot be built, or not begin where the configuration says.
    """
    model = build_model(config, family, dataset)
    if config.start is not None:
        place = Path(config.start)
        try:
            known = of_file(place, model) if place.is_file() else trained(place, dataset, after)[1]
            if not place.is_file():
                _check_family(place, family)
            model = _with_state(model, *known)
        except UserError as error:
            raise UserError(f"--start {place}: {error}", error.status) from None
    if config.bits is not None:
        with refusals(f"--bits {config.bits}"):
            model = fake_quantize(model, calibration_images(dataset), bits=config.bits,
                                  mean=dataset.mean, std=dataset.std)  # fmt: skip
    return model


def _check_family(folder: Path, family: str) -> None:
    theirs = from_record(read_fingerprint(folder), folder / "config.json").family[0]
    if theirs != family:
        raise UserError(f"it is the run of another network: its family is {theirs}, not {family}")


def of_file(path: Path, like: Any) -> tuple[Any, Any]:
    """The parameters of a model file, and what else its network keeps.

    Args:
        path: of the file.
        like: a network, with whose structure the file's must agree, but for the gradient rule and
            the size of the images.

    Raises:
        UserError: the file holds no model, or one of another structure.
    """
    try:
        model, description = jadder.models.load(path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    theirs, own = vars(description.architecture), vars(like.architecture)
    for name in own.keys() - {"rule", "image_size"}:
        if theirs[name] != own[name]:
            raise UserError(
                f"it is the run of another network: its {name} is {theirs[name]}, not {own[name]}"
            )
    _, params, rest = steps.split(model)
    return params, rest


def calibration_images(dataset: Dataset) -> Any:
    """The first training images, with which a network is quantised."""
    count = min(CALIBRATION_IMAGES, len(dataset.train_images))
    return np.asarray(dataset.train_images[np.arange(count)])


def _with_state(model: nnx.Module, params: Any, rest: Any) -> nnx.Module:
    graphdef, *own = steps.split(model)
    given = (params, rest)
    if describe(own) != describe(given):
        raise UserError("it is the run of another network")
    merged: nnx.Module = nnx.merge(graphdef, *jax.tree.map(jnp.asarray, given))
    return merged


def trained(
    folder: Path, dataset: Dataset, after: frozenset[str] = frozenset()
) -> tuple[Any, tuple[Any, Any]]:
    """The structure of a finished run's network, its parameters and what else it keeps.

    Args:
        folder: of the run.
        dataset: its images.
        after: as of `starting_model`.

    Raises:
        UserError: there is no such run, it has not finished, or it was trained or tested on other
            images than `dataset`.
    """
    place = os.path.realpath(folder)
    if place in after:
        raise UserError("it begins with itself")
    if read_result(folder) is None:
        raise UserError("expected the folder of a finished run")
    saved, where = read_fingerprint(folder), folder / "config.json"
    theirs = from_record(saved, where)
    data = entry(saved, "data", str, where)
    if data != dataset.fingerprint():
        raise UserError(f"it was trained on {data}, not on {dataset.fingerprint()}")
    if not saved_steps(folder):
        raise UserError("it has no checkpoint")
    choose_model(theirs.model, dataset)
    if theirs.bits is None:  # whose grids are those of the network that it began with
        theirs = dataclasses.replace(theirs, start=None)
    model = starting_model(theirs, theirs.family[0], dataset, after | {place})
    graphdef, params, rest = steps.split(model)
    with Checkpoints(folder / "checkpoints", saved, read_only=True) as checkpoints:
        restored = checkpoints.restore_part({"params": params, "model": rest})
    if restored is None:
        raise UserError("it has no checkpoint")
    return graphdef, (restored["params"], restored["model"])
