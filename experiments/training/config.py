"""What a training run can be told, as a dataclass and as command-line options."""

import argparse
import ast
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from experiments.common.errors import UserError
from experiments.common.files import entry

FAMILIES = ("adder", "conv", "euclid")
OPTIMIZERS = ("auto", "sgd", "muon", "adamw")
RULES = ("default", "addernet", "adder_vit", "wide", "sign")
# Those of jadder.implementations, which takes a second to import.
IMPLEMENTATIONS = ("xla", "cpu", "cpu_fast", "cpu_int16", "mosaic_gpu", "mosaic_tpu", "reference")
DTYPES = ("float32", "bfloat16", "float64")
AUGMENTATIONS = ("standard", "randaugment", "none")
SCALINGS = ("auto", "on", "off")
ANNEALINGS = ("none", "rule", "distance", "distance_half", "exact", "distance_exact")

LARGEST = 1e38
"""Of options that float32 has to hold."""
LONGEST = 200
"""Characters of a value in --model-options: Python's parser can be sent through the stack."""

# Options that say where a run lies, where it is computed and how it is watched. A run can be
# resumed with other values of these, of no others.
PLACES = ("family", "teacher", "data_dir", "image_memory", "out_dir", "name", "resume",
          "checkpoint_every", "devices", "distributed", "coordinator_address", "num_processes",
          "process_id")  # fmt: skip


