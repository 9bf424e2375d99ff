"""How latency is distributed: the share of requests, or gaps, that were at least as fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from autotune.records import RequestRecord
from reports.charts.figure import Figure, line_key
from reports.charts.plot import Axis, Plot
from reports.charts.scale import domain
from reports.evidence import Evidence, Side
from reports.formatting import milliseconds
from reports.limits import latency_bounds, limit_value

NAMES = {
    "ttft": "Time to first token (TTFT)",
    "tpot": "Time per output token (TPOT)",
    "itl": "Inter-token latency (ITL)",
    "e2e": "End-to-end latency (E2E)",
}
PERCENTILES = ("p50", "p90", "p95", "p99")
_POINTS = 160


def latency_distributions(evidence: Evidence) -> Figure | None:
    """CDF of each latency metric, one drawing a metric; None where no request finished."""
    drawings = []
    for metric, name in NAMES.items():
        samples = [(side, _samples(side.requests, metric)) for side in evidence.sides]
        if any(len(values) for _, values in samples):
            drawings.append(_drawing(evidence, metric, name, samples))
    if not drawings:
        return None
    legend = [
        line_key(side.series, f"{side.label}, {_finished(side.requests)}")
        for side in evidence.sides
    ]
    if any(latency_bounds(evidence, metric) for metric in NAMES):
        legend.append(line_key("s-limit", "limit of the SLO"))
    return Figure(
        id="latency",
        title="Latency distributions",
        caption=(
            "Share of requests (for ITL: of gaps between tokens) at or below a latency; further "
            "left is faster. Requests that did not finish count as infinitely late, so that their "
            "curve ends below 100%. Dots stand at p50, p90, p95 and p99 of those that finished. A "
            "limit on p95 is met where the curve crosses its line above 95%."
        ),
        drawings=drawings,
        columns=["Metric", "Statistic", *(f"{s.label} (95% interval)" for s in evidence.sides)],
        rows=percentile_rows(evidence),
        layout="pairs",
        legend=legend,
    )


def percentile_rows(evidence: Evidence) -> list[list[str]]:
    """The percentiles of the records, with their intervals where there are some."""
    return [
        [metric.upper(), statistic, *(_measured(s, metric, statistic) for s in evidence.sides)]
        for metric in NAMES
        for statistic in ("mean", *PERCENTILES)
    ]


def _measured(side: Side, metric: str, statistic: str) -> str:
    value, interval = side.latency(metric, statistic), side.interval(metric, statistic)
    if value is None or interval is None:
        return milliseconds(value)
    low, high = (milliseconds(end).removesuffix(" ms") for end in interval)
    return f"{milliseconds(value)} ({low}–{high})"


def _samples(requests: Sequence[RequestRecord], metric: str) -> Sequence[float]:
    finished = [r for r in requests if r.completed]
    if metric == "itl":
        return [b - a for r in finished for a, b in pairwise(r.token_times)]
    of: dict[str, Callable[[RequestRecord], float | None]] = {
        "ttft": lambda r: r.ttft,
        "tpot": lambda r: r.tpot,
        "e2e": lambda r: r.e2e,
    }
    return [value for r in finished if (value := of[metric](r)) is not None]


def _drawing(
    evidence: Evidence, metric: str, name: str, samples: Sequence[tuple[Side, Sequence[float]]]
) -> Markup:
    bounds = [(limit, b * 1000) for limit, b in latency_bounds(evidence, metric)]
    curves = [
        (side, _curve(values, 1.0 if metric == "itl" else _counted(side.requests, len(values))))
        for side, values in samples
        if len(values)
    ]
    spread = [x for _, curve in curves for x, _ in curve] + [b for _, b in bounds]
    low, high, log = domain(spread)
    if not log:
        low = max(low, 0.0)
    unit = "ms, log scale" if log else "ms"
    shares = [(q / 100, f"{q}%") for q in (0, 25, 50, 75, 95)]
    plot = Plot(
        Axis(f"{metric.upper()} ({unit})", low, high, log),
        Axis("at or below", 0.0, 1.02, ticks=shares),
        title=name,
    )
    for limit, bound in bounds:
        plot.vertical(bound, f"SLO {limit_value(limit, bound / 1000)}", "s-limit")
    for side, curve in curves:
        plot.line([(low, 0.0), *curve] if not log else curve, side.series)
    for side, values in samples:
        for statistic in PERCENTILES if len(values) else ():
            share = float(statistic[1:]) / 100
            at = float(np.quantile(values, share))
            tip = f"{side.label}: {statistic} {metric.upper()} {milliseconds(at)}"
            height = share * (1.0 if metric == "itl" else _counted(side.requests, len(values)))
            plot.mark(at * 1000, height, "circle", side.series, tip, size=3.2)
    return plot.render()


def _counted(requests: Sequence[RequestRecord], measured: int) -> float:
    """The share of requests with a value among these and the ones that never finished."""
    return measured / (measured + sum(not r.completed for r in requests))


def _curve(values: Sequence[float], top: float) -> list[tuple[float, float]]:
    """Quantiles in milliseconds; a fixed number of points however many requests there were.

    `top` is the share that the curve reaches.
    """
    count = min(_POINTS, max(len(values), 2))
    shares = np.unique(np.append(np.linspace(0, 1, count), (0.9, 0.95, 0.99, 0.995)))
    latencies = np.quantile(values, shares)
    return [(float(x) * 1000, float(s) * top) for s, x in zip(shares, latencies, strict=True)]


def _finished(requests: Sequence[RequestRecord]) -> str:
    done = sum(r.completed for r in requests)
    if not requests:
        return "no request records"
    if done == len(requests):
        return "1 request" if done == 1 else f"{done} requests"
    return f"{done} of {len(requests)} requests finished"
