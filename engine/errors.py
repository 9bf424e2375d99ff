"""Errors that the engine raises on purpose.

Each carries one sentence for a person: what is wrong, where, and what would be right.
"""


class EngineError(Exception):
    """Base of every error that the engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A knob has a bad value, or two knobs contradict each other."""


class ModelError(EngineError):
    """A model folder is missing, broken or of an unsupported architecture."""


class EnvironmentLacks(EngineError):
    """The machine lacks something that was asked for: a device, memory, a dependency."""


class RequestRefused(EngineError):
    """A request can never be served as asked; the text is the reason."""


def first_line(error: BaseException) -> str:
    """An error's first line, or its type where it has no text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
