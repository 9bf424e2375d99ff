"""A bar on the terminal for long work; where stderr is none, its user prints lines instead."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


class TerminalBar:
    """Draws on stderr while it is entered: a title, a bar and more columns.

    `fields` are the texts of the columns after the bar, empty at first.
    """

    def __init__(
        self, console: Console, title: str, columns: tuple[ProgressColumn, ...], *fields: str
    ) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            *columns,
            console=console,
            transient=True,
        )
        empty: dict[str, Any] = dict.fromkeys(fields, "")
        self._task = self._bar.add_task(title, total=None, **empty)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:  # else nothing was started, and stopping prints a line
            self._bar.stop()
