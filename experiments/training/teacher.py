"""The network that another one learns from, out of the folder of its run."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from experiments.common.errors import UserError
from experiments.common.files import read_json
from experiments.images.dataset import Dataset
from experiments.training import build, optimizer, steps
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import TrainConfig
from experiments.training.distillation import Teacher
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
    if not (folder / "result.json").is_file():
        raise UserError(f"--teacher {folder}: expected the folder of a finished run")
    saved = read_json(folder / "config.json")["run"]
    if saved["data"] != dataset.fingerprint():
        raise UserError(
            f"--teacher {folder} was trained on {saved['data']}, not on {dataset.fingerprint()}"
        )
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    options = {name: value for name, value in saved.items() if name in known}
    options["family"] = (saved["family"],)
    options["model_options"] = tuple(f"{k}={v}" for k, v in saved["model_options"].items())
    # Its own teacher is of no use any more.
    theirs = TrainConfig(**{**options, "teacher": None})
    model = build.build_model(theirs, saved["family"], dataset)
    recipe = optimizer.choose(theirs)
    tx = optimizer.make(theirs, recipe, lambda count: jnp.zeros(()), adder_mask(model))
    dtype = jnp.dtype("float64" if theirs.dtype == "float64" else "float32")
    graphdef, state = steps.initial_state(model, tx, dtype)
    with Checkpoints(folder / "checkpoints", saved) as checkpoints:
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
