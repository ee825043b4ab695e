"""Attacks on the folders of runs: two processes at once, kills, damaged files, a full disk.

    python -m tests.experiments.attack_runs --pairs 50 --kills 50 --damaged 60 --full 3

Each attack has to end right, to the last bit of the parameters and to the last row, or with one
line and exit status 2 (1 where no other command line would have helped), after which the run goes
on and ends right. Prints what did not, and the counts. A full disk needs the right to mount one.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.common.interrupt import LeaveAtOnce
from experiments.train import main as main_of_train

OPTIONS = shlex.split(
    "--family adder --model lenet5 --image-size 8 --limit-train 64 --batch-size 32 --epochs 6 "
    "--checkpoint-every 0.2 --name run --devices 1"
)
OTHER = [*OPTIONS, "--learning-rate", "0.05"]
TIMES = ("seconds", "images_per_second")


@dataclasses.dataclass(frozen=True)
class End:
    """How a command ended."""

    status: int
    err: str

    @property
    def error(self) -> str:
        """The one line of what was refused; what does not end in one is shown as it is."""
        lines = self.err.strip().splitlines()
        good = bool(lines) and lines[-1].startswith("error: ") and "Traceback" not in self.err
        return lines[-1] if good else f"NOT ONE LINE: {self.err[-1000:]}"

    @property
    def shown(self) -> str:
        return f"{self.status} {self.error if self.status else ''}"

    @property
    def refused(self) -> bool:
        return self.status == 2 and self.error.startswith("error: ")


Outcome = tuple[str, list[dict[str, Any]]]


def outcome(folder: Path) -> Outcome:
    """The checksum of a finished run's parameters, and its rows without the times."""
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return result["parameters_sha256"], rows


