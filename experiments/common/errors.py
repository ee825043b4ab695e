"""The one exception that the scripts turn into a line on stderr."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right; the text is one line that says what was given.

    `status` is the exit status that the script ends with.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(" ".join(str(message).split()))
        self.status = status


def status_of(script: Callable[[], int]) -> int:
    """Runs a script; what the user or the system got wrong is a line on stderr and a status."""
    try:
        return script()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
