"""The first thing on the page: what to deploy, what it gains, and whether that is proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reports.evidence import KNOBS_NOT_COMPARED, Evidence, best_so_far
from reports.formatting import (
    fixed,
    knob_value,
    mapping,
    number,
    quantity,
    sequence,
    significant,
)
from reports.limits import LimitRow, limit_rows

Tone = Literal["good", "caution", "bad", "neutral"]


@dataclass(frozen=True, slots=True)
class Gain:
    """How much better the winner's objective is than the default's, with its interval.

    As a ratio, above 1 is better; as a difference (in units of the objective, where the default's
    was zero), above 0. None where the records have no number.
    """

    value: float | None
    low: float | None
    high: float | None
    confidence: float | None
    difference: bool
    unit: str

    @property
    def neutral(self) -> float:
        """The gain that is none."""
        return 0.0 if self.difference else 1.0

    @property
    def better(self) -> bool:
        """Whether the whole interval lies on the better side."""
        return self.low is not None and self.high is not None and self.low > self.neutral

    @property
    def text(self) -> str:
        """The gain as written in the headline."""
        if not self.difference or self.value is None:
            return f"{fixed(self.value)}×"
        return f"{'+' if self.value >= 0 else ''}{significant(self.value)} {self.unit}"

    @property
    def low_text(self) -> str:
        """The lower end of the interval as written."""
        return significant(self.low) if self.difference else fixed(self.low)

    @property
    def high_text(self) -> str:
        """The upper end of the interval as written."""
        return significant(self.high) if self.difference else fixed(self.high)

    @property
    def interval(self) -> str:
        """The interval as written."""
        return f"{self.low_text} to {self.high_text}"

    @property
    def level(self) -> str:
        """The confidence of the interval, as a percentage."""
        return f"{100 * (self.confidence if self.confidence is not None else 0.95):g}%"


@dataclass(frozen=True, slots=True)
class Change:
    """One knob that differs from the default."""

    knob: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the report says first. `reasons` say plainly why something is not proven."""

    tone: Tone
    badge: str
    headline: str
    lead: str
    reasons: Sequence[str]
    choice: str
    unchanged: str
    changes: Sequence[Change]
    gain: Gain | None
    objective: Sequence[tuple[str, str, float, str]]
    limits: Sequence[LimitRow]
    trials: Sequence[tuple[str, Sequence[int]]]


def read_gain(value: object, unit: str) -> Gain | None:
    """A gain as `run.json` has it; `unit` is the objective's."""
    raw = mapping(value)
    if not raw:
        return None
    value_, low, high, confidence = (
        number(raw.get(key)) for key in ("value", "low", "high", "confidence")
    )
    if confidence == 0:  # what the search writes when no gain was measured
        value_ = low = high = None
    return Gain(value_, low, high, confidence, raw.get("unit") == "difference", unit)


def changes_of(value: object) -> list[Change]:
    """Changed knobs, from `{knob: [default, winner]}`."""
    return [
        Change(knob, knob_value(knob, pair[0]), knob_value(knob, pair[1]))
        for knob, pair in mapping(value).items()
        if len(sequence(pair)) == 2
    ]


def judge(evidence: Evidence) -> Verdict:
    """The verdict of a run in whatever state it is."""
    if evidence.is_single:
        return _measured(evidence)
    return _final(evidence) if evidence.result else _provisional(evidence)


def _measured(evidence: Evidence) -> Verdict:
    doubts = _undelivered(evidence)
    profiled = evidence.run.get("kind") == "profile"
    return Verdict(
        tone="caution" if doubts else "neutral",
        badge="Not proven" if doubts else "Profiled" if profiled else "Measured",
        headline="What was profiled" if profiled else "One configuration, measured under load",
        lead=_worst(evidence)
        or "This is a single measurement; there is no other to compare it with.",
        reasons=doubts,
        choice="What was measured",
        unchanged="The configuration under “Environment”.",
        changes=[],
        gain=None,
        objective=_objective_values(evidence),
        limits=[],
        trials=[],
    )


def _worst(evidence: Evidence) -> str:
    """The sentence of the binding metric's worst finding, of any metric's if none binds."""
    findings = [mapping(item) for item in sequence(evidence.diagnosis.get("findings"))]
    binding = evidence.diagnosis.get("binding")
    chosen = [f for f in findings if f.get("metric") == binding] or findings
    return str(chosen[0].get("sentence") or "") if chosen else ""