def _option(default: Any, group: str, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **more})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run, or several that differ in `family` only.

    The fields are the options of `python -m experiments.train`, whose help text describes them.
    """

    model: str = _option(
        "auto", "model", "network to train; 'auto' takes a small one that suits the data set"
    )
    family: tuple[str, ...] = _option(
        ("adder", "conv"),
        "model",
        "what its layers compute: 'adder' sums |x - w|, 'euclid' sums (x - w)^2, 'conv' "
        "multiplies; several are trained one after the other and compared",
        choices=FAMILIES,
    )
    rule: str = _option(
        "default",
        "model",
        "gradient rule of adder layers; 'default' is the model's own",
        choices=RULES,
    )
    implementation: str | None = _option(
        None,
        "model",
        "how adder products are computed; default: the best for the platform",
        choices=IMPLEMENTATIONS,
    )
    model_options: tuple[str, ...] = _option(
        (),
        "model",
        "further arguments of the model's constructor, such as norm=batch depth=2",
        metavar="NAME=VALUE",
    )
    dtype: str = _option(
        "float32",
        "model",
        "what layers compute in. With bfloat16, parameters, statistics and sums stay float32; "
        "float64 is that of everything and needs JAX_ENABLE_X64=1",
        choices=DTYPES,
    )

    dataset: str = _option(
        "digits",
        "data",
        "digits (comes with scikit-learn), mnist, fashion_mnist, cifar10, folder:DIR for images "
        "of one's own in DIR/train/CLASS and DIR/test/CLASS, or in DIR/CLASS, of which --seed "
        "chooses a fifth for the test; or tfds:NAME for an image classification set that "
        "tensorflow-datasets has prepared",
    )
    data_dir: str | None = _option(
        None,
        "data",
        "folder with the data set's files, or with a folder of its name; default: 'data', for "
        "tfds: ~/tensorflow_datasets, for folder: its DIR",
        metavar="DIR",
    )
    image_size: int | None = _option(
        None,
        "data",
        "resize images to this many pixels on each side; default: as they are, for digits 28",
        metavar="PIXELS",
    )
    limit_train: int | None = _option(None, "data", "train on the first N images only", metavar="N")
    validation: int = _option(
        0,
        "data",
        "hold the last N training images back and test on them, as a search for good options must",
        metavar="N",
    )
    image_memory: float = _option(
        4.0,
        "data",
        "images of a split of folder: or tfds: are kept in memory up to this size, otherwise read "
        "and decoded batch by batch",
        metavar="GIB",
    )
    augment: str = _option(
        "standard",
        "data",
        "what happens to training images at random: 'standard' shifts and mirrors them, where that "
        "suits the data set; 'randaugment' does RandAugment(2, 14) before that",
        choices=AUGMENTATIONS,
    )

    random_crop: float | None = _option(
        None,
        "data",
        "train on random parts of the images, of at least this share of their area, resized, in "
        "place of shifting them: for photographs, with 0.08, say. Images of folder: and tfds: are "
        "read anew for it in each epoch",
        metavar="AREA",
    )

    epochs: int = _option(20, "training", "passes over the training images")
    batch_size: int = _option(128, "training", "images in one step, of all devices", metavar="N")
    optimizer: str = _option(
        "auto",
        "training",
        "'auto' takes adamw for transformers and sgd for other models; 'muon' orthogonalises the "
        "steps of the products' kernels and is sgd for the rest",
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = _option(
        None,
        "training",
        "peak learning rate; default: 0.1 for sgd and muon, 0.001 for adamw",
        metavar="RATE",
    )
    warmup_epochs: float = _option(
        1.0,
        "training",
        "epochs in which the rate rises to its peak, at most a tenth of the run; then it falls "
        "along a cosine to 0",
        metavar="EPOCHS",
    )
    momentum: float = _option(0.9, "training", "momentum of sgd and muon")
    weight_decay: float | None = _option(
        None, "training", "default: 0.0005 for sgd and muon, 0.05 for adamw", metavar="DECAY"
    )
    bias_rate: float = _option(
        1.0,
        "training",
        "sgd and muon: how many times the learning rate biases take, those of normalisations "
        "included",
        metavar="FACTOR",
    )
    decay_norms: bool = _option(
        True, "training", "sgd and muon: weight decay on scales and biases too"
    )
    adaptive_scaling: str = _option(
        "auto",
        "training",
        "AdderNet's adaptive scaling of adder kernels' gradients; 'auto' is on for sgd and off for "
        "adamw, whose steps do not depend on the gradient's scale",
        choices=SCALINGS,
    )
    eta: float = _option(
        0.2,
        "training",
        "adaptive scaling: size of the adder layers' steps; muon: root mean square of each step "
        "before the learning rate",
    )
    kernel_min: float | None = _option(
        None, "training", "keep adder kernels at or above this", metavar="W"
    )
    kernel_max: float | None = _option(
        None, "training", "keep adder kernels at or below this", metavar="W"
    )
    adder_rate: float = _option(
        30.0,
        "training",
        "adamw: how many times the learning rate adder kernels take",
        metavar="FACTOR",
    )
    anneal: str = _option(
        "none",
        "training",
        "change adder products in four stages, of equal length: 'rule' begins with an eighth of "
        "the slope of the rule of inputs, 'distance' with (x - w)^2 / 2 in place of |x - w|; "
        "'distance_half' has the last stage begin at half of the run; 'exact' has three stages: "
        "gradient rules are twice as steep from half of the run on and four times in the last "
        "quarter, that of kernels bounded by 1; 'distance_exact' is the first half of "
        "'distance_half' and the second of 'exact'",
        choices=ANNEALINGS,
    )
    start: str | None = _option(
        None,
        "training",
        "begin with the parameters of a finished run of the same network, on the same images, or "
        "of a model file such as such a run leaves, whatever images that was trained on",
        metavar="FOLDER_OR_FILE",
    )
    bits: int | None = _option(
        None,
        "training",
        "round the operands of adder products to grids of so many bits (2 to 8) while training, as "
        "jadder.quantize will: for a few epochs from --start, at a low --learning-rate",
        metavar="N",
    )
    teacher: str | None = _option(
        None,
        "training",
        "learn from the logits of the network of this finished run too, of the same images",
        metavar="FOLDER",
    )
    distill_weight: float = _option(
        0.5,
        "training",
        "with --teacher: weight of the distance to its logits, between 0 and 1; labels have the "
        "rest",
        metavar="WEIGHT",
    )
    distill_temperature: float = _option(
        2.0, "training", "with --teacher: what all logits are divided by before they are compared",
        metavar="T",
    )  # fmt: skip
    label_smoothing: float = _option(
        0.0,
        "training",
        "share of each training label that goes to all classes evenly; 0.1 for large sets of "
        "photographs, say",
        metavar="SHARE",
    )
    seed: int = _option(0, "training", "two runs with one seed give the same numbers")

    devices: int | None = _option(
        None,
        "devices",
        "devices that each process uses; default: all it has. They share each batch evenly",
        metavar="N",
    )
    distributed: bool = _option(
        False,
        "devices",
        "train with several processes, one on each host, that find each other as the TPU pod, "
        "Slurm or Open MPI says. Elsewhere, give the three options below to each process",
    )
    coordinator_address: str | None = _option(
        None, "devices", "where process 0 listens for the others", metavar="HOST:PORT"
    )
    num_processes: int | None = _option(None, "devices", "number of processes", metavar="N")
    process_id: int | None = _option(None, "devices", "which of them this is, from 0", metavar="ID")

    out_dir: str = _option("runs", "output", "folder that takes the runs' folders", metavar="DIR")
    name: str | None = _option(
        None, "output", "name of the run's folder; default: DATASET-MODEL-FAMILY-sSEED"
    )
    resume: bool = _option(
        False,
        "output",
        "go on from the last checkpoint of this very run. A finished run with more --epochs is "
        "made longer: its rows stay, and the learning rate goes on as in a run of the new length",
    )
    checkpoint_every: float = _option(
        60.0, "output", "save at least this often, besides each epoch's end", metavar="SECONDS"
    )

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size", "image_size", "limit_train", "learning_rate", "eta",
                      "adder_rate", "bias_rate", "distill_temperature", "checkpoint_every",
                      "devices", "num_processes", "bits", "random_crop"):  # fmt: skip
            self._check_number(field, positive=True)
        for field in (
            "validation",
            "image_memory",
            "weight_decay",
            "warmup_epochs",
            "momentum",
            "distill_weight",
            "label_smoothing",
            "seed",
            "process_id",
        ):
            self._check_number(field, positive=False)
        for field in ("kernel_min", "kernel_max"):
            value = getattr(self, field)
            if value is not None and not abs(value) <= LARGEST:
                raise UserError(
                    f"{flag(field)} must be a number of at most {LARGEST:g}, got {value}"
                )
        low, high = self.kernel_min, self.kernel_max
        if low is not None and high is not None and low > high:
            raise UserError(f"--kernel-min must be at most --kernel-max {high}, got {low}")
        if self.momentum >= 1:
            raise UserError(f"--momentum must be below 1, got {self.momentum}")
        if self.label_smoothing >= 1:
            raise UserError(f"--label-smoothing must be below 1, got {self.label_smoothing}")
        if self.random_crop is not None and self.random_crop > 1:
            raise UserError(f"--random-crop must be at most 1, got {self.random_crop}")
        if self.distill_weight > 1:
            raise UserError(f"--distill-weight must be at most 1, got {self.distill_weight}")
        if self.seed >= 2**32:
            raise UserError(f"--seed must be below 2**32, got {self.seed}")
        address, count, index = self.coordinator_address, self.num_processes, self.process_id
        if address is not None and not re.fullmatch(r"\S+:\d+", address):
            raise UserError(f"--coordinator-address must be HOST:PORT, got {address!r}")
        if count is not None and index is not None and index >= count:
            raise UserError(f"--process-id must be below --num-processes {count}, got {index}")
        if not self.family or len(set(self.family)) != len(self.family):
            raise UserError(f"--family must name each family once, got {' '.join(self.family)!r}")
        if self.name is not None and not re.fullmatch(r"[\w+-][\w.+-]*", self.name):
            raise UserError(f"--name must be a plain folder name, got {self.name!r}")
        self.model_arguments()

    def _check_number(self, field: str, *, positive: bool) -> None:
        value = getattr(self, field)
        if value is None:
            return
        finite = isinstance(value, int) or math.isfinite(value)
        if not finite or value < 0 or (positive and value == 0):
            least = "positive" if positive else "zero or more"
            raise UserError(f"{flag(field)} must be {least}, got {value}")
        if isinstance(value, int) and field != "seed" and value >= 2**31:
            raise UserError(f"{flag(field)} must be below 2**31, got {value}")
        if isinstance(value, float) and value > LARGEST:
            raise UserError(f"{flag(field)} must be at most {LARGEST:g}, got {value}")

    @property
    def many_processes(self) -> bool:
        """Whether this is one of several processes, or may be."""
        options = (self.coordinator_address, self.num_processes, self.process_id)
        return self.distributed or any(option is not None for option in options)

    def run_name(self, family: str) -> str:
        """The folder of the run of one family."""
        if self.name is None:
            return f"{self.stem}-{family}-s{self.seed}"
        return self.name if len(self.family) == 1 else f"{self.name}-{family}"

    @property
    def comparison_name(self) -> str:
        """The name of the picture that shows all families."""
        return f"{self.name or f'{self.stem}-s{self.seed}'}-{'-'.join(self.family)}"

    @property
    def stem(self) -> str:
        dataset = self.dataset
        if dataset.startswith("folder:"):
            dataset = Path(dataset.removeprefix("folder:")).expanduser().resolve().name or "folder"
        return re.sub(r"[^\w.+-]+", "_", f"{dataset}-{self.model}")

    def science(self) -> dict[str, Any]:
        """The fields that decide a run's numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["model_options"] = self.model_arguments()
        return {name: value for name, value in fields.items() if name not in PLACES}

    def model_arguments(self) -> dict[str, Any]:
        """`model_options` as keyword arguments: numbers, True, False, None, else strings.

        Raises:
            UserError: one that is not of the form NAME=VALUE, or given twice.

        Example:
            >>> TrainConfig(model_options=("norm=batch", "depth=2")).model_arguments()
            {'norm': 'batch', 'depth': 2}
        """
        arguments: dict[str, Any] = {}
        for option in self.model_options:
            name, equals, text = option.partition("=")
            if not (name.isidentifier() and equals) or name in arguments:
                raise UserError(f"--model-options must be NAME=VALUE, each once, got {option!r}")
            if len(text) > LONGEST:
                raise UserError(
                    f"--model-options {name} has {len(text)} characters, expected at most {LONGEST}"
                )
            arguments[name] = _literal(text)
            if not _is_plain(arguments[name]):
                raise UserError(
                    f"--model-options {name} must be a name, a finite number that is not negative, "
                    f"True, False, None, or a tuple or list of these, got {text}"
                )
        return arguments


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it, and a network may be made of it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, int | float):
        return 0 <= value < (2**31 if isinstance(value, int) else math.inf)
    return value is None or isinstance(value, str)


