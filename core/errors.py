"""The one exception for a user's mistakes."""


class UserError(ValueError):
    """A mistake of the user's: its message says what, where and how to fix it, in one line.

    The scripts print the message and exit with code 2. Every other exception keeps its traceback.
    """
