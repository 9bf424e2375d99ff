"""The diagnosis as the page shows it: by metric, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.formatting import mapping, number, percent, sequence, significant

_METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "throughput": "Throughput",
    "cost": "Cost",
    "memory": "Memory",
}
_LEVELS = ("high", "medium", "low")


@dataclass(frozen=True, slots=True)
class FindingRow:
    """One finding."""

    name: str
    level: str
    share: str
    sentence: str
    evidence: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class MetricFindings:
    """What stands in the way of one metric; `binds` says that the SLO's worst limit is on it.

    `minor` are those of low severity, but for the first where there is no other.
    """

    title: str
    binds: bool
    major: Sequence[FindingRow]
    minor: Sequence[FindingRow]


def findings_by_metric(diagnosis: Mapping[str, Any]) -> list[MetricFindings]:
    """The findings of each metric that has any, in their order."""
    out = []
    for metric, title in _METRICS.items():
        rows = [
            _row(item)
            for item in map(mapping, sequence(diagnosis.get("findings")))
            if item.get("metric") == metric
        ]
        if rows:
            major = [row for row in rows if row.level != "low"] or rows[:1]
            minor = [row for row in rows if row not in major]
            out.append(MetricFindings(title, diagnosis.get("binding") == metric, major, minor))
    return out


def binding_sentence(diagnosis: Mapping[str, Any]) -> str:
    """Which limit binds, in a sentence; empty where none does."""
    limit, ratio = diagnosis.get("binding_limit"), number(diagnosis.get("binding_ratio"))
    if not limit or ratio is None:
        return ""
    state = "is missed" if ratio > 1 else "is met"
    return f"The limit that binds is {limit}: it {state}, at {percent(ratio)} of what is allowed."


def unjudged(diagnosis: Mapping[str, Any]) -> list[str]:
    """What could not be judged, and why."""
    return [str(item) for key in ("unjudged", "notes") for item in sequence(diagnosis.get(key))]


def _row(finding: Mapping[str, Any]) -> FindingRow:
    level = str(finding.get("level"))
    return FindingRow(
        name=str(finding.get("bottleneck")).replace("_", " "),
        level=level if level in _LEVELS else "low",
        share=percent(number(finding.get("share"))),
        sentence=str(finding.get("sentence") or ""),
        evidence=[
            (str(name), _value(str(name), value))
            for name, value in mapping(finding.get("evidence")).items()
        ],
    )


def _value(name: str, value: object) -> str:
    amount = number(value)
    if amount is None:
        return "–" if value is None else str(value)
    if name.endswith(("share", "rate", "occupancy_peak", "mfu", "mbu")) and 0 <= amount <= 1:
        return percent(amount)
    return significant(amount)
