"""The page of a simulation: what a configuration would measure, and how sure that is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from reports.charts.acceptance import SIMULATED, acceptance_by_position
from reports.charts.forecast import latency_forecast
from reports.estimate import read_estimate
from reports.formatting import (
    MISSING,
    knob_value,
    mapping,
    moment,
    number,
    percent,
    sequence,
    significant,
)
from reports.limits import LATENCIES, limit_value
from reports.page import finite, render_page
from reports.plan.evidence import read_plan_limits
from reports.plan.money import chance
from reports.speculation import drafts_table, simulated_drafts

_RATES = {
    "requests_per_s": ("Finished requests", "requests/s"),
    "goodput_requests_per_s": ("Goodput", "requests/s"),
    "output_tokens_per_s": ("Output", "tokens/s"),
    "slo_attainment": ("Requests that met every limit", "share"),
    "error_rate": ("Error rate", "share"),
}
_COUNTS = {
    "mean_batch": "Mean sequences a step",
    "kv_peak_usage": "KV cache, peak use",
    "prefix_hit_rate": "Prefix hits",
    "preemptions": "Preemptions",
}
_SHARES = ("kv_peak_usage", "prefix_hit_rate")


@dataclass(frozen=True, slots=True)
class Forecast:
    """One limit of the SLO and its chance; `standing` is how the page marks it."""

    limit: str
    expected: str
    chance: str
    standing: Literal["met", "unsure", "missed", ""]


def simulation_page(run: Mapping[str, Any], simulation: Mapping[str, Any]) -> str:
    """The whole page, from the content of `run.json` and `simulation.json`."""
    share = number(simulation.get("p_meets_slo"))
    limits = read_plan_limits(run)
    command = [str(part) for part in sequence(run.get("command"))]
    if command:
        # Where the program lay on this machine does not matter on another.
        command[0] = PurePath(command[0]).name
    draws = number(simulation.get("draws"))
    drafts = simulated_drafts(run, simulation)
    draft_columns, draft_rows = drafts_table(drafts)
    tone, badge, headline = _say(share, draws)
    return render_page(
        "simulation.html.j2",
        run_json=finite({"run": dict(run), "simulation": dict(simulation)}),
        model=str(mapping(run.get("model")).get("name") or "unnamed model"),
        started=moment(run.get("started_at")),
        tone=tone,
        badge=badge,
        headline=headline,
        lead=_lead(run, simulation),
        limits=[_forecast(item, draws) for item in map(mapping, sequence(simulation.get("slo")))],
        notes=[str(note) for note in sequence(simulation.get("notes")) if note],
        latency=latency_forecast(simulation, limits),
        rates=_rates(simulation),
        draft_columns=draft_columns,
        draft_rows=draft_rows,
        acceptance=acceptance_by_position(drafts, SIMULATED),
        costs=_costs(simulation),
        knobs=[
            (name, knob_value(name, value))
            for name, value in mapping(run.get("engine_config")).items()
        ],
        command=shlex.join(command),
    )


def _say(share: float | None, draws: float | None) -> tuple[str, str, str]:
    if share is None:
        return "neutral", "Simulated", "Simulated without a limit to judge by"
    told = _share_of(share, draws)
    if told.endswith("%"):
        headline = f"{told[:1].upper()}{told[1:]} chance to meet the SLO"
    else:
        headline = f"{told[:1].upper()}{told[1:]} meet{'' if share > 0.5 else 's'} the SLO"
    if share >= 0.9:
        return "good", "Expected to meet the SLO", headline
    if share >= 0.5:
        return "caution", "Likely to meet the SLO", headline
    return "bad", "Likely to miss the SLO", headline


def _share_of(share: float | None, draws: float | None) -> str:
    """A share of the draws: of all or none of them no chance can be told."""
    if share is None or not draws or 0 < share < 1:
        return chance(share)
    return f"all of {draws:g} draws" if share >= 1 else f"none of {draws:g} draws"


def _lead(run: Mapping[str, Any], simulation: Mapping[str, Any]) -> str:
    workload, fleet = mapping(run.get("workload")), mapping(simulation.get("fleet"))
    rate, engines = number(workload.get("rate")), number(fleet.get("engines"))
    parts = []
    if rate is not None:
        parts.append(f"{significant(rate)} requests/s of {workload.get('source')}")
    if engines is not None and engines > 1:
        router = str(fleet.get("router") or "").replace("_", " ")
        parts.append(f"on {significant(engines)} engines ({router})")
    draws = number(simulation.get("draws"))
    if draws is not None:
        parts.append(f"in {draws:g} draws of what is not known")
    return f"Predicted, not measured: {' '.join(parts)}." if parts else "Predicted, not measured."


def _forecast(item: Mapping[str, Any], draws: float | None) -> Forecast:
    limit = str(item.get("limit") or "")
    expected, share = read_estimate(item.get("expected")), number(item.get("p_met"))
    unit = " ms" if any(limit.startswith(m) or f"({m})" in limit for m in LATENCIES) else ""
    text = MISSING
    if expected is not None:
        text = expected.written(lambda value: limit_value(limit, value), unit)
    standing: Literal["met", "unsure", "missed", ""] = ""
    if share is not None:
        standing = "met" if share >= 0.9 else "unsure" if share >= 0.5 else "missed"
    return Forecast(limit, text, _share_of(share, draws), standing)


def _rates(simulation: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for key, (name, unit) in _RATES.items():
        estimate = read_estimate(simulation.get(key))
        if estimate is not None:
            write = percent if unit == "share" else significant
            title = name if unit == "share" else f"{name} ({unit})"
            rows.append([title, *(write(v) for v in (estimate.value, estimate.low, estimate.high))])
    for key, name in _COUNTS.items():
        estimate = read_estimate(mapping(simulation.get("engine")).get(key))
        if estimate is not None:
            write = percent if key in _SHARES else significant
            rows.append([name, *(write(v) for v in (estimate.value, estimate.low, estimate.high))])
    return rows


def _costs(simulation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the costs of steps are from, as far as it is told in words or numbers."""
    facts = []
    for key, value in mapping(simulation.get("costs")).items():
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            amount = number(value)
            text = str(value) if amount is None else significant(amount)
            facts.append((key.replace("_", " "), text))
    return facts
