"""`autotune report`: make the HTML report of a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli.console import data_console, print_json


def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder that `autotune run`, `bench`, `profile`, `simulate` or `plan` wrote."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the HTML report of a folder again, from its records.

    The folder is of a run, finished or not, a bench, a profile, a simulation or a plan.
    """
    from reports.report import render_report

    path = render_report(run)
    if as_json:
        print_json({"report": str(path)})
    else:
        data_console().print(str(path), markup=False, soft_wrap=True)
