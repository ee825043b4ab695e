"""Ctrl-C and SIGTERM as a wish that a loop can ask about."""

import signal
from types import FrameType


class Interrupted(Exception):
    """A run was asked to stop and has saved itself.

    Attributes:
        signum: the signal that asked.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered; `signum` is the one that came, or None.

    A second signal acts as if nobody caught it.
    """

    def __init__(self) -> None:
        self._signum: int | None = None

    @property
    def signum(self) -> int | None:
        """The signal that came, if one did."""
        return self._signum

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self._restore()