def _final(evidence: Evidence) -> Verdict:
    result = evidence.result
    gain = read_gain(result.get("gain"), str(evidence.run.get("objective_unit", "")))
    changes = changes_of(result.get("changes"))
    slo_met = result.get("slo_met") is True
    baseline = evidence.baseline
    undelivered = _undelivered(evidence)
    doubts = list(undelivered)
    if changes and gain is not None and not gain.better:
        doubts.append(_doubt(gain))
    proven = result.get("proven") is True and not doubts
    objective = str(evidence.run.get("objective", "objective"))
    kept = slo_met and any(not item.met for item in baseline.slo) if baseline else False
    if undelivered:
        tone, badge = "caution", "Not proven"
        headline = "Not proven: the load was not delivered as asked"
    elif not slo_met:
        tone, badge = "bad", "SLO not met"
        headline = "No configuration meets the SLO"
    elif not changes:
        tone, badge = "neutral", "Keep the default"
        headline = "Keep the default: nothing better was found"
    elif proven:
        tone, badge = "good", "Proven"
        headline = "Deploy this configuration"
        if gain is not None and gain.value is not None:
            headline += f": {_headline_gain(gain, objective, evidence.minimize)}"
    elif kept:
        tone, badge = "caution", "Gain not proven"
        headline = "Deploy this configuration: it met the SLO, the default did not"
    else:
        tone, badge = "caution", "Not proven"
        headline = "Not proven: the gain over the default may be chance"
    if changes and not proven and slo_met and not doubts:
        doubts.append("The run does not count the gain as proven; its notes say more.")
    return Verdict(
        tone=tone,  # type: ignore[arg-type]
        badge=badge,
        headline=headline,
        lead=str(result.get("verdict") or ""),
        reasons=doubts,
        choice="What to deploy" if slo_met else "What came closest",
        unchanged="The default configuration, unchanged.",
        changes=changes,
        gain=gain if changes else None,
        objective=_objective_values(evidence),
        limits=limit_rows(evidence),
        trials=[(side.label, [t.number for t in side.trials]) for side in evidence.sides],
    )


def _headline_gain(gain: Gain, objective: str, minimize: bool) -> str:
    if gain.difference:
        return f"{gain.text} of {objective} over the default"
    return (
        f"{gain.text} better {objective}" if minimize else f"{gain.text} the default’s {objective}"
    )


def _doubt(gain: Gain) -> str:
    if gain.low is None or gain.high is None:
        return "Not proven: the gain was not measured often enough to have an interval."
    if gain.high < gain.neutral:
        return f"Not proven: the {gain.level} interval of the gain, {gain.interval}, shows a loss."
    return (
        f"Not proven: the {gain.level} interval of the gain, {gain.interval}, includes "
        f"{gain.neutral:g}, so that the difference may be chance."
    )


def _undelivered(evidence: Evidence) -> list[str]:
    out = []
    for side in evidence.sides:
        if side.bench.get("load_delivered") is False:
            note = side.bench.get("load_note")
            why = f": {note}" if note else ""
            out.append(
                f"Not proven: the load asked for was not delivered to the {side.label}{why}."
            )
    return out


def _provisional(evidence: Evidence) -> Verdict:
    run, trials = evidence.run, evidence.search_trials
    status = str(run.get("status", "running"))
    badge = {"running": "Still running", "interrupted": "Interrupted"}.get(status, "No result")
    best = best_so_far(evidence.trials, minimize=evidence.minimize)
    measured = [t for t in trials if t.metrics]
    reasons = ["Not proven: the proof rounds, which repeat and interleave, have not been run."]
    changes: list[Change] = []
    if not trials:
        headline, lead = "No trial has finished yet", "There is nothing to judge."
    elif not measured:
        headline = "Nothing could be measured"
        lead = f"All {len(trials)} trials failed ({_outcomes(evidence)})."
    elif best is None:
        headline = "No configuration has met the SLO so far"
        lead = f"{len(measured)} of {len(trials)} trials were measured; the SLO was missed by each."
    else:
        unit = str(run.get("objective_unit", ""))
        value = quantity(number(best.objective), unit)
        headline = "Not proven: the best so far, from single measurements"
        lead = (
            f"Trial {best.number} leads with a {run.get('objective', 'objective')} of {value} "
            f"after {len(trials)} trials."
        )
    if evidence.baseline and evidence.winner:
        changes = _differences(evidence.baseline.config, evidence.winner.config)
    if status == "interrupted" and measured:
        lead += " The run can be resumed; nothing measured is lost."
    return Verdict(
        tone="caution" if measured else "neutral",
        badge=badge,
        headline=headline,
        lead=lead,
        reasons=reasons if measured else [],
        choice="What leads so far" if best else "What comes closest so far",
        unchanged="The default configuration." if measured else "There is none to name yet.",
        changes=changes,
        gain=None,
        objective=_objective_values(evidence),
        limits=limit_rows(evidence),
        trials=[(side.label, [t.number for t in side.trials]) for side in evidence.sides],
    )


def _outcomes(evidence: Evidence) -> str:
    counts = Counter(t.outcome for t in evidence.search_trials)
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.most_common())


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    return [
        Change(knob, knob_value(knob, before.get(knob)), knob_value(knob, after.get(knob)))
        for knob in after
        if knob not in KNOBS_NOT_COMPARED and before.get(knob) != after.get(knob)
    ]


def _objective_values(evidence: Evidence) -> list[tuple[str, str, float, str]]:
    """What each side reached in the figures a reader asks for first.

    Each is (name, side, value, place in the records); the unit is part of the name.
    """
    names = {
        "goodput_requests_per_s": "Goodput, requests/s",
        "output_tokens_per_s": "Output, tokens/s",
    }
    return [
        (title, side.label, value, f"{side.source}.{key}")
        for key, title in names.items()
        for side in evidence.sides
        if (value := number(side.bench.get(key))) is not None
    ]
