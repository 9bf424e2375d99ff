"""`autotune advise`: what would help, by how much, and what to do first."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autotune.cli.console import note, print_json
from autotune.cli.default_folder import default_folder
from autotune.cli.durations import parse_duration
from autotune.cli.exits import ExitCode
from autotune.cli.given_options import given_options, refuse_useless
from autotune.cli.knob_options import with_knobs
from autotune.cli.profile_options import (
    DEFAULT_WINDOW,
    DrainOption,
    MetricsUrlOption,
    PriceOption,
    SeedOption,
    WindowOption,
    check_price,
)
from autotune.cli.stages import progress_stages
from autotune.cli.traffic_options import TRAFFIC_PARAMETERS, with_traffic
from autotune.errors import BadInput
from autotune.traffic_options import TrafficOptions

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from autotune.advise.from_folder import Advised


@with_knobs(without=("seed",))
@with_traffic(duration="20s")
def advise(
    context: typer.Context,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|PROFILE]",
            help="Folder of a run, a bench or a profile, or a profile.json. Without one, the "
            "workload is profiled first.",
        ),
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(
            "--slo",
            help="The promise; advice is ranked by its binding metric. Default: that of the run "
            "that is read, else ttft<200ms,tpot<100ms.",
        ),
    ] = None,
    price: PriceOption = None,
    trial: Annotated[
        int | None,
        typer.Option(
            "--trial", help="With a run: which trial. Default: the first of the default config."
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="With a run: measure this machine's limits, if the folder does not tell them.",
        ),
    ] = False,
    metrics_url: MetricsUrlOption = None,
    window: WindowOption = DEFAULT_WINDOW,
    drain: DrainOption = "30s",
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the profile and the advice, where one is made; must be new. Default: "
            "runs/<time>-<model>.",
        ),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Explain every piece of advice, not only the first ones.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: findings and advice.")
    ] = False,
    *,
    traffic: TrafficOptions,
    knobs: dict[str, Any],
) -> None:
    """Say what would help: techniques ranked by predicted gain.

    Each has an interval, a confidence, its effort and what it costs, and the commands that try it.
    Reads a finished run or profile, or profiles the workload first. A model that does not fit is
    advised on by arithmetic alone. Exit code 0: done; 130: interrupted.
    """
    _refuse_contradictions(context, path, metrics_url, knobs)
    window_s = parse_duration(window, "--window")
    drain_s = parse_duration(drain, "--drain")
    check_price(price)
    with progress_stages() as (say, stop):
        if path is not None:
            from autotune.advise.from_folder import advise_folder

            found = advise_folder(
                path,
                slo=slo,
                price=price,
                trial=trial,
                calibrate=calibrate,
                seed=seed,
                say=say,
                stop=stop,
            )
            folder: Path | None = path if path.is_dir() else None
        else:
            found, folder = _of_now(
                {"seed": seed, **knobs},
                traffic,
                slo,
                price,
                drain_s,
                metrics_url,
                window_s,
                output,
                say,
                stop,
            )
        interrupted = stop.is_set()
    _show(found, folder, as_json=as_json, show_all=show_all)
    if interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _of_now(
    knobs: Mapping[str, Any],
    traffic: TrafficOptions,
    slo: str | None,
    price: float | None,
    drain_s: float,
    metrics_url: str | None,
    window_s: float,
    output: Path | None,
    say: Callable[[str], None],
    stop: threading.Event,
) -> tuple[Advised, Path | None]:
    """Profile a load or a server now, and advise on it; a model that does not fit by arithmetic."""
    from autotune.advise.commands import traffic_arguments
    from autotune.advise.from_folder import advised
    from autotune.profile_run import profile, profile_endpoint
    from autotune.search.options import DEFAULT_SLO
    from autotune.slo import parse_slo

    limits = str(parse_slo(DEFAULT_SLO if slo is None else slo))
    workload = traffic_arguments(sys.argv)
    named = str(knobs.get("model", ""))
    if metrics_url is not None:
        served = {name: value for name, value in knobs.items() if name != "seed"}
        outcome = profile_endpoint(
            metrics_url,
            window_s,
            knobs=served,
            slo=limits,
            price=price,
            output=output,
            command=sys.argv,
            say=say,
            stop=stop,
        )
        return advised(outcome.profile, None, say=say), output
    too_large = _too_large(knobs, limits, price)
    if too_large is not None:
        return advised(too_large, None, say=say), None
    folder = default_folder(named) if output is None else output
    outcome = profile(
        knobs,
        traffic,
        slo=limits,
        price=price,
        drain_limit=drain_s,
        output=folder,
        command=sys.argv,
        say=say,
        stop=stop,
    )
    found = advised(
        outcome.profile,
        outcome.evidence,
        seed=int(knobs.get("seed", 0)),
        workload=workload,
        say=say,
    )
    return found, folder


def _too_large(knobs: Mapping[str, Any], slo: str, price: float | None) -> Any:
    """The profile of a model that exceeds the memory; None if it does not."""
    from autotune.advise.unmeasured import profile_if_too_large
    from engine.config import EngineConfig

    return profile_if_too_large(EngineConfig.from_mapping(knobs), slo=slo, price=price)


def _show(found: Advised, folder: Path | None, *, as_json: bool, show_all: bool) -> None:
    from autotune.advise.keep import keep_advice
    from autotune.cli.advise_summary import print_advice
    from reports.report import render_report

    profile, diagnosis, advice = found
    for text in profile.notes:
        note(f"note: {text}")
    report = None
    if folder is not None and keep_advice(folder, profile, diagnosis, advice):
        report = render_report(folder)
    if as_json:
        body = {**diagnosis.to_json(), **advice.to_json()}
        body["notes"] = [*diagnosis.notes, *advice.notes]
        body["partial"] = profile.partial
        body["run_folder"] = None if folder is None else str(folder)
        print_json(body)
    else:
        print_advice(profile, diagnosis, advice, show_all=show_all)
    if report is not None:
        note(f"Report: {report}")


def _refuse_contradictions(
    context: typer.Context, path: Path | None, url: str | None, knobs: Mapping[str, Any]
) -> None:
    """Refuse options that would have no effect.

    Raises:
        BadInput: there is one; says which and why.
    """
    given = given_options(context)
    of_a_load = {n: given[n] for n in (*TRAFFIC_PARAMETERS, "drain") if n in given}
    set_knobs = {name: given.get(name, "--config") for name in knobs}
    run_options: tuple[str, ...] = ("trial", "calibrate")
    of_a_run = {n: given[n] for n in run_options if n in given}
    of_an_endpoint = {n: f for n, f in given.items() if n == "window"}
    if path is not None:
        if url is not None:
            raise BadInput(f"{path} and --metrics-url contradict each other: give one of them")
        more = {n: f for n, f in given.items() if n == "output"}
        useless = of_a_load | set_knobs | of_an_endpoint | more
        refuse_useless(useless, "a folder, which is read as it was measured")
    elif url is not None:
        refuse_useless(of_a_load | of_a_run, "--metrics-url, which watches a server's own traffic")
    else:
        refuse_useless(of_a_run, "no folder of a run: name one")
        refuse_useless(of_an_endpoint, "no --metrics-url")
