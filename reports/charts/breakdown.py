"""Where the time goes: one bar a metric, divided by what it was spent on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reports.charts.figure import Figure, mark_key
from reports.charts.plot import Axis, Plot
from reports.formatting import duration, mapping, milliseconds, number, percent, sequence

# In the order in which a request meets them; each with the class of its colour.
COMPONENTS: Mapping[str, tuple[str, str]] = {
    "queue": ("waiting for a seat", "c-queue"),
    "preempted": ("preempted", "c-preempted"),
    "interference": ("others’ prompts", "c-interference"),
    "prefill_linear": ("own prompt, linear layers", "c-prefill"),
    "prefill_attention": ("own prompt, attention", "c-attention"),
    "weights": ("reading weights", "c-weights"),
    "linear_compute": ("arithmetic of decodes", "c-compute"),
    "kv_reads": ("reading keys and values", "c-kv"),
    "verification": ("verifying drafts", "c-verification"),
    "drafting": ("drafting", "c-drafting"),
    "communication": ("communication", "c-communication"),
    "host": ("host", "c-host"),
    "other": ("not explained", "c-other"),
    "idle": ("idle", "c-idle"),
}
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "throughput": "Wall time"}
_LEAST_LABELLED = 0.07
_LEAST_SHOWN = 0.002


def time_breakdown(profile: Mapping[str, Any]) -> Figure | None:
    """Stacked bars of TTFT, TPOT and wall time; None where no breakdown is known."""
    bars = [b for b in map(_bar, sequence(profile.get("breakdowns"))) if b is not None]
    if not bars:
        return None
    count = len(bars)
    labels = [(count - 1 - i, _NAMES.get(name, name)) for i, (name, _, _) in enumerate(bars)]
    plot = Plot(
        Axis("share of the time", 0.0, 1.0, ticks=[(q / 4, f"{q * 25}%") for q in range(5)]),
        Axis("", -0.6, count - 0.4, ticks=labels, grid=False),
        width=960,
        height=70 + 52 * count,
        left=84,
        top=8,
    )
    seen: set[str] = set()
    rows = []
    for index, (name, seconds, parts) in enumerate(bars):
        row, at = count - 1 - index, 0.0
        for part, share in parts:
            title, colour = COMPONENTS[part]
            time = _time(name, share * seconds)
            seen.add(part)
            rows.append([_NAMES.get(name, name), title, percent(share), time])
            tip = f"{title}: {percent(share)} of {_NAMES.get(name, name)}, {time}"
            plot.bar((at, row - 0.34), (min(at + share, 1.0), row + 0.34), f"part {colour}", tip)
            if share >= _LEAST_LABELLED:
                middle = plot.x(at + share / 2)
                plot.text(middle, plot.y(row) + 4, percent(share, 2), "on-part", anchor="middle")
            at += share
    return Figure(
        id="breakdown",
        title="Where the time goes",
        caption=(
            "TTFT and TPOT as the requests lived through them, added up over all; wall time as the "
            "engine spent it. Device time is divided by the fitted cost of a step."
        ),
        drawings=[plot.render()],
        columns=["Of", "Spent on", "Share", "Mean time"],
        rows=rows,
        legend=[
            mark_key("square", f"part {colour}", title)
            for part, (title, colour) in COMPONENTS.items()
            if part in seen
        ],
    )


def _bar(value: object) -> tuple[str, float, list[tuple[str, float]]] | None:
    breakdown = mapping(value)
    shares = mapping(breakdown.get("parts"))
    parts = [
        (part, share)
        for part in COMPONENTS
        if (share := number(shares.get(part))) is not None and share > _LEAST_SHOWN
    ]
    seconds = number(breakdown.get("seconds"))
    if not parts or seconds is None:
        return None
    return str(breakdown.get("metric")), seconds, parts


def _time(metric: str, seconds: float) -> str:
    return duration(seconds) if metric == "throughput" else milliseconds(seconds)
