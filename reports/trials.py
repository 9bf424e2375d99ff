"""The trials as rows of a table, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autotune.records import TrialRecord
from reports.estimate import read_estimate
from reports.evidence import Evidence, best_so_far
from reports.formatting import (
    duration,
    fixed,
    knob_value,
    mapping,
    milliseconds,
    number,
    percent,
    quantity,
    significant,
)
from reports.plan.money import chance
from reports.predictions import OBJECTIVE, predicted_metric, predicted_text
from reports.speculation import DRAFT_KNOBS, METHOD, how_drafted

# A page with thousands of rows is slow and large; trials.jsonl beside the report holds them all.
MOST_SHOWN = 400
_LONGEST_REASON = 240

Outcome = Literal["met", "missed", "failed"]


@dataclass(frozen=True, slots=True)
class TrialCell:
    """A cell: its text, and the key by which a column is sorted (empty sorts last)."""

    text: str
    key: str
    numeric: bool = True


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial; `outcome` is what the filter asks for."""

    number: int
    kind: str
    outcome: Outcome
    cells: Sequence[TrialCell]


@dataclass(frozen=True, slots=True)
class TrialTable:
    """The table; `left_out` counts trials that are only in trials.jsonl."""

    columns: Sequence[tuple[str, bool]]
    rows: Sequence[TrialRow]
    left_out: int
    counts: dict[str, int]


def outcome_of(trial: TrialRecord) -> Outcome:
    """Whether a trial met the SLO, missed it, or failed to be measured."""
    if trial.outcome in ("quality", "cut_short"):
        return "missed"  # a limit on the quality, or hopeless: no full load was offered
    if trial.outcome != "ok" or trial.metrics is None:
        return "failed"
    return "met" if trial.slo_met else "missed"


def outcome_text(trial: TrialRecord) -> str:
    """The outcome in words."""
    kind = outcome_of(trial)
    if kind == "failed":
        return trial.outcome.replace("_", " ") if trial.outcome != "ok" else "not measured"
    if trial.outcome == "quality":
        return "SLO missed by the quality"
    if trial.outcome == "cut_short":
        return "cut short"
    return "SLO met" if kind == "met" else "SLO missed"


