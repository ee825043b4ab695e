"""The time that a run takes, and what is due."""

import time


class Clock:
    """When to look at the device and when to save; how long a run has taken.

    Looking at a step's numbers waits for that step, so it happens about twice a second and not
    at every step.
    """

    def __init__(self, before: float):
        self._start = time.monotonic() - before
        self._saved = self._epoch = self._fetched = self._drawn = time.monotonic()
        self._every, self._since = 1, 0

    def seconds(self) -> float:
        """Seconds spent on the run, those of the saved part of earlier processes included."""
        return time.monotonic() - self._start

    def start_epoch(self) -> None:
        self._epoch = time.monotonic()

    def epoch_seconds(self) -> float:
        return time.monotonic() - self._epoch

    def saved(self) -> None:
        self._saved = time.monotonic()

    def seconds_since_save(self) -> float:
        return time.monotonic() - self._saved

    def draw_due(self) -> bool:
        """True at most every ten seconds: drawing can take longer than a small epoch."""
        due = time.monotonic() - self._drawn > 10
        self._drawn = time.monotonic() if due else self._drawn
        return due

    def fetch_due(self) -> bool:
        self._since += 1
        return self._since >= self._every

    def fetched(self) -> None:
        now = time.monotonic()
        took = (now - self._fetched) / self._since
        self._every = min(max(1, int(0.5 / max(took, 1e-6))), 2 * self._since)
        self._fetched, self._since = now, 0
