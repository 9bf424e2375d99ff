"""`autotune doctor --tune-kernels`: progress while kernels are measured, and what it came to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Table

from autotune.cli.console import data_console, message_console, note, print_json
from autotune.cli.exits import ExitCode
from autotune.cli.interrupt import stop_on_interrupt
from autotune.cli.terminal_bar import TerminalBar

if TYPE_CHECKING:
    from autotune.kernel_tuning import KernelTuning

DEFAULT_BUDGET = "10m"
MOST_ROWS = 20
# Where stderr is no terminal: a line now and then, not one for each of hundreds of problems.
SECONDS_BETWEEN_LINES = 10.0


def tune(model: str, budget_s: float, *, as_json: bool) -> None:
    """Measure the kernels for a model and show what was gained."""
    from autotune.kernel_tuning import tune_kernels

    stopping = "Stopping after this kernel; what was measured is kept. Press Ctrl-C again to leave."
    with stop_on_interrupt(stopping) as stop, TuningProgress(message_console()) as progress:
        result = tune_kernels(model, budget_s, progress.show, stop.is_set)
        interrupted = stop.is_set()
    if as_json:
        print_json(result.to_json())
    else:
        _show(result, data_console())
    if interrupted:
        note("Interrupted. The same command goes on where this one ended.")
        raise typer.Exit(ExitCode.INTERRUPTED)


class TuningProgress(TerminalBar):
    """Draws on stderr: a bar on a terminal, a line now and then otherwise."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.fields[name]}", markup=False),)
        super().__init__(console, "", columns, "name")
        self._said = ("", 0.0)

    def show(self, title: str, done: int, total: int, name: str) -> None:
        """Show that `done` of `total` operations of a part of the work are measured."""
        if self._console.is_terminal:
            self._bar.update(
                self._task, description=title, completed=done, total=total or None, name=name
            )
            return
        now = time.monotonic()
        said, at = self._said
        if said != title or now - at >= SECONDS_BETWEEN_LINES:
            self._said = (title, now)
            count = f" {done} of {total}," if total else ""
            self._console.print(f"{title}:{count} {name}", markup=False, soft_wrap=True)


def _show(result: KernelTuning, console: Console) -> None:
    console.print(
        f"{len(result.results)} kernel problems of {result.model} measured on {result.device} in "
        f"{result.seconds:.0f} s, {result.known} were known; for {len(result.improved)} another "
        "choice than the default is faster.",
        markup=False,
    )
    if result.improved:
        console.print(_table(result))
    for text in result.failures:
        console.print(f"could not be measured: {text}", markup=False)
    if result.left:
        left = "; ".join(result.left)
        console.print(
            f"The budget ended before: {left}. The same command goes on there.", markup=False
        )
    console.print(f"Saved in {Path(result.file)}", markup=False, soft_wrap=True)


def _table(result: KernelTuning) -> Table:
    """The problems whose default was beaten by most, in microseconds."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("kernel", "sizes"):
        table.add_column(name)
    for name in ("default µs", "best µs"):
        table.add_column(name, justify="right")
    table.add_column("choice")
    rows = sorted(result.improved, key=lambda row: row["seconds"] / row["default_seconds"])
    for row in rows[:MOST_ROWS]:
        tiles = " ".join(f"{name}={value}" for name, value in row["tiles"].items())
        table.add_row(
            escape(row["kernel"]),
            "x".join(str(size) for size in row["sizes"]),
            f"{row['default_seconds'] * 1e6:.1f}",
            f"{row['seconds'] * 1e6:.1f}",
            escape(f"{row['path']} {tiles}".strip()),
        )
    return table
