"""`autotune run`: search, prove, report and write the configs to deploy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotune.cli.console import message_console, note
from autotune.cli.default_folder import default_folder
from autotune.cli.durations import parse_duration
from autotune.cli.exits import ExitCode
from autotune.cli.external_options import with_external
from autotune.cli.given_options import given_options
from autotune.cli.interrupt import stop_on_interrupt
from autotune.cli.knob_options import with_knobs
from autotune.cli.run_outcome import tell_outcome
from autotune.cli.traffic_options import with_traffic
from autotune.errors import BadInput, Interrupted
from autotune.fast_yaml import safe_load
from autotune.traffic_options import TrafficOptions

if TYPE_CHECKING:
    from autotune.records import RunFolder

_SEARCH = "Search"


@with_knobs(without=("seed",))
@with_traffic()
@with_external()
def run(
    context: typer.Context,
    slo: Annotated[
        str | None,
        typer.Option(
            "--slo",
            help="The promise, for instance 'ttft<200ms,p99(tpot)<100ms'; p95 where no statistic "
            "is named. Default: ttft<200ms,tpot<100ms.",
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="What is optimised: goodput, throughput, capacity (highest rate that meets the "
            "SLO), latency or cost (needs --price).",
            rich_help_panel=_SEARCH,
        ),
    ] = "goodput",
    price: Annotated[
        float | None,
        typer.Option(
            "--price", help="USD per hour of this machine, for cost.", rich_help_panel=_SEARCH
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Wall-clock time of the whole run, for instance 10m. Default: 4m, or 60m of "
            "another engine, or none with --trials.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            help="Most search trials, the default config included.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option(
            "--finalists",
            help="Configurations measured again against the default. Default: 2, or 1 of another "
            "engine.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            help="Measurements of each in the proof. Default: 5, or 4 of another engine.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    confidence: Annotated[
        float,
        typer.Option(
            "--confidence", help="Confidence of the gain's interval.", rich_help_panel=_SEARCH
        ),
    ] = 0.95,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            help="Values to try for a knob, for instance max_num_seqs=8,32,128; a single value "
            "fixes it. Repeatable.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(
            "--space",
            help="YAML file of knobs and values in place of the device's search space.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Drives everything random.", rich_help_panel=_SEARCH)
    ] = 0,
    advice: Annotated[
        bool,
        typer.Option(
            "--advice/--no-advice",
            help="Profile the default's trial and begin the search with what follows from it; "
            "takes up to a tenth of the budget.",
            rich_help_panel=_SEARCH,
        ),
    ] = True,
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            help="What chooses the trials: simulator measures what simulated trials promise; tpe "
            "and random are Optuna's.",
            rich_help_panel=_SEARCH,
        ),
    ] = "simulator",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Run folder. Default: runs/<time>-<model>."),
    ] = None,
    lm_eval_tasks: Annotated[
        str | None,
        typer.Option(
            "--lm-eval-tasks",
            help="Tasks of lm-eval, for instance arc_easy,hellaswag, that default and winner are "
            "scored on at the end; needs lm-eval, which may fetch a task's data.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Go on with the run in this folder; other options are ignored."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the result.")
    ] = False,
    *,
    traffic: TrafficOptions,
    external: dict[str, Any] | None,
    knobs: dict[str, Any],
) -> None:
    """Tune the engine for a workload and an SLO; prove the winner.

    Writes report and configuration files. The config given by knob options (or the engine's
    defaults) is measured first; every gain is over it. Exit code 0: the SLO is met; 4: no
    configuration meets it; 130: interrupted, to be continued with --resume. With --engine the
    flags of another engine are tuned, on that engine.
    """
    from autotune.cli.run_external import external_tune_options, is_external, tune_other_engine
    from autotune.search.objective import Objective
    from autotune.search.options import DEFAULT_BUDGET_S, DEFAULT_SLO, TuneOptions

    tasks = [task.strip() for task in (lm_eval_tasks or "").split(",") if task.strip()]
    other_engine = external is not None or (resume is not None and is_external(resume))
    if tasks:
        from autotune.lm_eval_adapter import check_lm_eval

        if other_engine:
            raise BadInput(
                "--lm-eval-tasks scores the bundled engine: leave it out for another engine"
            )
        check_lm_eval()  # now, and not after the search
    if resume is not None:
        _say_what_is_ignored(context)
        options: TuneOptions | None = None
        folder = resume
    else:
        budget_s = None if budget is None else parse_duration(budget, "--budget")
        # Of any type: the options' own checks tell what is wrong.
        asked: dict[str, Any] = {
            "traffic": traffic,
            "slo": DEFAULT_SLO if slo is None else slo,
            # Objective refuses an unknown name with the list of known ones.
            "objective": Objective(objective, price).name,  # type: ignore[arg-type]
            "price": price,
            "trials": trials,
            "confidence": confidence,
            "narrowing": _narrowing(search or []),
            "space_file": None if space is None else str(space),
            "seed": seed,
            # The options refuse an unknown name with the list of known ones.
            "sampler": sampler,
        }
        asked |= {"finalists": finalists} if finalists is not None else {}
        asked |= {"rounds": rounds} if rounds is not None else {}
        folder = output or default_folder(knobs.get("model", ""))
        if external is None:
            if budget_s is None and trials is None:
                budget_s = DEFAULT_BUDGET_S
            config = {"seed": seed, **knobs}
            options = TuneOptions(config=config, budget_s=budget_s, advice=advice, **asked)
        else:
            options = external_tune_options(external, knobs, budget_s, asked)
        options.parsed_slo  # noqa: B018 - complain before anything heavy is imported
    if other_engine:
        tune_other_engine(options, folder, as_json)
        return
    _tune_and_report(options, folder, as_json, tasks)


def _tune_and_report(options: Any, path: Path, as_json: bool, tasks: Sequence[str]) -> None:
    from autotune.cli.search_progress import SearchProgress
    from autotune.deploy.write import write_deploy
    from autotune.records import RunFolder
    from autotune.search.prepare import read_search_run
    from autotune.search.tune import tune
    from engine.config import EngineConfig
    from reports.report import render_report

    folder = RunFolder(path)
    if options is None:
        unit = read_search_run(folder)["objective_unit"]
    else:
        unit = options.parsed_objective.unit(options.parsed_slo)
    stopping = "Stopping; what was measured is kept. Press Ctrl-C again to leave at once."
    interrupted: Interrupted | None = None
    with (
        stop_on_interrupt(stopping) as stop,
        SearchProgress(message_console(), unit) as progress,
    ):
        try:
            record = tune(options, path, command=sys.argv, stop=stop, listener=progress)
        except Interrupted as error:
            interrupted = error
            record = folder.read_run()
    result = record["result"]
    if result is not None:
        write_deploy(folder, EngineConfig.from_mapping(result["winner_config"]), evidence=record)
    render_report(path)  # after deploy/, whose files it shows
    if result is not None and tasks and interrupted is None:
        # Long, and it may fail: what the search found is written by now.
        _score_on_tasks(folder, record, tasks)
    if interrupted is not None:
        note(f"Interrupted. Report so far: {folder.report_html}")
        note(f"Go on with: autotune run --resume {path}")
        raise typer.Exit(ExitCode.INTERRUPTED)
    told = result or {}
    more = {
        "quality": told.get("quality") or {},
        "scoreboard": told.get("scoreboard"),
        "infeasible": told.get("infeasible") or [],
        "lm_eval": told.get("lm_eval"),
    }
    tell_outcome(record, folder, as_json, more)


def _score_on_tasks(folder: RunFolder, record: dict[str, Any], tasks: Sequence[str]) -> None:
    """Put lm-eval's scores of default and winner into `run.json`."""
    from autotune.lm_eval_adapter import run_tasks
    from engine.config import EngineConfig

    result = record["result"]
    sides = {"default": record["engine_config"], "winner": result["winner_config"]}
    scores: dict[str, Any] = {}
    for side, config in sides.items():
        same = side == "winner" and config == sides["default"]
        if not same:
            note(f"lm-eval: scoring the {side} on {', '.join(tasks)}")
        scores[side] = (
            scores["default"] if same else run_tasks(EngineConfig.from_mapping(config), tasks)
        )
    result["lm_eval"] = scores
    folder.write_json(folder.run_json, record)


def _say_what_is_ignored(context: typer.Context) -> None:
    """Name the options beside `--resume` that have no effect."""
    heeded = ("resume", "as_json", "lm_eval_tasks")
    ignored = [flag for name, flag in given_options(context).items() if name not in heeded]
    if ignored:
        note(f"note: a resumed run goes on with its own options; ignored: {', '.join(ignored)}")


def _narrowing(texts: list[str]) -> dict[str, list[Any]]:
    """`knob=value,value` texts as lists of values, typed as YAML types a plain scalar."""
    import yaml

    narrowing: dict[str, list[Any]] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not separator or not values.strip():
            raise BadInput(
                f"--search {text!r} must be KNOB=VALUE,VALUE,... for instance max_num_seqs=8,32,128"
            )
        try:
            narrowing[name.strip()] = [safe_load(value) for value in values.split(",")]
        except yaml.YAMLError:
            raise BadInput(f"--search {text!r}: {values!r} is not a list of plain values") from None
    return narrowing
