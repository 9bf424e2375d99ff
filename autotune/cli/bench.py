"""`autotune bench`: one configuration under a workload, measured."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from autotune.cli.console import data_console, message_console, note, print_json
from autotune.cli.durations import parse_duration
from autotune.cli.exits import ExitCode
from autotune.cli.interrupt import stop_on_interrupt
from autotune.cli.knob_options import with_knobs
from autotune.cli.profile_options import DrainOption, SeedOption
from autotune.cli.server_options import (
    ApiKeyOption,
    Send,
    SendOption,
    ServedModelOption,
    UrlOption,
    prompt_form,
    refuse_contradictions,
)
from autotune.cli.speculation_summary import speculation_sentence
from autotune.cli.traffic_options import with_traffic
from autotune.errors import EnvironmentMissing
from autotune.plain_number import plain_number
from autotune.traffic_options import TrafficOptions

if TYPE_CHECKING:
    from autotune.records import LimitResult

# How a load is measured, in process or over HTTP, and how what came of it is kept.
_Measure = Callable[..., Any]
_Save = Callable[[Any, Path, list[str]], None]


@with_knobs(without=("seed",))
@with_traffic(duration="20s")
def bench(
    slo: Annotated[
        str,
        typer.Option("--slo", help="Limits that goodput is counted by, for instance ttft<200ms."),
    ] = "ttft<200ms,tpot<100ms",
    drain: DrainOption = "30s",
    seed: SeedOption = 0,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the result and its records; must be new."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the metrics.")
    ] = False,
    url: UrlOption = None,
    served_model: ServedModelOption = None,
    api_key_env: ApiKeyOption = None,
    send: SendOption = None,
    *,
    traffic: TrafficOptions,
    knobs: dict[str, Any],
) -> None:
    """Offer a workload to one configuration and measure it.

    With --url the load goes to a running server over HTTP; --tokenizer then names the folder of
    its model's tokenizer, where the server does not tell it.

    Exit code 0: the SLO is met; 4: it is not; 130: interrupted, with what was measured till then.
    """
    from autotune.output_folder import claim_output

    only_with_url = {"--served-model": served_model, "--api-key-env": api_key_env, "--send": send}
    refuse_contradictions(url, only_with_url, knobs)
    measure, save = (
        _in_process(seed, knobs)
        if url is None
        else _of_server(url, served_model, api_key_env, send, seed, knobs)
    )
    stopping = "Stopping; what was measured is shown. Press Ctrl-C again to leave at once."
    console = message_console()
    status = console.status("loading") if console.is_terminal else contextlib.nullcontext()
    with claim_output(output):
        with stop_on_interrupt(stopping) as stop, status as live:

            def say(text: str) -> None:
                if live is not None:
                    live.update(text)

            outcome = measure(
                traffic,
                slo=slo,
                drain_limit=parse_duration(drain, "--drain"),
                say=say,
                stop=stop,
            )
        for text in outcome.notes:
            note(f"note: {text}")
        try:
            if as_json:
                print_json(outcome.metrics)
            else:
                _print(outcome.metrics, outcome.slo)
        finally:
            if output is not None:
                save(outcome, output, sys.argv)
    if stop.is_set():
        raise typer.Exit(ExitCode.INTERRUPTED)
    if url is not None and outcome.lost is not None:
        raise EnvironmentMissing(outcome.lost)
    if not outcome.slo_met:
        raise typer.Exit(ExitCode.SLO_NOT_MET)


def _in_process(seed: int, knobs: Mapping[str, Any]) -> tuple[_Measure, _Save]:
    from autotune.bench import bench as run_bench
    from autotune.bench import save

    return partial(run_bench, {"seed": seed, **knobs}), save


def _of_server(
    url: str,
    served_model: str | None,
    api_key_env: str | None,
    send: Send | None,
    seed: int,
    knobs: Mapping[str, Any],
) -> tuple[_Measure, _Save]:
    from autotune.bench_server import bench_server, save_server_bench
    from autotune.load.endpoint import api_key_of

    measure = partial(
        bench_server,
        url,
        seed=seed,
        served_model=served_model,
        api_key=api_key_of(api_key_env),
        prompts=prompt_form(send),
        tokenizer=knobs.get("tokenizer") or knobs.get("model"),
        max_model_len=knobs.get("max_model_len"),
    )
    return measure, save_server_bench


def _print(metrics: Mapping[str, Any], limits: list[LimitResult]) -> None:
    console = data_console()
    table = Table(box=None, pad_edge=False)
    statistics = ("mean", "p50", "p90", "p95", "p99")
    for heading in ("ms", *statistics, "p95 interval"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for name in ("ttft", "tpot", "itl", "e2e"):
        values = metrics[name]
        bounds = (values.get("intervals") or {}).get("p95")
        interval = "-" if not bounds else f"{_ms(bounds[0])} to {_ms(bounds[1])}"
        shown = ("-" if values[s] is None else _ms(values[s]) for s in statistics)
        table.add_row(name, *shown, interval)
    console.print(table)
    for label, value in (
        ("output tokens/s", metrics["output_tokens_per_s"]),
        ("requests/s", metrics["requests_per_s"]),
        ("goodput, requests/s", metrics["goodput_requests_per_s"]),
        ("offered, requests/s", metrics["offered_rate"]),
    ):
        console.print(f"{label:22}{'-' if value is None else plain_number(value, 4)}")
    attained = metrics["slo_attainment"]
    console.print(f"{'within the SLO':22}{'-' if attained is None else f'{attained:.1%}'}")
    others = sum(metrics[outcome] for outcome in ("failed", "refused", "timed_out"))
    console.print(f"{'requests':22}{metrics['completed']} completed, {others} not")
    if metrics["speculation"] is not None:
        text = speculation_sentence(metrics["speculation"])
        console.print(f"{'speculation':22}{text}", markup=False, soft_wrap=True)
    if not metrics["load_delivered"]:
        console.print(f"No verdict: {metrics['load_note']}", markup=False, soft_wrap=True)
    for limit in limits:
        missed = "missed" if limit.measured is None else f"missed by {limit.violation:.0%}"
        console.print(f"{limit.limit:22}{'met' if limit.met else missed}", markup=False)


def _ms(seconds: float) -> str:
    return plain_number(seconds * 1e3, 4)
