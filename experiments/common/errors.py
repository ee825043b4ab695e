"""The one exception that the scripts turn into a line on stderr."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

from experiments.common.interrupt import Interrupted

LONGEST = 1000
"""Characters of a message; what is quoted in it may be as long as a file."""

FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_THE_USERS = (*FULL, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPIPE)
"""What no other command line or file would have mended."""


class UserError(Exception):
    """Something the user can put right; the text is one line that says what was given.

    `status` is the exit status that the script ends with: 1 for what is no mistake of the user's.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(one_line(message))
        self.status = status


def one_line(text: str) -> str:
    """The text in one line that a terminal shows as it is, without its middle if it is long.

    Example:
        >>> one_line("two\\nlines, and \\x1b[2J")
        'two lines, and \\\\x1b[2J'
    """
    text = " ".join(str(text).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def status_of(script: Callable[[], int]) -> int:
    """Runs a script; what the user or the system got wrong is a line on stderr and a status."""
    try:
        status = script()
        sys.stdout.flush()
        return status
    except Interrupted as stopped:
        _say(str(stopped))
        return 128 + stopped.signum
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except UserError as error:
        _say(f"error: {error}")
        return error.status
    except OSError as error:
        kept = "; what was saved before is kept" if error.errno in FULL else ""
        _say(f"error: {one_line(str(error))}{kept}")
        _drop_output(error)
        return 1 if error.errno in NOT_THE_USERS else 2
    except MemoryError as error:
        _say(f"error: out of memory: {one_line(str(error)) or 'it asked for more than there is'}")
        return 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr itself may be on the disk that is full
        print(text, file=sys.stderr, flush=True)


def _drop_output(error: OSError) -> None:
    """Keeps Python from a second complaint at its end about output that nobody can take."""
    if error.errno in NOT_THE_USERS:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an exception comes from, of whatever library.

    TensorStore and protobuf have kinds of their own, with the system's words in their text.
    """
    return any(
        (isinstance(one, OSError) and one.errno in FULL)
        or any(os.strerror(number) in str(one) for number in FULL)
        for one in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
