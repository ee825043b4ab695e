"""The command line that all experiments share: `python -m experiments.NAME --help`.

An experiment is a function from options and a folder to an `Outcome`. What is common is here: where
results go, the small size that ends within a minute, errors as one line, interruptions, and the
record of command, versions and hardware beside every result.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from experiments.common.environment import hardware, peak_memory, versions
from experiments.common.errors import status_of
from experiments.common.files import remove_scratch
from experiments.common.interrupt import Interrupted, StopRequest
from experiments.common.lock import hold
from experiments.studies.outcome import Outcome
from experiments.training.config import Parser


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how an experiment runs.

    Attributes:
        folder: takes its result and pictures, and the folders of its training runs.
        smoke: whether it is the small size, on embedded data.
        command: the command line, for the record.
        stop: set by Ctrl-C or SIGTERM; whoever trains asks it.
    """

    folder: Path
    smoke: bool
    command: str
    stop: StopRequest


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One script.

    Attributes:
        name: of the module, and of the folder that takes the result.
        about: the help's description.
        add_options: adds the script's own options to a parser.
        run: does it.
        saves: whether `run` asks for `Place.stop` and has kept what it did until then; others are
            interrupted wherever they are.
    """

    name: str
    about: str
    run: Callable[[argparse.Namespace, Place], Outcome]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    saves: bool = True

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command line `argv` and returns the exit status."""
        argv = sys.argv[1:] if argv is None else list(argv)
        return status_of(lambda: self._run(self.parser().parse_args(argv), argv))

    def parser(self) -> argparse.ArgumentParser:
        parser = Parser(
            prog=f"python -m experiments.{self.name}",
            description=self.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--smoke", action="store_true", help="a small size on embedded data, within a minute"
        )
        parser.add_argument(
            "--out-dir",
            default="runs",
            metavar="DIR",
            help=f"takes the folder {self.name}, or {self.name}-smoke (default: runs). What an "
            "earlier run of the same command finished is kept, what it began is continued",
        )
        self.add_options(parser)
        return parser

    def _run(self, options: argparse.Namespace, argv: Sequence[str]) -> int:
        folder = Path(options.out_dir) / (f"{self.name}-smoke" if options.smoke else self.name)
        command = shlex.join(["python", "-m", f"experiments.{self.name}", *argv])
        stop = StopRequest()
        with contextlib.ExitStack() as held:
            if self.saves:
                held.enter_context(stop)
            held.enter_context(hold(folder))
            remove_scratch(folder)
            held.enter_context(_compile_time(short=options.smoke))
            place = Place(folder, options.smoke, command, stop)
            try:
                return self._run_in(place, options)
            except Interrupted as stopped:
                print(f"{stopped} and saved; go on with:\n{command}", file=sys.stderr)
                return 128 + stopped.signum

    def _run_in(self, place: Place, options: argparse.Namespace) -> int:
        """Runs the experiment, saves what it found and prints it."""
        folder, start = place.folder, time.monotonic()
        outcome = self.run(options, place)
        outcome.save(
            folder,
            experiment=self.name,
            command=place.command,
            smoke=place.smoke,
            seconds=round(time.monotonic() - start, 1),
            **peak_memory(),
            versions=versions(),
            hardware=hardware(jax.local_devices()),
        )
        for table in outcome.tables:
            print(f"{table.title}\n{table}\n")
        for note in outcome.notes:
            print(note)
        for picture in outcome.pictures:
            print(f"picture: {folder / picture.file}")
        print(f"result: {folder / 'result.json'}")
        return 0


@contextlib.contextmanager
def _compile_time(*, short: bool) -> Iterator[None]:
    """Where it is to be short, XLA optimises little: compiling is most of a small run's work."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", short or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
