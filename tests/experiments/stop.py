"""A wish to stop that comes at a known place."""

import signal

from experiments.common.interrupt import StopRequest


class StopAfter(StopRequest):
    """Asks to stop when it has been asked `count` times."""

    def __init__(self, count: float = float("inf")):
        super().__init__()
        self.left = count

    @property
    def signum(self) -> int | None:
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None