def remains(folder: Path) -> list[str]:
    """What a run that has ended should not leave."""
    return [p.name for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name == ".lock"
            or ".orbax-checkpoint-tmp" in p.name]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Process:
    """`python -m experiments.train` as a process of its own, less the time that imports take.

    This process has imported everything, but has not asked JAX for its devices: a fork of it is
    where the command would be after its imports.
    """

    pid: int
    err: Path

    @classmethod
    def start(cls, options: list[str], out_dir: Path) -> "Process":
        number, name = tempfile.mkstemp()
        with warnings.catch_warnings(action="ignore"):  # JAX's, about its threads: none yet
            pid = os.fork()
        if pid == 0:
            os.dup2(number, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            LeaveAtOnce.install()
            status = 1
            try:
                status = main_of_train([*options, "--out-dir", str(out_dir)])
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        os.close(number)
        return cls(pid, Path(name))

    def finish(self, seconds: float = 900) -> End:
        """Waits; kills what takes longer."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        err = self.err.read_text()
        self.err.unlink()
        return End(os.waitstatus_to_exitcode(status), err)


def run(options: list[str], out_dir: Path) -> End:
    return Process.start(options, out_dir).finish()


def go_on(options: list[str], out_dir: Path) -> End:
    """Resumes, or begins where nothing had been begun."""
    end = run([*options, "--resume"], out_dir)
    return run(options, out_dir) if "nothing to resume" in end.err else end


class Attacks:
    """What the attacks came to.

    Args:
        place: an empty folder for runs.
    """

    def __init__(self, place: Path):
        self.place, self.counts = place, collections.Counter[str]()
        self.faults: list[str] = []
        for name, options in (("whole", OPTIONS), ("other", OTHER)):
            end = run(options, place / name)
            assert end.status == 0, end.err
        began = time.monotonic()
        end = run(OPTIONS, place / "timed")
        self.seconds = time.monotonic() - began
        assert end.status == 0, end.err
        self.whole = outcome(place / "whole/run")
        self.other = outcome(place / "other/run")
        self.check(outcome(place / "timed/run") == self.whole, "two processes", "differ")

    def check(self, good: bool, what: str, reason: object) -> None:
        if not good:
            self.faults.append(f"{what}: {reason}")
            print(self.faults[-1], flush=True)

    def check_end(self, what: str, folder: Path, expected: Outcome) -> None:
        """The folder holds the run that nobody attacked, and nothing else."""
        try:
            found = outcome(folder)
        except (OSError, ValueError) as error:
            self.check(False, what, error)
            return
        self.check(found[0] == expected[0], what, "other parameters")
        self.check(found[1] == expected[1], what, f"other rows {found[1]}")
        self.check(not remains(folder), what, remains(folder))

    def pair(self, number: int) -> None:
        """Two runs at once in one folder, of the same options or not, one of them resuming or not.

        One of them may come when the other has ended.
        """
        folder, differ = self.place / f"pair{number}", number % 2 == 1
        what = f"pair {number} ({'other' if differ else 'same'} options)"
        commands = [OPTIONS, OTHER if differ else OPTIONS]
        commands = [[*c, "--resume"] if random.random() < 0.3 and i else c
                    for i, c in enumerate(commands)]  # fmt: skip
        random.shuffle(commands)
        processes = []
        for command in commands:
            processes.append(Process.start(command, folder))
            time.sleep(random.choice((0, 0, random.uniform(0, 0.3), random.uniform(0, 8))))
        ends = [process.finish() for process in processes]
        for end in ends:
            self.check(end.status == 0 or end.refused, what, end)
        good = [c for c, end in zip(commands, ends, strict=True) if end.status == 0]
        both = len(good) == 2
        self.check(bool(good), what, ends)
        self.check(not (both and differ), what, "both ended with 0")
        if good:
            first = self.other if "0.05" in good[0] else self.whole
            self.check_end(what, folder / "run", first)
        held = any("is in use: process" in end.err for end in ends)
        self.counts[
            f"pairs: {'both right' if both else 'one kept out' if held else 'one late'}"
        ] += 1
        shutil.rmtree(folder)

    def kill(self, number: int) -> None:
        """SIGKILL at a random time, perhaps while it resumes, then to the end."""
        folder, what = self.place / f"kill{number}", f"kill {number}"
        wanted = random.choice((1, 1, 2))
        while wanted:
            again = ["--resume"] if (folder / "run/config.json").exists() else []
            began = time.monotonic()
            process = Process.start([*OPTIONS, *again], folder)
            end = process.finish(random.uniform(0.4, 1.0) * self.seconds)
            if end.status == -signal.SIGKILL:
                wanted -= 1
                self.counts["kills: SIGKILL"] += 1
            else:  # too late: the machine has become faster
                self.seconds = min(self.seconds, time.monotonic() - began)
                shutil.rmtree(folder)
        saved = any((folder / "run/checkpoints").glob("[0-9]*"))
        left = bool(remains(folder)) if folder.exists() else False
        began = time.monotonic()
        end = go_on(OPTIONS, folder)
        if not saved:
            self.seconds = time.monotonic() - began
        self.check(end.status == 0, what, end)
        self.check_end(what, folder / "run", self.whole)
        self.counts[f"kills: {'from a checkpoint' if saved else 'before the first'}"] += 1
        self.counts["kills: something half written was there"] += left
        shutil.rmtree(folder, ignore_errors=True)

    def damage(self, name: str) -> None:
        """A damaged folder of a finished run, of one that is not, or of a teacher."""
        kind, file, how = name.split(" ")
        folder = self.place / "damaged"
        shutil.copytree(self.place / "whole/run", folder / "run")
        steps = sorted(int(p.name) for p in (folder / "run/checkpoints").iterdir())
        if kind == "unfinished":  # as if it had been killed before its last checkpoint
            (folder / "run/result.json").unlink()
            shutil.rmtree(folder / f"run/checkpoints/{steps.pop()}")
        path = folder / "run" / file.replace("STEP", str(steps[-1]))
        DAMAGES[how](path)
        if kind == "teacher":
            options = [*OPTIONS, "--teacher", str(folder / "run"), "--name", "pupil"]
            end = run(options, folder)
            self.check(end.status == 0 or end.refused, name, end)
        else:
            end = run([*OPTIONS, "--resume"], folder)
            self.check(end.status == 0 or end.refused, name, end)
            if end.status == 0:
                self.check_end(name, folder / "run", self.whole)
        self.counts[f"damaged: {'right' if end.status == 0 else 'refused'}"] += 1
        print(f"  {name}: {end.status} {end.error[:200] if end.status else ''}", flush=True)
        shutil.rmtree(folder)

    def fill(self, kilobytes: int) -> None:
        """A disk of that size, then one with room."""
        disk, what = self.place / "disk", f"disk of {kilobytes} KiB"
        disk.mkdir()
        size = f"size={kilobytes}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
        try:
            end = run(OPTIONS, disk)
            good = end.status == 0 or (end.status == 1 and end.error.startswith("error: "))
            self.check(good, what, end)
            print(f"  {what}: {end.status} {end.error if end.status else ''}", flush=True)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again = go_on(OPTIONS, disk)
            self.check(again.status == 0, what, again)
            self.check_end(what, disk / "run", self.whole)
            self.counts[
                f"full: {'room enough' if end.status == 0 else 'one line, then right'}"
            ] += 1
        finally:
            subprocess.run(["umount", str(disk)], check=True)
            disk.rmdir()


# -- damage ----------------------------------------------------------------------------------------


def change(function: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes what a JSON file holds."""

    def damage(path: Path) -> None:
        path.write_text(json.dumps(function(json.loads(path.read_text()))))

    return damage


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Puts something in a file's, or a folder's, place."""

    def damage(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return damage


def misspell(value: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}x" if i % 2 else key: v for i, (key, v) in enumerate(value.items())}


def retype(value: Any) -> Any:
    """Numbers as strings, strings as numbers, at every depth."""
    if isinstance(value, dict):
        return {key: retype(item) for key, item in value.items()}
    return str(value) if isinstance(value, int | float) else 7 if isinstance(value, str) else value


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "empty": write(b""),
    "list": write(b"[1, 2]"),
    "string": write(b'"text"'),
    "no-keys": write(b"{}"),
    "brackets": write(b"[" * 100_000),
    "braces": write(b'{"run":' * 100_000),
    "not-utf8": write(b"\xff\xfe\x00"),
    "long-number": write(b'{"run": ' + b"9" * 10_000 + b"}"),
    "cut": lambda path: os.truncate(path, max(0, path.stat().st_size - 40)),
    "doubled": lambda path: path.write_bytes(path.read_bytes() * 2) and None,
    "misspelt": change(misspell),
    "misspelt-run": change(lambda value: {**value, "run": misspell(value["run"])}),
    "wrong-types": change(retype),
    "null-run": change(lambda value: {**value, "run": None}),
    "other-run": change(lambda value: {**value, "run": {**value["run"], "learning_rate": 0.5}}),
    "folder": instead(Path.mkdir),
    "fifo": instead(os.mkfifo),
    "endless": instead(lambda path: path.symlink_to("/dev/zero")),
    "loop": instead(lambda path: path.symlink_to(path)),
    "file": instead(lambda path: path.write_text("x")),
    "gone": instead(lambda path: None),
    "huge": huge,
}
JSON = ("empty", "list", "string", "no-keys", "brackets", "not-utf8", "long-number", "cut",
        "misspelt", "misspelt-run", "wrong-types", "null-run", "folder", "fifo", "endless", "loop",
        "huge", "gone", "other-run", "braces")  # fmt: skip
ROWS = ("gone", "empty", "cut", "doubled", "list", "brackets", "not-utf8", "folder", "fifo",
        "endless", "huge")  # fmt: skip
CASES = [
    *(f"finished result.json {how}" for how in JSON),
    *(f"unfinished config.json {how}" for how in JSON),
    *(f"finished config.json {how}" for how in ("cut", "gone", "fifo", "other-run")),
    *(f"{kind} metrics.jsonl {how}" for kind in ("finished", "unfinished") for how in ROWS),
    *(f"unfinished checkpoints {how}" for how in ("gone", "file", "fifo", "loop", "endless")),
    *(f"unfinished checkpoints/STEP/meta/metadata {how}" for how in ("cut", "fifo", "no-keys")),
    *(f"unfinished checkpoints/STEP/state/_METADATA {how}" for how in ("cut", "fifo", "gone")),
    *(f"teacher config.json {how}" for how in JSON),
    *(f"teacher result.json {how}" for how in ("list", "misspelt", "fifo", "folder")),
    *(f"teacher checkpoints {how}" for how in ("gone", "file", "fifo")),
    *(f"teacher checkpoints/STEP/meta/metadata {how}" for how in ("cut", "fifo", "endless")),
]


def compile_once(cache: Path) -> None:
    """Gives all processes one cache of programs with few optimisations; compiling is most of it."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip


def warm_up(place: Path) -> None:
    """Imports and keeps what does not take a device, which a fork could not share."""
    from experiments.images.load import load
    from experiments.training import curves
    from experiments.training.clock import Clock

    row = dict.fromkeys(("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"), 1)
    curves.draw(place / "curves.png", "title", {"adder": [row]})
    load("digits")
    # Once each run, at its end: pictures are not what is attacked.
    Clock.draw_due = lambda self: False  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--damaged", type=int, default=5, help=f"of {len(CASES)} kinds")
    parser.add_argument("--full", type=int, default=0, help="sizes of a disk, up to 4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        compile_once(place / "programs")
        warm_up(place)
        attacks = Attacks(place)
        print(f"an undisturbed run takes {attacks.seconds:.1f} s", flush=True)
        # No room for a checkpoint; for the second one; for what comes at the end; for config.json.
        for size in (128, 400, 560, 8)[: options.full]:
            attacks.fill(size)
        for name in random.sample(CASES, min(options.damaged, len(CASES))):
            attacks.damage(name)
        for number in range(options.pairs):
            attacks.pair(number)
            print(f"  {number + 1} pairs: {dict(attacks.counts)}", flush=True)
        for number in range(options.kills):
            attacks.kill(number)
            print(f"  {number + 1} kills: {dict(attacks.counts)}", flush=True)
        for what, count in sorted(attacks.counts.items()):
            print(f"{what}: {count}")
        print(f"faults: {len(attacks.faults)}")
    return 1 if attacks.faults else 0


if __name__ == "__main__":
    sys.exit(main())
