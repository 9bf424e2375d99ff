"""What each way of quantizing costs in quality, as the trials measured it, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.records import LimitResult, TrialRecord
from reports.evidence import Evidence, as_interval
from reports.formatting import MISSING, mapping, number, percent, significant, size
from reports.limits import limit_metric

# The quantities of a measured quality, in the order of the table: (key, heading, is a share).
QUANTITIES = (
    ("quality_loss", "Perplexity", True),
    ("kl", "KL, mean (nats)", False),
    ("kl_p99", "KL, p99 (nats)", False),
    ("top1_agreement", "Top-1 agreement", True),
)
GUARDS = ("quality_loss", "kl", "top1_agreement")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of quantizing: what was measured of it and the search trials that had it.

    `broken` are the limits of the SLO on the quality that it breaks; none if there are no limits.
    """

    name: str
    scores: dict[str, Any]
    trials: Sequence[TrialRecord]
    limits: Sequence[LimitResult]

    @property
    def broken(self) -> list[LimitResult]:
        """Limits on the quality that are not met."""
        return [limit for limit in self.limits if not limit.met]

    def value(self, quantity: str) -> float | None:
        """A measured quantity."""
        return number(self.scores.get(quantity))

    def interval(self, quantity: str) -> tuple[float, float] | None:
        """Its 95% interval."""
        return as_interval([self.scores.get(f"{quantity}_{end}") for end in ("low", "high")])

    def straddles(self, limit: LimitResult) -> bool:
        """Whether a limit lies within the interval of what it is on."""
        ends, bound = self.interval(limit_metric(limit.limit)[0]), number(limit.bound)
        return ends is not None and bound is not None and ends[0] < bound < ends[1]


def read_variants(evidence: Evidence) -> list[Variant]:
    """Each way of quantizing that was scored, in the order in which the search came to it."""
    found: dict[str, list[TrialRecord]] = {}
    for trial in evidence.trials:
        name = quality_of(trial).get("variant")
        if isinstance(name, str):
            found.setdefault(name, []).append(trial)
    return [
        Variant(
            name=name,
            scores=dict(quality_of(trials[0])),
            trials=[t for t in trials if t.kind == "search"],
            limits=guard_limits(trials[0]),
        )
        for name, trials in found.items()
    ]


def quality_of(trial: TrialRecord) -> dict[str, Any]:
    """The measured quality of a trial; empty where none was."""
    return dict(mapping(trial.quality) or mapping(mapping(trial.metrics).get("quality")))


def guard_limits(trial: TrialRecord) -> list[LimitResult]:
    """How a trial fared against the SLO's limits on the quality."""
    return [limit for limit in trial.slo if limit_metric(limit.limit)[0] in GUARDS]


def quality_table(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """A row for each way of quantizing: (columns, rows); no rows where none was scored."""
    variants = read_variants(evidence)
    guarded = any(variant.limits for variant in variants)
    columns = ["Method", "Weights", "KV cache a token", *(h for _, h, _ in QUANTITIES)]
    rows = []
    for variant in variants:
        row = [
            variant.name,
            size(variant.value("weight_bytes")).replace(" ", "\xa0"),
            size(variant.value("kv_bytes_per_token")).replace(" ", "\xa0"),
            *(_with_interval(variant, key, share) for key, _, share in QUANTITIES),
        ]
        # Beside the name: on a narrow page the columns further right have to be scrolled to.
        rows.append([row[0], _guard_text(variant), *row[1:]] if guarded else row)
    return [columns[0], "Guard", *columns[1:]] if guarded else columns, rows


def written(quantity: str, value: float | None) -> str:
    """A quantity as it is read: shares as percentages, divergences in nats."""
    if quantity in ("quality_loss", "top1_agreement"):
        return percent(value)
    return significant(value)


def _with_interval(variant: Variant, key: str, share: bool) -> str:
    value, ends = variant.value(key), variant.interval(key)
    if value is None:
        return MISSING
    sign = "+" if key == "quality_loss" and value > 0 else ""
    text = sign + written(key, value)
    if ends is None or ends[0] == ends[1]:
        return text
    low, high = (significant(100 * e) if share else significant(e) for e in ends)
    return f"{text} ({low}\xa0to\xa0{high})"


def _guard_text(variant: Variant) -> str:
    parts = []
    for limit in variant.limits:
        outcome = "met" if limit.met else "broken"
        doubt = ", within the interval" if variant.straddles(limit) else ""
        parts.append(f"{outcome}: {limit.limit}{doubt}")
    return "; ".join(parts)