def from_record(saved: Mapping[str, Any], where: Path) -> TrainConfig:
    """The configuration of a run whose fingerprint is `saved`, without its own teacher.

    Args:
        saved: from a JSON file.
        where: that file.

    Raises:
        UserError: it lacks the family, or a value is not one that the option can take.
    """
    options: dict[str, Any] = {"family": (entry(saved, "family", str, where),)}
    for field in dataclasses.fields(TrainConfig):
        if field.name in PLACES or field.name not in saved:
            continue
        options[field.name] = entry(saved, field.name, _kinds(field), where)
    model_options = entry({"model_options": {}, **saved}, "model_options", dict, where)
    options["model_options"] = tuple(f"{name}={value}" for name, value in model_options.items())
    for field in dataclasses.fields(TrainConfig):
        choices, given = field.metadata.get("choices"), options.get(field.name)
        values = given if isinstance(given, tuple) else (given,)
        if choices and given is not None and not set(values) <= set(choices):
            raise UserError(f"{where} is damaged: its {field.name!r} is {values[0]!r}")
    try:
        return TrainConfig(**options)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from None


def _kinds(field: dataclasses.Field[Any]) -> tuple[type, ...]:
    """What JSON makes of a field's values."""
    if field.name == "model_options":
        return (dict,)
    kind: Any = field.type
    return get_args(kind) or (kind,)


