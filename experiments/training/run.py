"""One training run: from a configuration to a folder with its metrics, curves and result."""

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.environment import hardware, peak_memory, versions
from experiments.common.errors import UserError
from experiments.common.files import is_there, write_json
from experiments.common.interrupt import Interrupted, StopRequest
from experiments.images.dataset import Dataset, Images, Labels
from experiments.images.streamed import Crops, StreamedImages, cropped
from experiments.training import annealing, devices, longer, model_file, optimizer, steps
from experiments.training.checkpoint import (
    Checkpoints,
    check_fingerprint,
    checksum,
    describe,
    is_of_run,
)
from experiments.training.clock import Clock
from experiments.training.config import TrainConfig
from experiments.training.curves import draw
from experiments.training.folder import Result, read_fingerprint, read_result, saved_steps
from experiments.training.metrics import MetricsFile, Row, are_complete, plain, read_rows
from experiments.training.processes import Votes, is_first, make_shared
from experiments.training.progress import Progress
from experiments.training.start import starting_model
from experiments.training.teacher import load_teacher
from jadder.nn import adder_mask

Wrap = Callable[[optax.GradientTransformation, int], optax.GradientTransformation]
Order = np.ndarray[Any, np.dtype[np.int32]]


class Diverged(UserError):
    """A run whose loss is not finite."""

    def __init__(self, name: str, loss: float, step: int):
        super().__init__(
            f"the training loss of {name} is {loss} at step {step}: a lower --learning-rate may "
            "help",
            status=1,
        )
        self.step = step


