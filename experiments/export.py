"""From a finished training run to a folder of C: `python -m experiments.export --help`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.errors import UserError, status_of
from experiments.training.config import Parser

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
    parser.add_argument(
        "--bits", type=int, metavar="N",
        help="of products' operands, 2 to 8 (default: those that it was trained with, or 8)",
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
    if options.vectors < 1:
        raise UserError(f"--vectors must be positive, got {options.vectors}")
    from experiments.integer import accuracy
    from experiments.training.folder import read_result
    from jadder.integer import export_c

    out, run = Path(options.out), Path(options.run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} must be an empty folder or a new one")
    result = read_result(run)
    if result is None:
        raise UserError(f"{run}: expected the folder of a finished run")
    dataset, program = quantized(run, options.data_dir, options.bits)
    count = min(options.vectors, len(dataset.test_images))
    images = np.asarray(dataset.test_images[np.arange(count)])
    try:
        export_c(program, out, target=options.target, name=options.name, images=images)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"test accuracy: {result['test_accuracy']:.2%} in floats, "
          f"{accuracy(program, dataset):.2%} in bytes")  # fmt: skip
    print(f"{out}: C for {options.target}; its README.md has the sizes, `make check` compares")
    return 0


def quantized(
    run: Path, data_dir: str | None, bits: int | None
) -> "tuple[Dataset, IntegerProgram]":
    """The data of a finished run, and its network as an integer program.

    Raises:
        UserError: see `export`.
    """
    from flax import nnx

    import jadder
    from experiments.training.config import from_record
    from experiments.training.data import dataset_of
    from experiments.training.folder import read_fingerprint
    from experiments.training.start import calibration_images, trained

    config = from_record(read_fingerprint(run), run / "config.json")
    dataset = dataset_of(dataclasses.replace(config, data_dir=data_dir))
    try:
        graphdef, (params, rest) = trained(run, dataset)
        network: Any = nnx.merge(graphdef, params, rest)
        wanted = bits if bits is not None else config.bits
        program = jadder.quantize(
            network, calibration_images(dataset), bits=8 if wanted is None else wanted,
            mean=np.array(dataset.mean), std=np.array(dataset.std),
        )  # fmt: skip
    except (UserError, ValueError) as error:
        raise UserError(f"{run}: {error}") from None
    return dataset, program


if __name__ == "__main__":
    sys.exit(main())
