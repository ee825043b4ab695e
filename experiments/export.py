"""From a finished training run to a folder of C: `python -m experiments.export --help`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.errors import UserError, status_of
from experiments.common.files import read_json
from experiments.training.config import Parser, TrainConfig

if TYPE_CHECKING:
    from experiments.images.dataset import Dataset
    from jadder.integer import IntegerProgram

TARGETS = ("c99", "cortex-m4", "cortex-m7", "aarch64", "x86")
# Those of jadder.integer.c, which takes a second to import.
ABOUT = """\
Writes the network of a finished run of experiments.train as C99.

The network's last checkpoint is quantised with training images, without any training, and its
accuracy on the test images is printed beside that in floats. `make check` in the folder compares
the C with the network on test images, bit for bit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return status_of(lambda: export(sys.argv[1:] if argv is None else list(argv)))


def make_parser() -> Parser:
    parser = Parser(prog="python -m experiments.export", description=ABOUT, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--target", choices=TARGETS, default="c99", help="(default: c99)")
    parser.add_argument(
        "--name", default="model", help="what the C's names begin with (default: model)"
    )
    parser.add_argument("--bits", type=int, default=8, help="of products' operands (default: 8)")
    parser.add_argument(
        "--calibration", type=int, default=512, metavar="N",
        help="training images to quantise with (default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--vectors", type=int, default=4, metavar="N",
        help="test images that the folder takes to check the C with (default: 4)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", metavar="DIR", help="as of experiments.train; default: 'data'"
    )
    return parser


def export(argv: Sequence[str]) -> int:
    """Quantises, writes and prints what came out.

    Raises:
        UserError: no finished run, other data, or a network that has no integer form.
    """
    options = make_parser().parse_args(argv)
    for what in ("calibration", "vectors"):
        if getattr(options, what) < 1:
            raise UserError(f"--{what} must be positive, got {getattr(options, what)}")
    from jadder.integer import export_c

    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} must be an empty folder or a new one")
    dataset, program = quantized(Path(options.run), options.data_dir, options.bits,
                                 options.calibration)  # fmt: skip
    images = np.asarray(dataset.test_images[: options.vectors])
    try:
        export_c(program, out, target=options.target, name=options.name, images=images)
    except ValueError as error:
        raise UserError(str(error)) from error
    result = read_json(Path(options.run) / "result.json")
    print(f"test accuracy: {result['test_accuracy']:.2%} in floats, "
          f"{accuracy(program, dataset):.2%} in bytes")  # fmt: skip
    print(f"{out}: C for {options.target}; its README.md has the sizes, `make check` compares")
    return 0


def quantized(
    folder: Path, data_dir: str | None, bits: int, calibration: int
) -> "tuple[Dataset, IntegerProgram]":
    """The data of a finished run, and its network as an integer program.

    Raises:
        UserError: see `export`.
    """
    import jadder
    from experiments.images.load import load
    from experiments.training.teacher import load_teacher

    if not (folder / "result.json").is_file():
        raise UserError(f"{folder}: expected the folder of a finished run")
    saved = read_json(folder / "config.json")["run"]
    dataset = load(
        saved["dataset"], data_dir, image_size=saved["image_size"],
        limit_train=saved["limit_train"], validation=saved.get("validation", 0),
    )  # fmt: skip
    try:
        network = load_teacher(dataclasses.replace(TrainConfig(), teacher=str(folder)), dataset)
    except UserError as error:
        raise UserError(str(error).removeprefix("--teacher "), error.status) from None
    assert network is not None

    def logits(x: Any) -> Any:
        return network.logits(network.state, x)

    images = np.asarray(dataset.train_images[:calibration])
    try:
        program = jadder.quantize(logits, images, bits=bits, mean=dataset.mean, std=dataset.std)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return dataset, program


def accuracy(program: "IntegerProgram", dataset: "Dataset") -> float:
    """The share of test images whose class is found."""
    correct = 0
    for start in range(0, len(dataset.test_labels), 500):
        images = np.asarray(dataset.test_images[start : start + 500])
        found = np.asarray(program(images)).argmax(-1)
        correct += int((found == dataset.test_labels[start : start + 500]).sum())
    return correct / len(dataset.test_labels)


if __name__ == "__main__":
    sys.exit(main())
