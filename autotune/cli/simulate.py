"""`autotune simulate`: one configuration under a workload, on a fleet, without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.cli.console import note, print_json
from autotune.cli.durations import parse_duration
from autotune.cli.exits import ExitCode
from autotune.cli.fleet_options import parse_bandwidth, parse_chances, parse_short_time
from autotune.cli.given_options import given_options
from autotune.cli.knob_options import with_knobs
from autotune.cli.profile_options import DrainOption, SeedOption
from autotune.cli.stages import progress_stages
from autotune.cli.traffic_options import with_traffic
from autotune.errors import BadInput
from autotune.traffic_options import TrafficOptions

_FLEET = "Fleet"
_COSTS = "Costs of steps"
_STOPPING = "Stopping. Press Ctrl-C again to leave at once."
_TRANSFERS = ("transfer_bandwidth", "transfer_latency")


# The knob `calibration` is a text that some methods quantize by; to a simulation it is nothing.
@with_knobs(without=("seed", "calibration"))
@with_traffic(duration="20s")
def simulate(
    context: typer.Context,
    slo: Annotated[
        str,
        typer.Option("--slo", help="Limits that goodput is counted by, for instance ttft<200ms."),
    ] = "ttft<200ms,tpot<100ms",
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas", help="Engines that share the load. Default: 1.", rich_help_panel=_FLEET
        ),
    ] = None,
    router: Annotated[
        str,
        typer.Option(
            "--router",
            metavar="ROUTER",
            help="Who gets a request: round_robin deals out in turn, least_loaded looks for the "
            "fewest unfinished requests, prefix_aware for the prompt's beginning in a cache.",
            rich_help_panel=_FLEET,
        ),
    ] = "round_robin",
    disaggregate: Annotated[
        str | None,
        typer.Option(
            "--disaggregate",
            metavar="P:D",
            help="Prompts on P engines, decodes on D others, for instance 2:1.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    transfer_bandwidth: Annotated[
        str,
        typer.Option(
            "--transfer-bandwidth",
            help="With --disaggregate: what the link of an engine with prompts carries of keys and "
            "values, for instance 25GB/s or 200Gbit/s.",
            rich_help_panel=_FLEET,
        ),
    ] = "25GB/s",
    transfer_latency: Annotated[
        str,
        typer.Option(
            "--transfer-latency",
            help="With --disaggregate: what a transfer takes beside that, for instance 1ms.",
            rich_help_panel=_FLEET,
        ),
    ] = "1ms",
    speculative_acceptance: Annotated[
        str | None,
        typer.Option(
            "--speculative-acceptance",
            metavar="P1,P2,..",
            help="The chance of each drafted token to be right once those before it were, for "
            "instance 0.8,0.6,0.4 as a profile measures them. Without --speculative-method as many "
            "are drafted in every step.",
            rich_help_panel=_FLEET,
        ),
    ] = None,
    speculative_draft_time: Annotated[
        str,
        typer.Option(
            "--speculative-draft-time",
            help="With --speculative-acceptance: what drafting adds to a step, for instance 2ms.",
            rich_help_panel=_FLEET,
        ),
    ] = "0",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="PATH",
            help="What steps cost: a calibration.json, or the folder of a run or a profile of this "
            "model. Default: this machine is calibrated once, in at most 60 s, which is kept.",
            rich_help_panel=_COSTS,
        ),
    ] = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate",
            help="Calibrate this machine again, whatever is kept of it.",
            rich_help_panel=_COSTS,
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help="Tell the costs by the data sheet of this GPU, for instance h100, instead of by "
            "measurement; a config.json is then enough of the model.",
            rich_help_panel=_COSTS,
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            help="Guesses at what is not known exactly, each of them simulated; of a preset each "
            "has arrivals and lengths of its own.",
        ),
    ] = 20,
    drain: DrainOption = "30s",
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the result and its report; must be new."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the metrics.")
    ] = False,
    *,
    traffic: TrafficOptions,
    knobs: dict[str, Any],
) -> None:
    """Predict what bench would measure, and how far it may be off.

    The engine's own scheduler runs in virtual time, with steps that take what a calibration says.
    Of several engines each request goes to the one that the router chooses.
    Each number comes with the bounds of its central 90%, and the SLO with the chance that it is
    met. Exit code 0: that is at least one half; 4: it is less; 130: interrupted.
    """
    given = given_options(context)
    for name in _TRANSFERS:
        if disaggregate is None and name in given:
            raise BadInput(f"{given[name]} goes with --disaggregate")
    from autotune.cli.simulate_summary import print_simulation
    from autotune.output_folder import claim_output
    from autotune.simulation.fleet import parse_disaggregation
    from autotune.simulation.options import SimulateOptions
    from autotune.simulation.run import run_simulation, save
    from reports.report import render_report

    acceptance = speculative_acceptance
    options = SimulateOptions(
        knobs=knobs,
        traffic=traffic,
        slo=slo,
        replicas=replicas,
        router=router,
        disaggregate=None if disaggregate is None else parse_disaggregation(disaggregate),
        transfer_bytes_per_s=parse_bandwidth(transfer_bandwidth, "--transfer-bandwidth"),
        transfer_latency_s=parse_short_time(transfer_latency, "--transfer-latency"),
        acceptance=()
        if acceptance is None
        else parse_chances(acceptance, "--speculative-acceptance"),
        draft_s=parse_short_time(speculative_draft_time, "--speculative-draft-time"),
        calibration=calibration,
        recalibrate=recalibrate,
        gpu=gpu,
        draws=draws,
        seed=seed,
        drain_limit=parse_duration(drain, "--drain"),
    )
    with claim_output(output):
        with progress_stages(_STOPPING) as (say, stop):
            outcome = run_simulation(options, say=say, stop=stop)
        report = None
        if output is not None:
            save(outcome, output, sys.argv)
            report = render_report(output)
    for text in outcome.notes:
        note(f"note: {text}")
    if as_json:
        print_json(outcome.to_json())
    else:
        print_simulation(outcome)
    if report is not None:
        note(f"Report: {report}")
    if not outcome.simulated.slo_met:
        raise typer.Exit(ExitCode.SLO_NOT_MET)
