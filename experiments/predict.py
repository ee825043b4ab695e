"""Classes of image files, by a trained network: `python -m experiments.predict --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.errors import UserError, status_of
from experiments.training.config import Parser

if TYPE_CHECKING:
    from experiments.images.dataset import Images
    from jadder.models import Description, SavedModel

ABOUT = """\
Says which classes a network of experiments.train sees in image files, the likeliest ones first.

Images are turned upright, made grey or coloured as those of the training were, resized so that the
shorter side fits, and cut to the middle. Otherwise they are taken as they are: of MNIST's digits
and those of scikit-learn, the strokes are bright and the paper is dark.
"""
BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return status_of(lambda: predict(sys.argv[1:] if argv is None else list(argv)))


def make_parser() -> Parser:
    parser = Parser(prog="python -m experiments.predict", description=ABOUT, allow_abbrev=False)
    parser.add_argument(
        "model", metavar="RUN_OR_FILE",
        help="the folder of a finished run, or the model.safetensors that it leaves",
    )  # fmt: skip
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="classes to print (default: 3)"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR",
        help="of the training images, for a run that left no model file; as of experiments.train",
    )  # fmt: skip
    return parser


def predict(argv: Sequence[str]) -> int:
    """Prints a line for each image, and one on stderr for each file that is none.

    Returns:
        The exit status: 2 where a file could not be read.

    Raises:
        UserError: no such model.
    """
    options = make_parser().parse_args(argv)
    if options.top < 1:
        raise UserError(f"--top must be positive, got {options.top}")
    from experiments.training.model_file import open_model

    saved = open_model(Path(options.model), options.data_dir)
    check(saved.description, options.model)
    status = 0
    for start in range(0, len(options.images), BATCH):
        images, names = [], []
        for name in options.images[start : start + BATCH]:
            try:
                images.append(prepared(Path(name), saved.description))
                names.append(name)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                status = 2
        for name, shares in zip(names, probabilities(saved, images), strict=True):
            print(f"{name}: {line(shares, saved.description.class_names, options.top)}")
    return status


def check(description: "Description", where: str) -> None:
    """Refuses a model of which files alone do not say what it takes.

    Raises:
        UserError: see above.
    """
    if not description.mean:
        raise UserError(f"{where} does not say the mean and deviation of its network's images")
    if description.architecture.channels not in (1, 3):
        channels = description.architecture.channels
        raise UserError(f"{where} is of images of {channels} channels, files have 1 or 3")


def prepared(path: Path, description: "Description") -> "Images":
    """The pixels of a file, of the size and with the channels that the network takes.

    Raises:
        UserError: it is no image.
    """
    from experiments.images.files import read_image
    from experiments.images.resize import fit

    image = read_image(path, description.architecture.channels)
    size = description.architecture.image_size
    return image if size is None else fit(image, *size)


def probabilities(saved: "SavedModel", images: "Sequence[Images]") -> list[Any]:
    """The softmax of each image's logits; images of one size are computed together."""
    import jax
    import numpy as np

    groups: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image.shape, []).append(place)
    shares: list[Any] = [None] * len(images)
    for places in groups.values():
        batch = np.stack([images[place] for place in places])
        logits = saved.model(saved.description.normalize(batch))
        for place, row in zip(places, jax.device_get(jax.nn.softmax(logits)), strict=True):
            shares[place] = row
    return shares


def line(shares: Any, names: Sequence[str], top: int) -> str:
    """The likeliest classes and their probabilities.

    Example:
        >>> line([0.125, 0.75, 0.125], ("cat", "dog", "frog"), 2)
        'dog 75.00%, cat 12.50%'
    """
    order = sorted(range(len(shares)), key=lambda number: -shares[number])[:top]
    names = names or [f"class {number}" for number in range(len(shares))]
    return ", ".join(f"{names[number]} {float(shares[number]):.2%}" for number in order)


if __name__ == "__main__":
    sys.exit(main())
