"""Where a command's words go: data to stdout, messages and progress to stderr.

Colour only on a terminal and never with NO_COLOR. A console looks its stream up when it writes,
so that redirected streams are honoured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape

JSON_SCHEMA_VERSION = 1


def data_console() -> Console:
    """The console of a command's result: stdout."""
    return _console(stderr=False)


def message_console() -> Console:
    """The console of messages and progress: stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # With NO_COLOR rich still writes bold and dim as escape codes; a person who sets it wants none.
    if os.environ.get("NO_COLOR"):
        return Console(stderr=stderr, color_system=None, highlight=False)
    return Console(stderr=stderr, highlight=False)


def complain(message: str) -> None:
    """Print one error message on stderr."""
    console = message_console()
    console.print("Error: ", style="bold red", end="")
    console.print(message, markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Print one message, no error, on stderr."""
    message_console().print(message, markup=False, soft_wrap=True)


def print_json(payload: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, with the schema version first.

    Raises:
        ValueError: a number is not finite; JSON has no word for that.
    """
    document = {"schema_version": JSON_SCHEMA_VERSION, **payload}
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


class Steps(Protocol):
    """Says which step of a longer piece of work is under way."""

    def __call__(self, label: str) -> None:
        """Begin the step `label`; the one before it is over."""


@contextmanager
def progress_steps() -> Iterator[Steps]:
    """Show steps on stderr: a spinner on a terminal, a line each time otherwise."""
    console = message_console()
    if not console.is_terminal:
        yield lambda label: console.print(label, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda label: status.update(escape(label))
