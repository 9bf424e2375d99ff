"""Trials that drafted beside those that differ in nothing else: what was gained, and predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.records import TrialRecord
from reports.estimate import Estimate
from reports.evidence import Evidence
from reports.formatting import MISSING, fixed, mapping, milliseconds, number, significant
from reports.predictions import predicted_metric
from reports.speculation import DRAFT_KNOBS, how_drafted

PAIR_COLUMNS = (
    "Trials",
    "Drafts",
    "Requests/s",
    "TPOT without",
    "TPOT with",
    "Times as fast",
    "Predicted",
)
_MOST_PAIRS = 40


@dataclass(frozen=True, slots=True)
class Pair:
    """A trial that drafted and one that differs from it in nothing else, at the same rate."""

    plain: TrialRecord
    drafting: TrialRecord

    @property
    def measured(self) -> float | None:
        """How many times as fast tokens followed each other with drafts."""
        plain, drafting = (number(_tpot(t).get("mean")) for t in (self.plain, self.drafting))
        return plain / drafting if plain and drafting else None

    @property
    def predicted(self) -> Estimate | None:
        """The same as it was predicted of both; the bounds are those of either, at the worst."""
        plain, drafting = (predicted_metric(t, "tpot.mean") for t in (self.plain, self.drafting))
        if plain is None or drafting is None or min(drafting.low, plain.low) <= 0:
            return None
        return Estimate(
            plain.value / drafting.value, plain.low / drafting.high, plain.high / drafting.low
        )


def with_and_without(evidence: Evidence) -> list[Pair]:
    """Trials with drafts beside the latest that differs from them in nothing else."""
    plain: dict[str, TrialRecord] = {}
    pairs = []
    measured = [t for t in evidence.trials if t.kind == "search" and _tpot(t)]
    for trial in measured:
        if how_drafted(trial.config) == "none":
            plain[_apart_from_drafts(trial)] = trial
    for trial in measured:
        other = plain.get(_apart_from_drafts(trial))
        if other is not None and how_drafted(trial.config) not in ("", "none"):
            pairs.append(Pair(other, trial))
    return pairs


def pair_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    """A row a pair, in the order of `PAIR_COLUMNS`."""
    return [
        [
            f"{pair.plain.number}, {pair.drafting.number}",
            how_drafted(pair.drafting.config),
            significant(number(pair.drafting.rate)),
            *(milliseconds(number(_tpot(t).get("mean"))) for t in (pair.plain, pair.drafting)),
            fixed(pair.measured),
            MISSING if pair.predicted is None else pair.predicted.written(fixed),
        ]
        for pair in pairs[:_MOST_PAIRS]
    ]


def _apart_from_drafts(trial: TrialRecord) -> str:
    """All of a trial's config but how is drafted, and its rate."""
    rate = number(trial.rate)
    others = sorted((k, repr(v)) for k, v in trial.config.items() if k not in DRAFT_KNOBS)
    return repr((others, None if rate is None else f"{rate:.3g}"))


def _tpot(trial: TrialRecord) -> Mapping[str, Any]:
    return mapping(mapping(trial.metrics).get("tpot"))