def shown(trials: Sequence[TrialRecord], evidence: Evidence) -> list[TrialRecord]:
    """At most `MOST_SHOWN` trials, evenly spread, and always the default and the best."""
    if len(trials) <= MOST_SHOWN:
        return list(trials)
    stride = -(-len(trials) // MOST_SHOWN)
    best = best_so_far(trials, minimize=evidence.minimize)
    return [
        t for i, t in enumerate(trials) if i % stride == 0 or t is best or t.source == "default"
    ][: MOST_SHOWN + 20]


def trial_table(evidence: Evidence) -> TrialTable:
    """All trials, or an even selection of very many, with the knobs that varied as columns."""
    knobs = evidence.varied_knobs
    objective = str(evidence.run.get("objective", "objective"))
    unit = str(evidence.run.get("objective_unit", ""))
    columns = [("Trial", True), ("Kind", False), ("Source", False)]
    measured = {
        OBJECTIVE: f"{objective} ({'ms' if unit in ('s', 'seconds') else unit})".replace(" ()", ""),
        "ttft.p95": "TTFT p95 (ms)",
        "tpot.p95": "TPOT p95 (ms)",
        "output_tokens_per_s": "Output (tokens/s)",
        "goodput_requests_per_s": "Goodput (requests/s)",
    }
    # Of a metric that was predicted of any trial, the prediction stands beside the measurement.
    predicted = [
        name for name in measured if any(predicted_metric(t, name) for t in evidence.trials)
    ]
    for name, title in measured.items():
        columns.append((title, True))
        if name in predicted:
            columns.append(("predicted", True))
    if predicted:
        columns.append(("Chance predicted", True))
    # How is drafted is one thing, told by several knobs of which some mean nothing without others.
    drafting = METHOD in knobs
    if drafting:
        knobs = [knob for knob in knobs if knob not in DRAFT_KNOBS]
    columns += [("SLO", False), *((knob, False) for knob in knobs)]
    if drafting:
        columns += [("drafts", False), ("Tokens a step", True)]
    columns += [("Load", False), ("Took", True), ("Reason", False)]
    chosen = shown(evidence.trials, evidence)
    counts = {"met": 0, "missed": 0, "failed": 0}
    for trial in evidence.trials:
        counts[outcome_of(trial)] += 1
    return TrialTable(
        columns=columns,
        rows=[_row(trial, knobs, unit, predicted, drafting) for trial in chosen],
        left_out=len(evidence.trials) - len(chosen),
        counts=counts,
    )


def _row(
    trial: TrialRecord,
    knobs: Sequence[str],
    unit: str,
    predicted: Sequence[str],
    drafting: bool,
) -> TrialRow:
    metrics = mapping(trial.metrics)
    objective = number(trial.objective)
    ttft = number(mapping(metrics.get("ttft")).get("p95"))
    tpot = number(mapping(metrics.get("tpot")).get("p95"))
    kind = f"{trial.kind} {trial.round + 1}" if trial.kind == "proof" else str(trial.kind)
    cells = [_number(float(trial.number), str(trial.number)), _words(kind), _words(trial.source)]
    measured = {
        OBJECTIVE: _number(objective, quantity(objective, unit).split(" ")[0]),
        "ttft.p95": _number(ttft, milliseconds(ttft).removesuffix(" ms")),
        "tpot.p95": _number(tpot, milliseconds(tpot).removesuffix(" ms")),
        "output_tokens_per_s": _plain(metrics.get("output_tokens_per_s")),
        "goodput_requests_per_s": _plain(metrics.get("goodput_requests_per_s")),
    }
    for name, cell in measured.items():
        cells.append(cell)
        if name in predicted:
            told = predicted_metric(trial, name)
            kind = "s" if name.startswith(("ttft", "tpot")) else unit if name == OBJECTIVE else ""
            cells.append(_number(None if told is None else told.value, predicted_text(told, kind)))
    if predicted:
        share = number(mapping(trial.predicted).get("p_meets_slo"))
        cells.append(_number(share, "" if share is None else chance(share)))
    cells.append(_words(_slo_text(trial)))
    for knob in knobs:
        value = trial.config.get(knob)
        amount = number(value)
        text = knob_value(knob, value)
        cells.append(_words(text) if amount is None else _number(amount, text))
    if drafting:
        tokens = read_estimate(mapping(metrics.get("speculation")).get("tokens_per_step"))
        got = None if tokens is None else tokens.value
        cells += [
            _words(how_drafted(trial.config)),
            _number(got, "" if got is None else fixed(got)),
        ]
    cells += [
        _words({True: "delivered", False: "short"}.get(metrics.get("load_delivered"), "")),  # type: ignore[arg-type]
        _number(number(trial.seconds), duration(number(trial.seconds))),
        _words(_reason(trial)),
    ]
    return TrialRow(trial.number, trial.kind, outcome_of(trial), cells)


def _slo_text(trial: TrialRecord) -> str:
    if outcome_of(trial) != "missed":
        return outcome_text(trial)
    if trial.outcome in ("quality", "cut_short"):
        return outcome_text(trial)
    if any(item.measured is None for item in trial.slo):
        return "SLO missed, not all measured"
    worst = max((number(item.violation) or 0.0 for item in trial.slo), default=0.0)
    return f"SLO missed by {percent(worst, 2)}" if worst > 0 else "SLO missed"


def _reason(trial: TrialRecord) -> str:
    reason = trial.reason or str(mapping(trial.metrics).get("load_note") or "")
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"


def _plain(value: object) -> TrialCell:
    amount = number(value)
    return _number(amount, significant(amount))


def _number(value: float | None, text: str) -> TrialCell:
    return TrialCell(text, "" if value is None else repr(value))


def _words(text: str) -> TrialCell:
    return TrialCell(text, text.lower(), numeric=False)
