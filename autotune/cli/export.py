"""`autotune export`: a finished run's winner as the files of an engine or a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autotune.cli.console import note, print_json
from autotune.errors import BadInput


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            help="What the files are for: engine (the bundled one), another serving engine (vllm, "
            "sglang, trtllm, tgi, llamacpp, lmdeploy, openvino), or a platform that runs one "
            "(compose, kubernetes, kserve, helm, ray-serve, dynamo, nim, skypilot, systemd).",
            metavar="TARGET",
            show_default=False,
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            help="The engine that a platform is to run, where it can run several: vllm, sglang "
            "or engine.",
            metavar="ENGINE",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="What to load there in place of the measured folder: a name of the Hugging Face "
            "hub, or a path that is valid there.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    max_replicas: Annotated[
        int,
        typer.Option(help="Most replicas of a platform that scales by itself.", min=1),
    ] = 4,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder to write to; by default deploy/TARGET of the run.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are already in that folder.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object: the paths, what is lost, warnings."),
    ] = False,
) -> None:
    """Write a run's winner as an engine's or a platform's files.

    Prints the files' paths, that of the main file first.
    """
    from autotune.deploy.targets import find_target
    from autotune.deploy.write import ExportOptions, export_config, winner_of, write_exported
    from autotune.records import RunFolder

    folder = RunFolder(run)
    content = folder.read_run()
    target = find_target(to)
    exported = export_config(
        target, winner_of(content, run), content, ExportOptions(engine, model, max_replicas)
    )
    directory = folder.deploy / to if output is None else output
    there = [name for name in exported.files if (directory / name).exists()]
    if output is not None and there and not force:
        raise BadInput(
            f"{directory / there[0]} exists; choose another folder with -o, or replace it with "
            "--force"
        )
    paths = write_exported(exported, directory)
    for warning in exported.warnings:
        note(f"Warning: {warning}")
    if as_json:
        print_json(
            {
                "to": to,
                "file": str(paths[0]),
                "files": [str(path) for path in paths],
                "lost": [
                    {"knob": left.knob, "value": left.value, "reason": left.reason}
                    for left in exported.lost
                ],
                "warnings": list(exported.warnings),
            }
        )
        return
    for left in exported.lost:
        note(f"Not carried over: {left.knob}={left.value}: {left.reason}")
    for path in paths:
        typer.echo(path)
