"""Predicted latencies with their intervals, a drawing a metric, beside the limits on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reports.charts.figure import Figure, line_key, mark_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.estimate import Estimate, read_estimate
from reports.formatting import mapping, milliseconds
from reports.plan.evidence import PlanLimit

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
_NAMES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "e2e": "End-to-end latency (E2E)",
}


def latency_forecast(simulation: Mapping[str, Any], limits: Sequence[PlanLimit]) -> Figure | None:
    """A row a statistic; None where no request finished."""
    drawings, rows = [], []
    for metric, name in _NAMES.items():
        told = mapping(simulation.get(metric))
        known = [(s, e) for s in STATISTICS if (e := read_estimate(told.get(s))) is not None]
        if not known:
            continue
        bounds = [x for x in limits if x.metric == metric and x.bound is not None]
        drawings.append(_drawing(metric, name, known, bounds))
        rows += [[metric.upper(), s, *_texts(estimate)] for s, estimate in known]
    if not drawings:
        return None
    legend = [mark_key("circle", "s-winner", "predicted, with its 90% interval")]
    if any(x.metric in _NAMES for x in limits):
        legend.append(line_key("s-limit", "limit of the SLO"))
    return Figure(
        id="forecast",
        title="Latency",
        caption=(
            "What the engine would take, by its own scheduler in virtual time; the bars are what "
            "is not known of the costs and of the arrivals. Further left is faster."
        ),
        drawings=drawings,
        columns=["Metric", "Statistic", "Predicted", "Low", "High"],
        rows=rows,
        layout="pairs",
        legend=legend,
    )


def _texts(estimate: Estimate) -> list[str]:
    return [milliseconds(v) for v in (estimate.value, estimate.low, estimate.high)]


def _drawing(
    metric: str, name: str, known: Sequence[tuple[str, Estimate]], limits: Sequence[PlanLimit]
) -> Markup:
    bounds = [1000 * x.bound for x in limits if x.bound is not None]
    spread = [1000 * v for _, e in known for v in (e.value, e.low, e.high)]
    low, high, log = domain([*spread, *bounds])
    count = len(known)
    plot = Plot(
        Axis(f"{metric.upper()} ({'ms, log scale' if log else 'ms'})", low, high, log),
        Axis("", -0.6, count - 0.4, ticks=[(count - 1 - i, s) for i, (s, _) in enumerate(known)]),
        height=80 + 28 * count,
        title=name,
        top=40,
    )
    for limit, bound in zip(limits, bounds, strict=True):
        plot.vertical(bound, limit.text, "s-limit", above=True)
    for index, (statistic, estimate) in enumerate(known):
        row, scaled = count - 1 - index, estimate.times(1000)
        if scaled.spread:
            plot.line([(scaled.low, row), (scaled.high, row)], "s-winner interval")
        tip = f"{statistic} {metric.upper()}: {estimate.written(milliseconds, ' ms')}"
        plot.mark(scaled.value, row, "circle", "s-winner", tip, size=5)
    return plot.render()
