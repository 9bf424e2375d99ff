"""How the limits of an SLO are named, written and compared on the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.records import LimitResult
from reports.evidence import Evidence, Side
from reports.formatting import MISSING, milliseconds, number, percent, significant

LATENCIES = ("ttft", "tpot", "itl", "e2e")
_LIMIT = re.compile(r"\s*(?:(?P<statistic>[a-z0-9.]+)\s*\(\s*)?(?P<metric>[a-z0-9_]+)")


@dataclass(frozen=True, slots=True)
class Cell:
    """What one side measured against one limit; `index` is its place in the side's records."""

    source: str
    measured: str
    value: float | None
    met: bool
    margin: str


@dataclass(frozen=True, slots=True)
class LimitRow:
    """One limit and how each side fared, in the order of the sides."""

    limit: str
    bound: str
    cells: Sequence[Cell | None]


def limit_metric(limit: str) -> tuple[str, str]:
    """The (metric, statistic) that a limit is on; the statistic is p95 unless named."""
    match = _LIMIT.match(limit.lower())
    if match is None:
        return "", "p95"
    return match["metric"], match["statistic"] or "p95"


def limit_value(limit: str, value: float | None) -> str:
    """A measured value or bound in the unit in which the limit's metric is read."""
    metric, _ = limit_metric(limit)
    if metric in LATENCIES:
        return milliseconds(value)
    if metric == "throughput":
        return MISSING if value is None else f"{significant(value)} tok/s"
    if metric in ("error_rate", "goodput", "quality_loss", "top1_agreement"):
        return percent(value)
    return significant(value)


def latency_bounds(evidence: Evidence, metric: str) -> list[tuple[str, float]]:
    """The (limit, bound in seconds) on a latency metric, from whatever was compared with them."""
    for slo in [side.slo for side in evidence.sides] + [t.slo for t in evidence.trials]:
        if slo:
            return [
                (item.limit, bound)
                for item in slo
                if limit_metric(item.limit)[0] == metric
                and (bound := number(item.bound)) is not None
            ]
    return []


def limit_rows(evidence: Evidence) -> list[LimitRow]:
    """Every limit once, with what each side measured and by how much it met or missed."""
    sides = evidence.sides
    names: dict[str, LimitResult] = {}
    for side in sides:
        for item in side.slo:
            names.setdefault(item.limit, item)
    return [
        LimitRow(
            limit=name,
            bound=limit_value(name, number(first.bound)),
            cells=[_cell(side, name) for side in sides],
        )
        for name, first in names.items()
    ]


def _cell(side: Side, limit: str) -> Cell | None:
    for index, item in enumerate(side.slo):
        if item.limit == limit:
            measured = number(item.measured)
            return Cell(
                source=f"{_slo_source(side)}[{index}]",
                measured=limit_value(limit, measured),
                value=measured,
                met=bool(item.met),
                margin=_margin(item, side),
            )
    return None


def _slo_source(side: Side) -> str:
    if side.source.startswith("trials["):
        return side.source.replace(".metrics", ".slo")
    return "result.slo" if side.source == "result.winner" else "result.baseline_slo"


def _margin(item: LimitResult, side: Side) -> str:
    violation = number(item.violation)
    if item.measured is None:
        # Unfinished requests are infinitely late, so a percentile may have no finite value.
        return "too many unfinished" if number(side.bench.get("completed")) else "none finished"
    if violation is None:
        return ""
    if item.met:
        return f"{percent(abs(violation), 2)} to spare"
    return f"by {percent(abs(violation), 2)}"
