"""The training of heads on the terminal: what is done, and how far."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import TextColumn

from autotune.cli.terminal_bar import TerminalBar

# Where stderr is no terminal, a line this often at most (seconds) within a stage.
_LINE_EVERY = 20.0


class TrainingProgress(TerminalBar):
    """Draws on stderr: a bar on a terminal, now and then a line otherwise."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.fields[detail]}", style="dim"),)
        super().__init__(console, "loading the model", columns, "detail")
        self._stage = ""
        self._told = 0.0

    def __call__(self, stage: str, share: float, detail: str) -> None:
        """Show that `share` (0 to 1) of a stage is done."""
        if self._console.is_terminal:
            self._bar.update(
                self._task, description=stage, total=1.0, completed=share, detail=detail
            )
            return
        now = time.monotonic()
        if stage == self._stage and now - self._told < _LINE_EVERY:
            return
        self._stage, self._told = stage, now
        text = f"{stage}: {detail}" if detail else stage
        self._console.print(text, markup=False, soft_wrap=True)
