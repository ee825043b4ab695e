"""From a finished run to weights of the package: `python -m experiments.publish --help`."""

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError, status_of
from experiments.training.config import Parser

ABOUT = """\
Adds the network of a finished run to what jadder.models.create(..., pretrained=NAME) has.

The last checkpoint's network is written to jadder/models/weights, its parameters in float16 where
that keeps the test accuracy to within --loss, otherwise in float32. The accuracy that is stated
beside it is the file's own, measured here on all test images.
"""
PLACES = ("--data-dir", "--out-dir")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit status."""
    return status_of(lambda: publish(sys.argv[1:] if argv is None else list(argv)))


def make_parser() -> Parser:
    parser = Parser(prog="python -m experiments.publish", description=ABOUT, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "name", metavar="NAME", nargs="?",
        help="what pretrained= calls it (default: the run's data set)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", metavar="DIR", help="as of experiments.train; default: 'data'"
    )
    parser.add_argument("--note", default="", help="what a user of the weights should know")
    parser.add_argument(
        "--loss", type=float, default=0.0005, metavar="SHARE",
        help="test accuracy that float16 may cost, or gain (default: 0.0005)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="(default: the package's own folder)")
    return parser


def publish(argv: Sequence[str]) -> int:
    """Measures, writes and prints what came out.

    Raises:
        UserError: no finished run, other data, or a name that is none.
    """
    options = make_parser().parse_args(argv)
    import jadder
    from experiments.training.folder import read_result
    from experiments.training.model_file import about, content, of_checkpoint
    from jadder.models import pretrained
    from jadder.models.published import FOLDER, add

    run = Path(options.run)
    result = read_result(run)
    if result is None:
        raise UserError(f"{run}: expected the folder of a finished run")
    name = options.name or result["run"].get("dataset", "")
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"NAME must be of letters, digits, _ and -, got {name!r}")
    dataset, model = of_checkpoint(run, options.data_dir)
    architecture = model.architecture
    said = {**about(result), "command": command(result)}
    for dtype in ("float16", "float32"):
        try:
            written = content(model, dataset, said, dtype)
            measured = accuracy(written, dataset)
        except ValueError as error:  # a parameter beyond float16's range
            if dtype == "float32":
                raise UserError(f"{run}: {error}") from None
            continue
        if abs(measured - result["test_accuracy"]) <= options.loss:
            break
    else:
        raise UserError(
            f"{run}: the test accuracy is {measured:.2%}, not {result['test_accuracy']:.2%} as its "
            "result says: are these the images that it was trained with?"
        )
    written = content(model, dataset, {**said, "test_accuracy": measured}, dtype)
    entry: dict[str, Any] = {
        "model": architecture.model,
        "family": architecture.family,
        "data": name,
        "test_accuracy": measured,
        "parameters": result["parameters"],
        "dtype": dtype,
        "bytes": len(written),
        "epochs": result["epochs"],
        "command": said["command"],
        "jadder": jadder.__version__,
        "note": options.note,
    }
    path = add(written, entry, FOLDER if options.out is None else Path(options.out))
    print(f"{path}: {len(written):,} bytes, {dtype}, test accuracy {measured:.2%}")
    print(f"pretrained: {', '.join(pretrained())}")
    return 0


def command(result: dict[str, Any]) -> str:
    """The command of a run without the folders of the machine that it ran on.

    Example:
        >>> command({"command": "python -m experiments.train --data-dir '/my data' --epochs 2"})
        'python -m experiments.train --epochs 2'
    """
    words, kept = shlex.split(result["command"]), []
    for before, word in zip(["", *words], words, strict=False):
        if before not in PLACES and word.partition("=")[0] not in PLACES:
            kept.append(word)
    return shlex.join(kept)


def accuracy(content: bytes, dataset: Any) -> float:
    """Of the network in a file's bytes, on all test images."""
    import jax
    import numpy as np
    from flax import nnx

    from jadder.models import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        model, description = load(path)
    graphdef, state = nnx.split(model)

    @jax.jit
    def classes(images: Any) -> Any:
        return nnx.merge(graphdef, state)(description.normalize(images)).argmax(-1)

    right, batch = 0, 500
    for start in range(0, len(dataset.test_images), batch):
        index = np.arange(start, min(start + batch, len(dataset.test_images)))
        found = np.asarray(classes(np.asarray(dataset.test_images[index])))
        right += int((found == dataset.test_labels[index]).sum())
    return right / len(dataset.test_images)


if __name__ == "__main__":
    sys.exit(main())
