"""The network that another one learns from, out of the folder of its run."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.common.errors import UserError
from experiments.common.files import entry
from experiments.images.dataset import Dataset
from experiments.training import optimizer, steps
from experiments.training.build import build_model, choose_model
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import TrainConfig, from_record
from experiments.training.distillation import Teacher
from experiments.training.folder import read_fingerprint, read_result, saved_steps
from jadder.nn import adder_mask


def load_teacher(config: TrainConfig, dataset: Dataset) -> Teacher | None:
    """The network of the finished run that `config.teacher` names, None where it names none.

    Raises:
        UserError: there is no such run, it has not finished, or it was trained or tested on other
            images than `dataset`.
    """
    if config.teacher is None:
        return None
    folder = Path(config.teacher)
    try:
        graphdef, state = _trained(folder, dataset)
    except UserError as error:
        raise UserError(f"--teacher {folder}: {error}", error.status) from None
    return Teacher(graphdef, state, config.distill_weight, config.distill_temperature)


def _trained(folder: Path, dataset: Dataset) -> tuple[Any, tuple[Any, Any]]:
    """The structure and the state of the network of a finished run."""
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
    model = build_model(theirs, theirs.family[0], dataset)
    recipe = optimizer.choose(theirs)
    tx = optimizer.make(theirs, recipe, lambda count: jnp.zeros(()), adder_mask(model))
    dtype = jnp.dtype("float64" if theirs.dtype == "float64" else "float32")
    graphdef, state = steps.initial_state(model, tx, dtype)
    with Checkpoints(folder / "checkpoints", saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(state)
    if restored is None:
        raise UserError("it has no checkpoint")
    state, _ = restored
    return graphdef, (state["params"], state["model"])
