"""`autotune export`: a finished run's winner as a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli.console import print_json
from autotune.errors import BadInput


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            help="What the file is for: engine (the bundled one) or another serving engine, "
            "such as vllm.",
            metavar="ENGINE",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder to write to; by default deploy/ of the run.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is already in that folder.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the path as one JSON object.")
    ] = False,
) -> None:
    """Write a run's winner as an engine's configuration file.

    Prints the file's path.
    """
    from autotune.deploy.write import file_name, winner_of, write_target
    from autotune.records import RunFolder

    folder = RunFolder(run)
    content = folder.read_run()
    config = winner_of(content, run)
    directory = folder.deploy if output is None else output
    path = directory / file_name(to)
    if output is not None and path.exists() and not force:
        raise BadInput(f"{path} exists; choose another folder with -o, or replace it with --force")
    write_target(to, directory, config, content)
    if as_json:
        print_json({"file": str(path), "to": to})
    else:
        typer.echo(path)