class Run:
    """The training of one family's network, on all devices and in all processes.

    The first process writes the folder's files; all of them write its checkpoints.

    Args:
        config: the configuration, whose model is a name (not "auto").
        family: which of its families.
        dataset: the images.
        command: the command line, for the record.
        wrap: from the optimizer and the number of steps, makes an optimizer that does the same and
            keeps a record in its state.

    Raises:
        UserError: the folder holds a run of another configuration, or the configuration does
            not suit the data or the devices.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: str,
        dataset: Dataset,
        command: str,
        wrap: Wrap | None = None,
    ):
        self.config, self.family, self.dataset, self.command = config, family, dataset, command
        self.name = config.run_name(family)
        self.folder = Path(config.out_dir) / self.name
        images = len(dataset.train_images)
        if config.batch_size > images:
            raise UserError(
                f"--batch-size {config.batch_size} is more than the {images} training images"
            )
        self.devices = devices.choose(config)
        self.dtype = jnp.dtype("float64" if config.dtype == "float64" else "float32")
        self.steps_per_epoch = images // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs
        if self.total_steps >= 2**31:
            raise UserError(
                f"--epochs {config.epochs} are {self.total_steps} steps, expected below 2**31"
            )
        self.recipe = optimizer.choose(config)
        self.schedule = optimizer.warmup_cosine(
            self.recipe.learning_rate,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=config.warmup_epochs,
        )
        model = starting_model(config, family, dataset)
        tx = optimizer.make(config, self.recipe, self.schedule, adder_mask(model))
        tx = tx if wrap is None else wrap(tx, self.total_steps)
        self.graphdef, state = steps.initial_state(model, tx, self.dtype)
        self.state = self.devices.replicate(state)
        teacher = load_teacher(config, dataset)
        self.known = () if teacher is None else (self.devices.replicate(teacher.state),)
        graphdefs = annealing.stages(model, config.anneal)
        self.train_steps = [
            steps.make_train_step(
                graphdef, tx, dataset, self.devices,
                dtype=self.dtype, seed=config.seed, augment=config.augment,
                shift=config.random_crop is None, label_smoothing=config.label_smoothing,
                teacher=teacher,
            )
            for graphdef in graphdefs
        ]  # fmt: skip
        self.eval_steps = [
            steps.make_eval_step(graphdef, dataset, self.devices, dtype=self.dtype)
            for graphdef in graphdefs
        ]
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state["params"]))
        self.rows: list[Row] = []
        self.fingerprint = {
            "family": family,
            **config.science(),
            **vars(self.recipe),
            "teacher": None if teacher is None else checksum(teacher.state[0]),
            "start_parameters": None if config.start is None else checksum(state["params"]),
            "data": dataset.fingerprint(),
            "parameters": describe(self.state["params"]),
        }
        if is_there(self.folder / "config.json"):
            self.fingerprint = longer.continued(self.folder, self.fingerprint, resume=config.resume)

    def finished(self) -> Result | None:
        """The result, if the run has come to its end; mends metrics.jsonl beside it.

        A run that is being made longer has not, whatever result it had before.

        Raises:
            UserError: the result, the rows or, of a run that has not, the newest checkpoint are
                damaged or of another run.
        """
        result = read_result(self.folder)
        if result is None or longer.is_shorter(result["run"], self.fingerprint):
            self.rows = self.saved_rows()
            return None
        check_fingerprint(result["run"], self.fingerprint, self.folder / "result.json")
        path = self.folder / "metrics.jsonl"
        self.rows = read_rows(path)
        if not self._are_all(self.rows, result):
            rows = self.saved_rows()
            if not self._are_all(rows, result):
                raise UserError(
                    f"{path} lacks rows that no checkpoint has, or has others: put the file back, "
                    "or begin anew with --name or --out-dir"
                )
            self._metrics(rows)
        return result

    def _are_all(self, rows: Any, result: Result) -> bool:
        """Whether these are the rows that a result comes from."""
        return (
            are_complete(rows, steps_per_epoch=self.steps_per_epoch)
            and len(rows) == self.config.epochs
            and rows[-1]["test_accuracy"] == result["test_accuracy"]
        )

    def saved_rows(self) -> list[Row]:
        """The rows that the newest checkpoint knows of, [] where there is none.

        Raises:
            UserError: the checkpoint is damaged or of another run.
        """
        folder = self.folder / "checkpoints"
        if not folder.is_dir():
            return []
        with self._checkpoints(read_only=True) as checkpoints:
            progress = checkpoints.progress()
        return [] if progress is None else self._rows(progress)

    def _checkpoints(self, *, read_only: bool = False) -> Checkpoints:
        """Those of the folder, also from before the run was made longer."""
        return Checkpoints(
            self.folder / "checkpoints",
            self.fingerprint,
            or_these=longer.lengths_before(self.fingerprint),
            read_only=read_only,
        )

    def _rows(self, progress: dict[str, Any]) -> list[Row]:
        """The rows of a checkpoint; earlier versions kept them in metrics.jsonl alone."""
        path, epochs = self.folder / "metrics.jsonl", progress["epochs"]
        rows = progress["rows"] if "rows" in progress else read_rows(path)[:epochs]
        if not are_complete(rows, steps_per_epoch=self.steps_per_epoch) or len(rows) != epochs:
            raise UserError(
                f"{path} does not hold the rows of the {epochs} epochs that the checkpoint has "
                "done: put the file back, or begin anew with --name or --out-dir"
            )
        return rows

    def _metrics(self, rows: list[Row]) -> MetricsFile:
        """metrics.jsonl with these rows, and perhaps a word that it had others."""
        path = self.folder / "metrics.jsonl"
        if is_first() and read_rows(path) != rows:
            print(f"{path} is written anew, with the rows of the checkpoint", file=sys.stderr)
        metrics = MetricsFile(path, rows, write=is_first())
        self.rows = metrics.rows
        return metrics

    def train(self, stop: StopRequest) -> Result:
        """Trains to the end, from the last checkpoint if there is one.

        Raises:
            Interrupted: `stop` was requested; the state has been saved.
            Diverged: the loss of an epoch is not finite.
            UserError: the checkpoint is not this run's, or the disk is full.
        """
        make_shared(self.folder)
        begun = is_there(self.folder / "config.json")
        with self._checkpoints() as checkpoints:
            restored = checkpoints.restore(self.state)
            rows: list[Row] = []
            seconds = 0.0
            if restored is not None:
                self.state, progress = restored
                rows, seconds = self._rows(progress), progress["seconds"]
                self._check_step(len(rows))
            elif begun and is_first():
                print(f"{self.folder} has no checkpoint yet: begins with step 0", file=sys.stderr)
            if is_first() and not (begun and self._is_recorded()):
                self._record()
            if is_first():
                (self.folder / "result.json").unlink(missing_ok=True)
            metrics = self._metrics(rows)
            self._loop(checkpoints, metrics, stop, seconds)
        return self._finish(metrics.rows)

    def _is_recorded(self) -> bool:
        return is_of_run(read_fingerprint(self.folder), self.fingerprint)

    def _record(self) -> None:
        """Writes config.json, anew where the run is made longer, whose result is none any more."""
        said = longer.record(self.folder, self.fingerprint, self.command)
        write_json(self.folder / "config.json", {**said, "versions": versions()})
        if (self.folder / "result.json").exists():
            longer.say(self.folder, self.fingerprint, float(self.schedule(self.state["step"])))

    def _check_step(self, epochs: int) -> None:
        """Raises UserError unless the restored step is one of the epoch after the rows'."""
        step, first = int(self.state["step"]), epochs * self.steps_per_epoch
        if not first <= step <= min(first + self.steps_per_epoch, self.total_steps):
            raise UserError(
                f"the checkpoint of {self.folder} is of step {step}, but has the rows of {epochs} "
                f"epochs of {self.steps_per_epoch} steps"
            )

    def _loop(
        self, checkpoints: Checkpoints, metrics: MetricsFile, stop: StopRequest, before: float
    ) -> None:
        config, dataset, rows = self.config, self.dataset, list(metrics.rows)
        clock, votes = Clock(before), Votes()
        step = int(self.state["step"])
        total, done = config.epochs * self.images_per_epoch, step * config.batch_size

        def save() -> None:
            checkpoints.save(step, self.state, {
                "epochs": len(rows), "seconds": clock.seconds(), "rows": rows
            })  # fmt: skip
            clock.saved()

        def stop_if_asked(*, may_save: bool = False) -> None:
            due = may_save and clock.seconds_since_save() > config.checkpoint_every
            signum, due = votes(stop.signum, due)
            if signum is not None or due:
                save()
            if signum is not None:
                raise Interrupted(
                    f"{self.name} stopped after {step} of {self.total_steps} steps", signum
                )

        with Progress(self.name, total, done, silent=not is_first()) as bar:
            for epoch in range(len(rows), config.epochs):
                order = epoch_order(config.seed, epoch, len(dataset.train_images))
                clock.start_epoch()
                first = step
                while step < (epoch + 1) * self.steps_per_epoch:
                    batch = self._batch(order, step - epoch * self.steps_per_epoch, epoch)
                    train_step = self.train_steps[self.stage(step)]
                    self.state, sums = train_step(self.state, *batch, *self.known)
                    step += 1
                    if clock.fetch_due():
                        loss, accuracy = means(sums)
                        clock.fetched()
                        bar.show(step * config.batch_size, loss, accuracy)
                    # After the last one comes a checkpoint with the epoch's row.
                    stop_if_asked(may_save=step % self.steps_per_epoch != 0)
                train = means(self.state["sums"])
                rate = (step - first) * config.batch_size / clock.epoch_seconds()
                bar.show(step * config.batch_size, *train)
                self._check_finite(train[0], step)
                tested = self.evaluate(
                    dataset.test_images, dataset.test_labels, after_batch=stop_if_asked
                )
                row = self._row(epoch + 1, step, train, tested, clock.seconds(), rate)
                rows.append(plain(row))
                self.state["sums"] = self._zero_sums()
                save()
                metrics.append(plain(row))  # never without a checkpoint that has it
                last = epoch + 1 == config.epochs  # drawn when the run is finished
                if is_first() and not last and clock.draw_due():
                    draw(self.folder / "curves.png", self.name, {self.family: rows})
                bar.line(describe_row(self.name, config.epochs, row))

    @property
    def images_per_epoch(self) -> int:
        return self.steps_per_epoch * self.config.batch_size

    def stage(self, step: int) -> int:
        """Which of the stages of annealing a step (from 0) belongs to; the only one without."""
        return annealing.stage_of(step, self.total_steps, self.config.anneal)

    def _batch(self, order: Order, number: int, epoch: int = 0) -> tuple[jax.Array, jax.Array]:
        """The images and labels of one step of an epoch (from 0)."""
        index = order[number * self.config.batch_size :][: self.config.batch_size]
        images, labels = self.dataset.train_images, self.dataset.train_labels
        if self.config.random_crop is not None:
            images = cropped(images, Crops(self.config.random_crop, self.config.seed, epoch))
        return self.devices.rows(images, index), self.devices.rows(labels, index)

    def _zero_sums(self) -> Any:
        return self.devices.replicate(steps.zero_sums(self.dtype))

    def evaluate(
        self,
        images: Images | StreamedImages,
        labels: Labels,
        *,
        after_batch: Callable[[], None] = lambda: None,
    ) -> tuple[float, float]:
        """Mean loss and accuracy of the present state on images, with running statistics."""
        rows, sums = self.devices.rows, self._zero_sums()
        eval_step = self.eval_steps[self.stage(max(0, int(self.state["step"]) - 1))]
        for start in range(0, len(images), self.config.batch_size):
            # The last batch is filled up with an image that does not count.
            place = start + np.arange(self.config.batch_size)
            index, counts = np.minimum(place, len(images) - 1), place < len(images)
            batch = rows(images, index), rows(labels, index), rows(counts, place - start)
            sums = eval_step(self.state["params"], self.state["model"], *batch, sums)
            after_batch()
        return means(sums)

    def restore(self) -> None:
        """Takes the state of the newest checkpoint.

        Raises:
            UserError: there is none, or it is not this run's.
        """
        folder = self.folder / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"{self.folder} has no checkpoint")
        with self._checkpoints(read_only=True) as checkpoints:
            restored = checkpoints.restore(self.state)
        if restored is None:
            raise UserError(f"{self.folder} has no checkpoint")
        self.state, _ = restored

    def _check_finite(self, loss: float, step: int) -> None:
        if not np.isfinite(loss):
            raise Diverged(self.name, loss, step)

    def _row(
        self, epoch: int, step: int, train: Any, tested: Any, seconds: float, rate: float
    ) -> Row:
        return {
            "epoch": epoch,
            "step": step,
            "train_loss": train[0],
            "train_accuracy": train[1],
            "test_loss": tested[0],
            "test_accuracy": tested[1],
            "learning_rate": float(self.schedule(step - 1)),
            "seconds": round(seconds, 3),
            "images_per_second": round(rate, 1),
        }

    def _finish(self, rows: list[Row]) -> Result:
        best = max(rows, key=lambda row: row["test_accuracy"])
        times = [0.0, *(row["seconds"] for row in rows)]
        result = {
            "name": self.name,
            "run": self.fingerprint,
            "test_accuracy": rows[-1]["test_accuracy"],
            "best_test_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            "train_accuracy": rows[-1]["train_accuracy"],
            "parameters": self.parameters,
            "parameters_sha256": checksum(self.state["params"]),
            "epochs": self.config.epochs,
            "steps": self.total_steps,
            "seconds": times[-1],
            "seconds_per_epoch": statistics.median(b - a for a, b in itertools.pairwise(times)),
            "images_per_second": statistics.median(row["images_per_second"] for row in rows),
            **peak_memory(),
            "command": self.command,
            "note": "; ".join(filter(None, (self.dataset.note, longer.note(self.fingerprint)))),
            "versions": versions(),
            "hardware": hardware(self.devices.mesh.devices.tolist()),
        }
        if is_first():
            draw(self.folder / "curves.png", self.name, {self.family: rows})
            model_file.write(self.folder, self.model(), self.dataset, result)
            write_json(self.folder / "result.json", result)
        return result

    def model(self) -> Any:
        """The network as it is now."""
        return nnx.merge(self.graphdef, self.state["params"], self.state["model"])

    def leave_model(self, result: Result) -> None:
        """Writes the model file of a finished run that has none, as earlier versions left none."""
        place = self.folder / model_file.NAME
        if self.config.many_processes or is_there(place) or not saved_steps(self.folder):
            return
        self.restore()
        model_file.write(self.folder, self.model(), self.dataset, result)


def epoch_order(seed: int, epoch: int, images: int) -> Order:
    """The order in which an epoch (from 0) goes through the images; the same in every process."""
    return np.random.default_rng((seed, epoch)).permutation(images).astype(np.int32)


def means(sums: Any) -> tuple[float, float]:
    """Mean loss and accuracy; waits for the device."""
    fetched = jax.device_get(sums)
    count = max(int(fetched["count"]), 1)
    return float(fetched["loss"]) / count, int(fetched["correct"]) / count


def describe_row(name: str, epochs: int, row: Row) -> str:
    """An epoch's metrics as a line for people."""
    return (
        f"{name} epoch {row['epoch']}/{epochs}: "
        f"loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.2%}, "
        f"test loss {row['test_loss']:.3f}, test accuracy {row['test_accuracy']:.2%}, "
        f"{row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
    )
