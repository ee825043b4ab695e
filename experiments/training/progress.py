"""The progress bar: loss, accuracy, images per second and the time left."""

import sys

from tqdm import tqdm


class Progress:
    """A bar over all images of a run, on stderr.

    On a terminal it is redrawn in place; in a log file it comes once a minute.

    Args:
        name: the run's name.
        total: images in the whole run.
        done: images of it that earlier processes trained on.
        silent: whether nothing is shown.
    """

    def __init__(self, name: str, total: int, done: int = 0, *, silent: bool = False):
        self._silent = silent
        self._bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            unit="img",
            unit_scale=True,
            mininterval=0.2 if sys.stderr.isatty() else 60,
            maxinterval=60,
            dynamic_ncols=True,
            disable=silent,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def show(self, done: int, loss: float, accuracy: float) -> None:
        """Moves the bar to `done` images, with the running loss and accuracy."""
        self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._silent:
            self._bar.write(text, file=sys.stderr)
