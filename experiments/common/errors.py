"""The one exception that the scripts turn into a line on stderr."""


class UserError(Exception):
    """Something the user can put right; the text is one line that says what was given.

    `status` is the exit status that the script ends with.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(" ".join(str(message).split()))
        self.status = status
