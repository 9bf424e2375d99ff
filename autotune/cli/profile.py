"""`autotune profile`: where the time of a workload goes, and why."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
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
from autotune.profiling.trace_steps import DEFAULT_STEPS, TraceSteps, parse_trace_steps
from autotune.traffic_options import TrafficOptions

if TYPE_CHECKING:
    import threading

    from autotune.profile_outcome import ProfileOutcome

_FROM = "--from, which reads what was measured"
_URL = "--metrics-url, which watches a server's own traffic"
# Options that say how a load is run here.
_OF_A_LOAD = (*TRAFFIC_PARAMETERS, "drain", "seed", "trace", "trace_steps", "nsys")


@with_knobs(without=("seed",))
@with_traffic(duration="20s")
def profile(
    context: typer.Context,
    slo: Annotated[
        str | None,
        typer.Option(
            "--slo",
            help="Limits that findings are weighed by. Default: those of the run that is read, "
            "else ttft<200ms,tpot<100ms.",
        ),
    ] = None,
    price: PriceOption = None,
    read_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Read the records of a finished run, bench or profile instead of running a load.",
        ),
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option(
            "--trial",
            help="With --from: which trial of the run. Default: the first of the default config.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="With --from: measure this machine's limits, if the folder does not tell them.",
        ),
    ] = False,
    metrics_url: MetricsUrlOption = None,
    window: WindowOption = DEFAULT_WINDOW,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Also write a Chrome trace of some steps, recorded on a second load; it opens in "
            "ui.perfetto.dev.",
        ),
    ] = False,
    trace_steps: Annotated[
        str,
        typer.Option(
            "--trace-steps",
            metavar="FIRST:END",
            help="With --trace: which steps, from 0, the last not included.",
        ),
    ] = DEFAULT_STEPS,
    nsys: Annotated[
        bool,
        typer.Option(
            "--nsys",
            help="Run this command under NVIDIA Nsight Systems; prints what it runs.",
        ),
    ] = False,
    drain: DrainOption = "30s",
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the profile and its records; must be new. Default: "
            "runs/<time>-<model>; with --from the folder that is read, if it has no profile yet.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: the profile and its findings.")
    ] = False,
    *,
    traffic: TrafficOptions,
    knobs: dict[str, Any],
) -> None:
    """Show where a workload's time goes, and the bottlenecks.

    Offers the workload as bench does, measures this machine's limits, and writes profile.json and
    diagnosis.json. With --from it reads a finished run, with --metrics-url it watches a server.
    Exit code 0: done, whether or not the SLO is met; 130: interrupted, with what was measured till
    then.
    """
    _refuse_contradictions(context, knobs)
    steps = parse_trace_steps(trace_steps) if trace else None
    window_s = parse_duration(window, "--window")
    drain_s = parse_duration(drain, "--drain")
    check_price(price)
    folder = output
    if folder is None and read_from is None:
        folder = default_folder(_name(knobs.get("model", ""), metrics_url))
    if nsys:
        assert folder is not None
        raise typer.Exit(_under_nsys(folder, knobs, named=output is not None))
    with progress_stages() as (say, stop):
        if read_from is not None:
            outcome = _of_records(read_from, trial, slo, price, calibrate, folder, say, stop)
        elif metrics_url is not None:
            outcome = _of_endpoint(metrics_url, window_s, knobs, slo, price, folder, say, stop)
        else:
            outcome = _of_load(
                {"seed": seed, **knobs}, traffic, slo, price, drain_s, steps, folder, say, stop
            )
    _show(outcome, folder, read_from, as_json=as_json)
    if outcome.interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)


def _of_load(
    knobs: Mapping[str, Any],
    traffic: TrafficOptions,
    slo: str | None,
    price: float | None,
    drain_s: float,
    steps: TraceSteps | None,
    folder: Path | None,
    say: Callable[[str], None],
    stop: threading.Event,
) -> ProfileOutcome:
    from autotune.profile_run import profile as run_profile
    from autotune.search.options import DEFAULT_SLO

    return run_profile(
        knobs,
        traffic,
        slo=DEFAULT_SLO if slo is None else slo,
        price=price,
        drain_limit=drain_s,
        trace=steps,
        output=folder,
        command=sys.argv,
        say=say,
        stop=stop,
    )


def _of_records(
    path: Path,
    trial: int | None,
    slo: str | None,
    price: float | None,
    calibrate: bool,
    folder: Path | None,
    say: Callable[[str], None],
    stop: threading.Event,
) -> ProfileOutcome:
    from autotune.profile_records import profile_records

    return profile_records(
        path,
        trial=trial,
        slo=slo,
        price=price,
        calibrate=calibrate,
        output=folder,
        command=sys.argv,
        say=say,
        stop=stop,
    )


def _of_endpoint(
    url: str,
    window_s: float,
    knobs: Mapping[str, Any],
    slo: str | None,
    price: float | None,
    folder: Path | None,
    say: Callable[[str], None],
    stop: threading.Event,
) -> ProfileOutcome:
    from autotune.profile_run import profile_endpoint

    return profile_endpoint(
        url,
        window_s,
        knobs=knobs,
        slo=slo,
        price=price,
        output=folder,
        command=sys.argv,
        say=say,
        stop=stop,
    )


def _show(
    outcome: ProfileOutcome, folder: Path | None, read_from: Path | None, *, as_json: bool
) -> None:
    from autotune.cli.profile_summary import print_profile
    from reports.report import render_report

    for text in outcome.profile.notes:
        note(f"note: {text}")
    report = None if folder is None else render_report(folder)
    kept = read_from if folder is None else folder
    if as_json:
        print_json({**outcome.to_json(), "run_folder": None if kept is None else str(kept)})
    else:
        print_profile(outcome.profile, outcome.diagnosis)
    if report is not None:
        note(f"Report: {report}")
    if outcome.trace is not None:
        note(f"Trace: {outcome.trace}, for https://ui.perfetto.dev")


def _refuse_contradictions(context: typer.Context, knobs: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect.

    Raises:
        BadInput: there is one; says which and why.
    """
    given = given_options(context)
    knob_flags = {name: given.get(name, "--config") for name in knobs}
    if "config" in given:
        knob_flags["config"] = "--config"
    if "read_from" in given:
        if "metrics_url" in given:
            raise BadInput("--from and --metrics-url contradict each other: give one of them")
        useless = {n: given[n] for n in (*_OF_A_LOAD, "window") if n in given} | knob_flags
        refuse_useless(useless, _FROM)
    elif "metrics_url" in given:
        refuse_useless(
            {n: given[n] for n in (*_OF_A_LOAD, "trial", "calibrate") if n in given}, _URL
        )
    else:
        for name, needs in (
            ("trial", "--from FOLDER"),
            ("calibrate", "--from FOLDER"),
            ("window", "--metrics-url URL"),
        ):
            if name in given:
                raise BadInput(f"{given[name]} goes with {needs}")
        if "trace_steps" in given and "trace" not in given:
            raise BadInput("--trace-steps goes with --trace")


def _name(model: str, url: str | None) -> str:
    """What the default folder is named for: the model, or the server."""
    if url is None:
        return model
    return re.sub(r"^https?://", "", url).partition("/")[0].replace(":", "-")


def _under_nsys(folder: Path, knobs: Mapping[str, Any], *, named: bool) -> int:
    """Run this command again under Nsight Systems; its exit code."""
    from autotune.hardware.detect import describe_hardware
    from autotune.profiling.nsys import nsys_command, run_under_nsys

    if describe_hardware(str(knobs.get("device", "auto")))["device"] == "cpu":
        note("note: the model is served on the CPU here, so Nsight Systems sees no GPU at work")
    arguments = sys.argv[1:] if named else [*sys.argv[1:], "--output", str(folder)]
    # Beside the folder, which the command makes and wants for itself.
    report = folder.with_name(folder.name + "-nsys")
    command = nsys_command(arguments, report)
    code = run_under_nsys(command, report, note)
    note(f"Nsight Systems report: {report}.nsys-rep, for nsys-ui or nsys stats")
    return code
