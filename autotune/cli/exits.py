"""How a command ends: every error becomes one sentence on stderr and an exit code.

| code | means |
|---|---|
| 0 | done, SLO met |
| 1 | a fault of ours |
| 2 | wrong usage or bad input |
| 3 | the environment lacks something |
| 4 | done, but no configuration meets the SLO |
| 5 | regression found by `retune` |
| 130 | interrupted; resumable |
| 141 | the reader of our output closed the pipe (what a shell reports for SIGPIPE) |
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer

from autotune.cli.console import complain
from autotune.errors import AutotuneError
from engine.errors import ConfigError, EngineError, EnvironmentLacks, ModelError, RequestRefused

P = ParamSpec("P")
R = TypeVar("R")

DEBUG_VARIABLE = "AUTOTUNE_DEBUG"


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAULT = 1
    BAD_INPUT = 2
    ENVIRONMENT = 3
    SLO_NOT_MET = 4
    REGRESSION = 5
    INTERRUPTED = 130
    PIPE_CLOSED = 141


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that no error leaves it as a traceback.

    The exits that Typer itself understands (usage errors, `typer.Exit`) pass through.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(report(error)) from None

    return run


def report(error: BaseException) -> int:
    """Tell a person what went wrong, on stderr; returns the exit code.

    With AUTOTUNE_DEBUG=1 the traceback is shown too. A fault of ours leaves its traceback in a
    file, so that it can be passed on without repeating what may have been a long run.
    """
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return ExitCode.PIPE_CLOSED
    code, message = explain(error)
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    if debug:
        sys.stderr.write("".join(traceback.format_exception(error)))
    elif code == ExitCode.FAULT:
        message = f"{message.rstrip('.')}. {_where_traceback(error)}"
    complain(message)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and the sentence for a person."""
    text = str(error).strip()
    match error:
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "Interrupted."
        case AutotuneError():
            return error.exit_code, text
        case ConfigError() | ModelError() | RequestRefused():
            return ExitCode.BAD_INPUT, text
        case EnvironmentLacks():
            return ExitCode.ENVIRONMENT, text
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return ExitCode.ENVIRONMENT, (
                f"No space is left on the disk{_of_file(error)}; free some, or choose a folder "
                "on another disk."
            )
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            reason = os.strerror(error.errno or 0).lower()
            return ExitCode.ENVIRONMENT, (
                f"A file cannot be used{_of_file(error)}: {reason}; change its permissions, or "
                "choose another folder."
            )
        case MemoryError():
            return ExitCode.ENVIRONMENT, "The machine ran out of memory."
        # torch.OutOfMemoryError, told by its name: importing torch takes seconds.
        case Exception() if type(error).__name__ == "OutOfMemoryError":
            return ExitCode.ENVIRONMENT, f"The device ran out of memory: {_first_line(text)}"
        case EngineError():
            return ExitCode.FAULT, text
    kind = type(error).__name__
    detail = f"{kind}: {_first_line(text)}" if text else kind
    return ExitCode.FAULT, f"This is a fault of ours: {detail}."


def _of_file(error: OSError) -> str:
    return f" for {error.filename}" if error.filename else ""


def _first_line(text: str) -> str:
    return text.splitlines()[0].rstrip(".") if text else ""


def _where_traceback(error: BaseException) -> str:
    again = f"{DEBUG_VARIABLE}=1 shows it at once."
    try:
        handle, path = tempfile.mkstemp(prefix="autotune-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{sys.argv}\n")
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return f"Its traceback could not be saved; {again}"
    return f"Its traceback is in {Path(path)}; {again}"


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe when it flushes at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
