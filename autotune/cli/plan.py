"""`autotune plan`: how many of which GPU, at what price, for a traffic and a promise."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from autotune.cli.console import note, print_json
from autotune.cli.exits import ExitCode
from autotune.cli.given_options import given_options, refuse_useless
from autotune.cli.profile_options import SeedOption
from autotune.cli.stages import progress_stages
from autotune.cli.traffic_options import with_traffic
from autotune.errors import BadInput
from autotune.traffic_options import TrafficOptions

_SERVING = "Ways of serving"
_SAFETY = "Safety"
_MONEY = "Money and growth"
_STOPPING = "Stopping. Press Ctrl-C again to leave at once."
_GPUS = "h100,h200,l40s,a100-80gb"


@with_traffic()
def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Folder of a model, or its config.json alone; weights are not needed. Default: "
            "the embedded model.",
        ),
    ] = None,
    gpus: Annotated[
        str,
        typer.Option("--gpus", help="GPUs to choose from, by the catalogue's names."),
    ] = _GPUS,
    slo: Annotated[
        str, typer.Option("--slo", help="Limits to keep, for instance ttft<500ms,tpot<50ms.")
    ] = "ttft<200ms,tpot<100ms",
    tensor_parallel_size: Annotated[
        str | None,
        typer.Option(
            "--tensor-parallel-size",
            metavar="N,N,..",
            help="GPUs that one replica may be divided among. Default: 1,2,4,8.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            metavar="METHOD,..",
            help="Weight quantizations to consider. Default: none,fp8,int8,int4, each where the "
            "GPU runs it fast.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            "--kv-cache-dtype",
            metavar="auto|int8|fp8",
            help="Type of the cached keys and values.",
            rich_help_panel=_SERVING,
        ),
    ] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            help="Longest sequence in tokens. Default: the longest of the traffic, rounded up to a "
            "power of two.",
            rich_help_panel=_SERVING,
        ),
    ] = None,
    router: Annotated[
        str,
        typer.Option(
            "--router",
            metavar="ROUTER",
            help="How replicas share the traffic: round_robin, least_loaded or prefix_aware.",
            rich_help_panel=_SERVING,
        ),
    ] = "round_robin",
    headroom: Annotated[
        str,
        typer.Option(
            "--headroom",
            help="How far bursts rise above the mean rate; replicas are counted for the burst.",
            rich_help_panel=_SAFETY,
        ),
    ] = "25%",
    spares: Annotated[
        int,
        typer.Option(
            "--spares",
            help="Replicas that may be away while the SLO still holds: 1 is N+1.",
            rich_help_panel=_SAFETY,
        ),
    ] = 1,
    probability: Annotated[
        str,
        typer.Option(
            "--probability",
            help="The least chance of meeting the SLO with which an option counts.",
            rich_help_panel=_SAFETY,
        ),
    ] = "90%",
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="cost|power|gpus|latency",
            help="What options are ranked by.",
            rich_help_panel=_MONEY,
        ),
    ] = "cost",
    growth: Annotated[
        str | None,
        typer.Option(
            "--growth",
            metavar="FACTOR/TIME",
            help="How the rate grows, for instance 2x/6mo or 30%/year: when each choice is "
            "outgrown, and what it takes then.",
            rich_help_panel=_MONEY,
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="GPU=USD|FILE",
            help="What you pay for a GPU-hour, for instance h100=2.49, or a file of such prices; "
            "repeatable. Default: the catalogue's examples.",
            rich_help_panel=_MONEY,
        ),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option("--catalogue", metavar="FILE", help="GPUs that join the installed catalogue."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="PATH",
            help="A calibration made on one of these GPUs, by autotune simulate, or the folder of "
            "a run or a profile: it narrows the bounds there.",
        ),
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", help="Guesses at what is not known of the GPUs.")
    ] = 16,
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for plan.json and report.html; must be new."),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every option, not the best alone.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with every option.")
    ] = False,
    *,
    traffic: TrafficOptions,
) -> None:
    """Tell how many of which GPU a traffic takes, and what they cost.

    Nothing is measured and no GPU is needed: a model's config.json and the data sheets are enough.

    Exit code 0: an option keeps the SLO; 4: none does, and what would is said.
    """
    from autotune.cli.plan_summary import print_plan
    from autotune.output_folder import claim_output
    from autotune.planning.growth import parse_growth
    from autotune.planning.options import PlanOptions, parse_share, split_names
    from autotune.planning.plan import plan as make_plan
    from autotune.planning.plan_folder import save_plan

    if as_json:
        given = given_options(context)
        refuse_useless({k: v for k, v in given.items() if k == "show_all"}, "--json")
    options = PlanOptions(
        model=model or _embedded(),
        traffic=traffic,
        slo=slo,
        gpus=split_names(gpus, "--gpus"),
        tensor_parallel_sizes=_sizes(tensor_parallel_size),
        quantizations=None if quantization is None else split_names(quantization, "--quantization"),
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        headroom=parse_share(headroom, "--headroom"),
        spares=spares,
        probability=parse_share(probability, "--probability"),
        objective=objective,  # type: ignore[arg-type]  # checked there
        router=router,  # type: ignore[arg-type]  # checked there
        growth=None if growth is None else parse_growth(growth),
        prices=tuple(price or ()),
        catalogue=catalogue,
        calibration=calibration,
        draws=draws,
        seed=seed,
    )
    began = time.monotonic()
    with claim_output(output):
        with progress_stages(_STOPPING) as (say, stop):
            found = make_plan(options, say=say, stop=stop)
        if output is not None:
            from reports.report import render_report

            save_plan(found, output, sys.argv, time.monotonic() - began)
            render_report(output)
    for text in found.notes:
        note(f"note: {text}")
    if as_json:
        print_json(found.to_json())
    else:
        print_plan(found, show_all=show_all)
    if output is not None:
        note(f"Report: {output / 'report.html'}")
    if not found.slo_met:
        raise typer.Exit(ExitCode.SLO_NOT_MET)


def _embedded() -> str:
    from autotune.embedded import TARGET

    return str(TARGET)


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise BadInput(
            f"--tensor-parallel-size {text!r}: write numbers of GPUs, for instance 1,2,4"
        ) from None
