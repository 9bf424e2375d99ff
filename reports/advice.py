"""The advice as the page shows it: ranked, with what each would bring and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.formatting import MISSING, fixed, knob_value, mapping, number, sequence
from reports.limits import limit_value

_EFFORTS = {
    "knob": "set a knob",
    "reload": "reload the model",
    "prepare": "prepare a checkpoint",
    "deploy": "deploy otherwise",
    "train": "train",
    "buy": "buy hardware",
}
_BASES = {"replay": "replayed", "formula": "formula", "estimate": "published figures"}
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}


@dataclass(frozen=True, slots=True)
class AdviceRow:
    """One piece of advice."""

    rank: int
    title: str
    problem: str
    gain: str
    metric: str
    interval: str
    basis: str
    confidence: str
    effort: str
    knobs: str
    trade_off: str
    check: str
    why: str
    testable: str
    commands: Sequence[str]


@dataclass(frozen=True, slots=True)
class InfeasibleRow:
    """One limit that cannot be met."""

    limit: str
    asked: str
    bound: str
    proven: bool
    proof: str
    relaxations: Sequence[str]


def advice_rows(advice: Mapping[str, Any]) -> list[AdviceRow]:
    """All of it, best first."""
    items = [mapping(item) for item in sequence(advice.get("advice"))]
    return [_row(rank, item) for rank, item in enumerate(items, start=1)]


def first_advice(advice: Mapping[str, Any]) -> str:
    """What to do first, by its title; empty where there is nothing to do."""
    for item in map(mapping, sequence(advice.get("advice"))):
        if item.get("technique") == advice.get("first"):
            return str(item.get("title") or item.get("technique") or "")
    return ""


def infeasible_rows(advice: Mapping[str, Any]) -> list[InfeasibleRow]:
    """Limits that cannot be met, with proof and what would relax them."""
    rows = []
    for item in map(mapping, sequence(advice.get("infeasible"))):
        limit = str(item.get("limit") or item.get("metric") or "")
        rows.append(
            InfeasibleRow(
                limit=limit,
                asked=limit_value(limit, number(item.get("asked"))),
                bound=limit_value(limit, number(item.get("bound"))),
                proven=item.get("proven") is True,
                proof=str(item.get("proof") or ""),
                relaxations=[
                    str(r.get("sentence") or "")
                    for r in map(mapping, sequence(item.get("relaxations")))
                ],
            )
        )
    return rows


def metric_name(gain: Mapping[str, Any]) -> str:
    """A gain's metric with its statistic, for instance `TTFT p95`."""
    metric = str(gain.get("metric") or "")
    statistic = gain.get("statistic")
    return " ".join(filter(None, (NAMES.get(metric, metric), str(statistic) if statistic else "")))


def knobs_text(knobs: object) -> str:
    """Knobs and values on one line."""
    return ", ".join(f"{name}={knob_value(name, value)}" for name, value in mapping(knobs).items())


def _row(rank: int, item: Mapping[str, Any]) -> AdviceRow:
    gain = mapping(item.get("gain"))
    value, low, high = (number(gain.get(key)) for key in ("value", "low", "high"))
    problems = [str(p).replace("_", " ") for p in sequence(item.get("problems"))]
    why_not = str(item.get("why_not") or "")
    return AdviceRow(
        rank=rank,
        title=str(item.get("title") or item.get("technique") or ""),
        problem=", ".join(problems),
        gain=MISSING if value is None else f"{fixed(value)}×",
        metric=metric_name(gain),
        interval=MISSING if low is None or high is None else f"{fixed(low)}–{fixed(high)}",
        basis=_BASES.get(str(gain.get("basis")), ""),
        confidence=str(item.get("confidence") or ""),
        effort=_EFFORTS.get(str(item.get("effort")), str(item.get("effort") or "")),
        knobs=knobs_text(item.get("knobs")),
        trade_off=str(item.get("trade_off") or ""),
        check=str(item.get("check") or ""),
        why=str(item.get("why") or ""),
        testable="yes" if item.get("testable") is True else f"no: {why_not}" if why_not else "no",
        commands=[str(command) for command in sequence(item.get("commands"))],
    )
