"""Errors that end a command, each with the exit code that DESIGN gives its kind.

The command line prints `str(error)`, one sentence for a person, and exits with `exit_code`.
"""


class AutotuneError(Exception):
    """Base of the product's own errors."""

    exit_code = 1


class BadInput(AutotuneError):
    """Wrong usage or bad input: the message says what, where, and what would be right."""

    exit_code = 2


class EnvironmentMissing(AutotuneError):
    """The environment lacks something: device, memory, disk space, file, dependency."""

    exit_code = 3


class Interrupted(AutotuneError):
    """Stopped by the user; what was measured is kept and the run can be resumed."""

    exit_code = 130
