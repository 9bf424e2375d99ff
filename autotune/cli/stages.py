"""What is going on, on stderr, while something that can be stopped runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape

from autotune.cli.console import message_console, note
from autotune.cli.interrupt import stop_on_interrupt

_STOPPING = "Stopping; what was measured is kept. Press Ctrl-C again to leave at once."


@contextmanager
def progress_stages(
    stopping: str = _STOPPING,
) -> Iterator[tuple[Callable[[str], None], threading.Event]]:
    """A function that tells the stage, and the event that Ctrl-C sets.

    `stopping` is said then. On a terminal the line is replaced as it goes on; otherwise each stage
    has one line.
    """
    console = message_console()
    with stop_on_interrupt(stopping) as stop:
        if console.is_terminal:
            with console.status("loading") as status:
                yield lambda text: status.update(escape(text)), stop
            return
        told = ""

        def say(text: str) -> None:
            nonlocal told
            # A line for each stage, and not one for each request.
            stage = text.partition(":")[0]
            if stage != told:
                told = stage
                note(stage)

        yield say, stop
