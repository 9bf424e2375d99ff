"""A simulation on the terminal: latencies with their bounds, rates, and the SLO's chances."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from autotune.cli.console import data_console
from autotune.simulation.interval import Interval

if TYPE_CHECKING:
    from autotune.simulation.run import SimulateOutcome

_STATISTICS = ("mean", "p50", "p95", "p99")
_LABEL = 22
_LATENCIES = ("ttft", "tpot", "itl", "e2e")
_LONGEST_IN_MS = 9.9995  # seconds


def print_simulation(outcome: SimulateOutcome, console: Console | None = None) -> None:
    """Print what a simulation forecasts; to stdout."""
    console = console or data_console()
    metrics = outcome.simulated.metrics
    table = Table(box=None, pad_edge=False)
    for heading in ("", *_STATISTICS):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in _LATENCIES:
        intervals = [metrics[name][statistic] for statistic in _STATISTICS]
        longest = max((i.high for i in intervals if i is not None), default=0.0)
        # So that four numbers with their bounds fit a terminal of 80 columns.
        unit, scale = ("ms", 1e3) if longest < _LONGEST_IN_MS else ("s", 1.0)
        table.add_row(f"{name}, {unit}", *(_cell(interval, scale) for interval in intervals))
    console.print(table)
    for label, text in _lines(outcome):
        console.print(f"{label:{_LABEL}}{text}", markup=False, soft_wrap=True)
    for line in _chances(outcome):
        console.print(line, markup=False, soft_wrap=True)


def _lines(outcome: SimulateOutcome) -> Iterator[tuple[str, str]]:
    metrics = outcome.simulated.metrics
    engine = metrics["engine"]
    yield "fleet", str(outcome.fleet)
    yield "output tokens/s", _cell(metrics["output_tokens_per_s"])
    yield "requests/s", _cell(metrics["requests_per_s"])
    yield "goodput, requests/s", _cell(metrics["goodput_requests_per_s"])
    yield "offered, requests/s", _cell(metrics["offered_rate"])
    yield "within the SLO", _cell(metrics["slo_attainment"], 100, "%")
    missed = {name: metrics[name] for name in ("failed", "refused", "timed_out")}
    parts = [
        f"{_cell(interval)} {name.replace('_', ' ')}"
        for name, interval in missed.items()
        if interval is not None and interval.high > 0
    ]
    yield "requests", ", ".join([f"{_cell(metrics['completed'])} completed", *parts])
    yield "mean batch", _cell(engine["mean_batch"])
    yield "cache in use, at most", _cell(engine["kv_peak_usage"], 100, "%")
    hits = engine["prefix_hit_rate"]
    if hits is not None and hits.high > 0:
        yield "found in the cache", _cell(hits, 100, "%")
    if engine["preemptions"] is not None and engine["preemptions"].high > 0:
        yield "preemptions", _cell(engine["preemptions"])
    drafts = metrics.get("speculation")
    if drafts is not None:
        yield "tokens a step", _cell(drafts["tokens_per_step"])
        shares = [_cell(share, 100, "%") for share in drafts["acceptance"].values() if share]
        if shares:
            yield "accepted by position", ", ".join(shares)


def _chances(outcome: SimulateOutcome) -> Iterator[str]:
    simulated = outcome.simulated
    for limit in simulated.limits:
        yield f"{limit.limit:{_LABEL}}met with a chance of {limit.p_met:.0%}"
    if simulated.p_meets_slo is not None:
        draws = "1 draw" if simulated.draws == 1 else f"{simulated.draws} draws"
        yield f"{'chance to meet the SLO':{_LABEL}} {simulated.p_meets_slo:.0%} (of {draws})"


def _cell(interval: Any, scale: float = 1.0, unit: str = "") -> str:
    """The value, and in brackets its bounds if they differ."""
    if not isinstance(interval, Interval):
        return "-"
    shown = interval.scaled(scale)
    value, low, high = (_number(n) for n in (shown.value, shown.low, shown.high))
    if low == high == value:
        return f"{value}{unit}"
    return f"{value}{unit} ({low}-{high})"


def _number(number: float) -> str:
    """At most four characters of what is below 10000: three digits that count, fewer below 1."""
    if number >= 100 or number == round(number):
        return f"{number:.0f}"
    return f"{number:.{3 if number >= 1 else 2 if number >= 0.1 else 1}g}"
