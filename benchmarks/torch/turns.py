"""Programs in processes of their own, each run when it is its turn.

A process that serves writes one line when it is ready, and then answers each line that it reads,
the name of a program, with the seconds of the calls that it made. All lines are JSON. Nothing else
goes to its output: what libraries print goes to standard error.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Call = Callable[[], object]
"""Runs a program once and returns when it is done."""

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the processes run: a network, its images and which programs of it.

    Attributes:
      network: its name in `jadder.models`.
      batch: images at once.
      size: height and width of an image.
      programs: "step" (forward, backward, SGD) and "inference".
    """

    network: str
    batch: int
    size: int
    programs: tuple[str, ...] = ("step", "inference")

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        given = json.loads(text)
        return cls(**given | {"programs": tuple(given["programs"])})

    @property
    def num_classes(self) -> int:
        return 1000 if self.network == "resnet18" else 10


def threads() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve(about: Mapping[str, Any], calls: Mapping[str, Call]) -> None:
    """Answers until there are no more lines."""
    print(json.dumps({**about, "programs": list(calls)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(turn(calls[asked["program"]], asked["seconds"])), flush=True)


def turn(call: Call, seconds: float) -> list[float]:
    """The seconds of some calls: of two, and of more until all took ``seconds``.

    Threads that a runtime leaves spinning after a call have gone to sleep when the first one
    begins, which is not timed.
    """
    time.sleep(0.05)
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


class Process:
    """A process that serves. ``about`` is what it said of itself."""

    def __init__(
        self, module: str, workload: Workload, environment: Mapping[str, str] | None = None
    ) -> None:
        command = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(workload))]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self, program: str, seconds: float) -> list[float]:
        """Has it run one of its programs; the seconds of each call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"program": program, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        times: list[float] = self._answer()
        return times

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with status {self._process.wait()}")
        return json.loads(line)


def in_turns(
    processes: Mapping[str, Process], rounds: int, seconds: float
) -> dict[tuple[str, str], list[float]]:
    """For each process and program the seconds of all calls, over rounds of a turn of each."""
    programs: Sequence[tuple[str, str]] = [
        (name, program) for name, each in processes.items() for program in each.about["programs"]
    ]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for _ in range(rounds):
        for name, program in programs:
            times[name, program] += processes[name].turn(program, seconds)
    return times
