"""What was predicted of each trial before it was measured, beside what was measured then."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.records import TrialRecord
from reports.estimate import Estimate, read_estimate
from reports.evidence import Evidence
from reports.formatting import mapping, milliseconds, number, percent, quantity, significant
from reports.limits import LATENCIES

# Of a nominal 90%; below it the page says that the intervals were too narrow.
_FEW_HELD = 0.8
_LEAST_JUDGED = 10
_RATES = {
    "output_tokens_per_s": ("Output", "tokens/s"),
    "goodput_requests_per_s": ("Goodput", "requests/s"),
}
# Of the many that are predicted; the others say the same again, and an SLO is on these mostly.
_STATISTICS = ("mean", "p95", "p99")
OBJECTIVE = "objective"


@dataclass(frozen=True, slots=True)
class Pair:
    """One number of one trial, predicted and measured, in the units of the records.

    `metric` is a place in the metrics such as `ttft.p95`, or `objective`; `unit` is `s` for times.
    """

    trial: TrialRecord
    metric: str
    title: str
    unit: str
    predicted: Estimate
    measured: float

    @property
    def held(self) -> bool:
        """Whether the interval held what was measured."""
        return self.predicted.low <= self.measured <= self.predicted.high

    @property
    def error(self) -> float:
        """The prediction's distance from the measurement, as a share of it."""
        return abs(self.predicted.value / self.measured - 1)

    def written(self, value: float | None) -> str:
        """A number of this metric as a person reads it."""
        return quantity(value, self.unit)


def predicted_metric(trial: TrialRecord, metric: str) -> Estimate | None:
    """What was predicted of a metric such as `ttft.p95`, or of the objective; None if nothing."""
    predicted = mapping(trial.predicted)
    if metric == OBJECTIVE:
        return read_estimate(predicted.get(OBJECTIVE))
    metrics = mapping(predicted.get("metrics"))
    if metric in metrics:
        return read_estimate(metrics[metric])
    name, _, statistic = metric.partition(".")
    return read_estimate(mapping(metrics.get(name)).get(statistic))


def read_pairs(evidence: Evidence) -> list[Pair]:
    """All pairs of the search's trials, by metric in the order in which the page shows them."""
    trials = [t for t in evidence.search_trials if mapping(t.predicted)]
    unit = str(evidence.run.get("objective_unit") or "")
    objective = str(evidence.run.get("objective") or OBJECTIVE)
    kinds = [(OBJECTIVE, objective, "s" if unit == "seconds" else unit)]
    names = {str(n) for t in trials for n in mapping(mapping(t.predicted).get("metrics"))}
    asked = str(evidence.run.get("slo") or "")
    for metric in LATENCIES:
        if metric == "itl" and metric not in asked:
            continue
        for statistic in _STATISTICS:
            if f"{metric}.{statistic}" in names or metric in names:
                kinds.append((f"{metric}.{statistic}", f"{metric.upper()} {statistic}", "s"))
    kinds += [
        (name, *told)
        for name, told in _RATES.items()
        if name in names and not all(_is_objective(trial, name) for trial in trials)
    ]
    pairs = []
    for metric, title, kind in kinds:
        for trial in trials:
            predicted, measured = predicted_metric(trial, metric), _measured(trial, metric)
            if predicted is not None and measured is not None and measured > 0:
                pairs.append(Pair(trial, metric, title, kind, predicted, measured))
    return pairs


def by_metric(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each metric, in their order."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.metric, []).append(pair)
    return groups


def prediction_sentence(pairs: Sequence[Pair]) -> str:
    """How far the predictions were off, and how many intervals held; empty without any."""
    if not pairs:
        return ""
    trials = len({pair.trial.number for pair in pairs})
    held = sum(pair.held for pair in pairs)
    error = statistics.median(pair.error for pair in pairs)
    text = (
        f"Before {'the' if trials == 1 else 'each of the'} {f'{trials} ' if trials > 1 else ''}"
        f"trial{'s' if trials > 1 else ''} ran, its metrics were predicted: the median error was "
        f"{percent(error, 2)}, and {held} of {len(pairs)} measurements "
        f"({percent(held / len(pairs), 2)}) lay within their 90% intervals."
    )
    if len(pairs) >= _LEAST_JUDGED and held < _FEW_HELD * len(pairs):
        text += " The intervals were too narrow: trust the measurements, not the bands."
    return text


def error_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    """A row a metric: how many pairs, their median and 90th-percentile error, how many held."""
    rows = []
    for group in by_metric(pairs).values():
        errors = sorted(pair.error for pair in group)
        tail = errors[min(len(errors) - 1, round(0.9 * (len(errors) - 1)))]
        held = sum(pair.held for pair in group)
        rows.append(
            [
                group[0].title,
                str(len(group)),
                percent(statistics.median(errors)),
                percent(tail),
                f"{held} of {len(group)}",
            ]
        )
    return rows


def predicted_text(estimate: Estimate | None, unit: str) -> str:
    """A prediction and its interval in the unit of a column: times in milliseconds."""
    if estimate is None:
        return ""

    def write(value: float | None) -> str:
        if unit in ("s", "seconds"):
            return milliseconds(value).removesuffix(" ms")
        return significant(value)

    return estimate.written(write)


def _is_objective(trial: TrialRecord, metric: str) -> bool:
    """Whether a rate is the objective itself."""
    return _measured(trial, metric) in (None, number(trial.objective))


def _measured(trial: TrialRecord, metric: str) -> float | None:
    if metric == OBJECTIVE:
        return number(trial.objective)
    name, _, statistic = metric.partition(".")
    value = mapping(trial.metrics).get(name)
    return number(mapping(value).get(statistic)) if statistic else number(value)
