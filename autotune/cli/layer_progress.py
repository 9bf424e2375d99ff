"""Work on a model's layers on the terminal: layer i of n, and the time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import TextColumn

from autotune.cli.terminal_bar import TerminalBar


class LayerProgress(TerminalBar):
    """Draws on stderr: a bar on a terminal, a line a layer otherwise.

    The time left is judged by the layers of this run; those that an earlier one did cost nothing.
    """

    def __init__(self, console: Console, title: str) -> None:
        columns = (
            TextColumn("{task.fields[layers]}"),
            TextColumn("{task.fields[left]}", style="dim"),
        )
        super().__init__(console, title, columns, "layers", "left")
        self._title = title
        self._first: tuple[int, float] | None = None

    def layer(self, done: int, total: int) -> None:
        """Show that `done` of `total` layers are finished."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        first, began = self._first
        layers = f"layer {done} of {total}"
        left = ""
        if first < done < total:
            seconds = round((now - began) / (done - first) * (total - done))
            left = f"{seconds // 60}:{seconds % 60:02d} left"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, layers=layers, left=left)
        elif done or first:
            text = f"{self._title}: {layers}" + (f", {left}" if left else "")
            self._console.print(text, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Show what comes after the layers."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, left="")
        else:
            self._console.print(text, markup=False, soft_wrap=True)
