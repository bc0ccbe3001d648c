"""The one exception that a command turns into one line and exit code 2."""


class UserError(ValueError):
    """A mistake of the user: its message names the value, what was expected, and the remedy."""
