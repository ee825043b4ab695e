"""Ctrl-C and SIGTERM: as a wish that a loop can ask about, and before there is one."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Work that was asked to stop and has kept what it could.

    Attributes:
        signum: the signal that asked.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class LeaveAtOnce:
    """A handler that ends the process with a word and the status that shells give a signal.

    It is a command's as long as nothing is at work that could be saved. Python's own handler raises
    KeyboardInterrupt wherever the program is, and while modules are imported and programs compiled
    that is often within a function that C++ has called: there the exception is lost, or the process
    crashes.
    """

    @classmethod
    def install(cls) -> None:
        for signum in SIGNALS:
            signal.signal(signum, cls())

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(128 + signum)


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

    def check(self, message: str) -> None:
        """Raises Interrupted with this message if a signal has come."""
        if self._signum is not None:
            raise Interrupted(message, self._signum)

    def __enter__(self) -> "StopRequest":
        self._before = {signum: signal.signal(signum, self._ask) for signum in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        self._restore()


@contextlib.contextmanager
def left_to_the_system() -> Iterator[None]:
    """Lets a signal end the process while the body waits in a call that keeps Python from it."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