def flag(field: str) -> str:
    """The option of a field: `batch_size` gives `--batch-size`."""
    return "--" + field.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def make_parser() -> argparse.ArgumentParser:
    """The options of `python -m experiments.train`, one for each field of TrainConfig."""
    parser = Parser(
        prog="python -m experiments.train",
        description="Train networks that add instead of multiply, beside their multiplying twins. "
        "Without options: an AdderNet and its twin on small handwritten digits, in about a minute.",
        epilog="examples: "
        "`python -m experiments.train --dataset mnist --data-dir DIR --epochs 10`; "
        "`python -m experiments.train --dataset cifar10 --data-dir DIR --model resnet20 "
        "--family adder --epochs 10`, and the same with --resume after an interruption",
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        meta = dict(field.metadata)
        name = meta.pop("group")
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_option(groups[name], field, meta)
    return parser


def _add_option(group: Any, field: dataclasses.Field[Any], meta: dict[str, Any]) -> None:
    if isinstance(field.default, bool):
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        group.add_argument(flag(field.name), action=action, default=field.default, **meta)
        return
    default: Any = field.default
    if isinstance(default, tuple):
        meta["nargs"] = "+" if default else "*"
        default = " ".join(default)
    types = {"int": int, "float": float}
    kind = next((kind for name, kind in types.items() if name in str(field.type)), str)
    if field.default not in (None, ()):
        meta["help"] += f" (default: {default})"
    group.add_argument(flag(field.name), type=kind, default=field.default, **meta)


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration that the command line `argv` asks for.

    Raises:
        UserError: an option is unknown or its value is not one it can take.
    """
    values = vars(make_parser().parse_args(argv))
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    return TrainConfig(**values)
