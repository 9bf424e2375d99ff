"""`autotune run --engine`: the same run over the flags of an engine that is not ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autotune.cli.console import message_console, note
from autotune.cli.exits import ExitCode
from autotune.cli.interrupt import stop_on_interrupt
from autotune.cli.run_outcome import tell_outcome
from autotune.errors import BadInput, Interrupted

if TYPE_CHECKING:
    from autotune.external_search.options import ExternalOptions
    from autotune.search.options import TuneOptions

# Knob options that say what is served, not how.
_OF_THE_MODEL = ("model", "tokenizer", "device", "seed")


def external_tune_options(
    external: Mapping[str, Any],
    knobs: Mapping[str, Any],
    budget_s: float | None,
    asked: Mapping[str, Any],
) -> ExternalOptions:
    """The options of a search over another engine.

    Knob options fix the engine's knobs of the same name or meaning for every trial.

    Raises:
        BadInput: they contradict each other.
    """
    from autotune.external_search.options import (
        DEFAULT_BUDGET_S,
        DEFAULT_FINALISTS,
        DEFAULT_ROUNDS,
        ExternalOptions,
    )

    if budget_s is None and asked.get("trials") is None:
        budget_s = DEFAULT_BUDGET_S
    fixed = {name: value for name, value in knobs.items() if name not in _OF_THE_MODEL}
    return ExternalOptions(
        **{"finalists": DEFAULT_FINALISTS, "rounds": DEFAULT_ROUNDS, **asked},
        **external,
        model=str(knobs.get("model") or ""),
        tokenizer=knobs.get("tokenizer"),
        device=knobs.get("device"),
        fixed=fixed,
        budget_s=budget_s,
        advice=False,
    )


def is_external(path: Path) -> bool:
    """Whether the folder holds a run over another engine's flags."""
    from autotune.records import RunFolder

    try:
        return "engine" in RunFolder(path).read_run()
    except BadInput:
        return False  # the bundled engine's run tells what is wrong with the folder


def tune_other_engine(options: TuneOptions | None, path: Path, as_json: bool) -> None:
    """Tune, prove, report and write `deploy/`; None resumes the run in the folder."""
    from autotune.cli.search_progress import SearchProgress
    from autotune.external_search.deploy import write_external_deploy
    from autotune.external_search.options import ExternalOptions
    from autotune.external_search.prepare import engine_of, kept_options
    from autotune.external_search.tune import tune_external
    from autotune.records import RunFolder
    from autotune.search.prepare import read_search_run
    from reports.report import render_report

    folder = RunFolder(path)
    assert options is None or isinstance(options, ExternalOptions)
    if options is None:
        unit = read_search_run(folder)["objective_unit"]
    else:
        unit = options.parsed_objective.unit(options.parsed_slo)
    stopping = "Stopping; the server is ended and what was measured is kept."
    interrupted = False
    with (
        stop_on_interrupt(stopping) as stop,
        SearchProgress(message_console(), unit) as progress,
    ):
        try:
            record = tune_external(options, path, command=sys.argv, stop=stop, listener=progress)
        except Interrupted:
            interrupted = True
            record = folder.read_run()
    result = record["result"]
    if result is not None:
        engine, _ = engine_of(kept_options(record, folder))
        write_external_deploy(folder, record, engine)
    render_report(path)  # after deploy/, whose files it shows
    if interrupted:
        note(f"Interrupted. Report so far: {folder.report_html}")
        note(f"Go on with: autotune run --resume {path}")
        raise typer.Exit(ExitCode.INTERRUPTED)
    if result is not None and record["engine"]["url"] is not None:
        note(
            f"The server at {record['engine']['url']} has the flags of the last trial, or has been "
            f"ended: {folder.deploy / 'serve.sh'} restarts it with those that won."
        )
    tell_outcome(record, folder, as_json, {"engine": record["engine"]})
