"""`autotune doctor`: what is here, how fast it is, what is missing and how to get it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from autotune.cli.console import data_console, print_json, progress_steps
from autotune.cli.exits import ExitCode

_STYLES = {"ok": "green", "degraded": "yellow", "missing": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show hardware, libraries and measured limits, and how to get what is missing.

    Exits with 0 if the bundled engine can run here, with 3 otherwise.
    """
    from autotune.hardware.examination import examine

    with progress_steps() as step:
        findings = examine(step)
    if as_json:
        print_json(findings.to_json())
    else:
        table = Table(box=None, pad_edge=False)
        for heading in ("", "status", "found", "remedy"):
            table.add_column(heading, overflow="fold")
        for check in findings.checks:
            table.add_row(
                check.name,
                f"[{_STYLES[check.status]}]{check.status}[/]",
                check.found,
                check.remedy or "",
            )
        data_console().print(table)
    if not findings.engine_can_run:
        raise typer.Exit(ExitCode.ENVIRONMENT)
