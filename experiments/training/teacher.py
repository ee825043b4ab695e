"""The network that another one learns from, out of the folder of its run."""

from pathlib import Path

from experiments.common.errors import UserError
from experiments.images.dataset import Dataset
from experiments.training.config import TrainConfig
from experiments.training.distillation import Teacher
from experiments.training.start import trained


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
        graphdef, state = trained(folder, dataset)
    except UserError as error:
        raise UserError(f"--teacher {folder}: {error}", error.status) from None
    return Teacher(graphdef, state, config.distill_weight, config.distill_temperature)
