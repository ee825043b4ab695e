"""The network that another one learns from, out of the folder of its run."""

from pathlib import Path

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
        if read_result(folder) is None:
            raise UserError("expected the folder of a finished run")
        saved = read_fingerprint(folder)
        theirs = from_record(saved, folder / "config.json")
        data = entry(saved, "data", str, folder / "config.json")
    except UserError as error:
        raise UserError(f"--teacher {folder}: {error}", error.status) from None
    if data != dataset.fingerprint():
        raise UserError(f"--teacher {folder} was trained on {data}, not on {dataset.fingerprint()}")
    choose_model(theirs.model, dataset)
    model = build_model(theirs, theirs.family[0], dataset)
    recipe = optimizer.choose(theirs)
    tx = optimizer.make(theirs, recipe, lambda count: jnp.zeros(()), adder_mask(model))
    dtype = jnp.dtype("float64" if theirs.dtype == "float64" else "float32")
    graphdef, state = steps.initial_state(model, tx, dtype)
    if not saved_steps(folder):
        raise UserError(f"--teacher {folder} has no checkpoint")
    with Checkpoints(folder / "checkpoints", saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(state)
    if restored is None:
        raise UserError(f"--teacher {folder} has no checkpoint")
    state, _ = restored
    return Teacher(
        graphdef,
        (state["params"], state["model"]),
        config.distill_weight,
        config.distill_temperature,
    )
