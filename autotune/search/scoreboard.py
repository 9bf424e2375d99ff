"""What advice promised against what was then measured, in one table.

Each piece of advice that the bundled engine can test is a configuration, and the search measures it
beside the default. The measured gain is the ratio of the same metric in both, so a prediction is
held against what it was made for, and not against the objective.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autotune.predict.gain import direction, same_direction
from autotune.records import TrialRecord
from autotune.search.gain import paired_gain

# Fewest pairs of trials that an interval is taken over; below, it is the requests' bootstrap.
MIN_PAIRS = 3
# From this share of the offered requests on, a load is served as it comes: its throughput is what
# arrives and not what the engine could do.
SERVED_SHARE = 0.95

_LATENCIES = ("ttft", "tpot", "itl", "e2e")
# By metric the key of what a trial measured of it: a cost shrinks as tokens for the money grow.
_RATES = {
    "throughput": "output_tokens_per_s",
    "cost": "goodput_tokens_per_s",
    "goodput": "goodput_requests_per_s",
}


@dataclass(frozen=True, slots=True)
class MeasuredGain:
    """How many times better a metric was with the advice than with the default; above 1 is better.

    `low` and `high` bound it with 95% confidence where that can be told. `pairs` counts the trials
    of each side.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int


def scoreboard(
    advice: Sequence[Mapping[str, Any]],
    trials: Sequence[TrialRecord],
    *,
    capacity: bool = False,
    at_once: bool = False,
) -> dict[str, Any] | None:
    """Score every testable piece of advice.

    Args:
        advice: the `advice` of `advice.json`, in its order.
        trials: all trials of the run; the first of the search is the default.
        capacity: whether each trial looked for the highest rate that holds, so that their latencies
            belong to different loads.
        at_once: whether all requests arrived at once, so that throughput is the engine's.

    Returns:
        `entries`, one a testable piece of advice, and how often predictions held over those that
        were scored; None if there is no such advice or no default. An entry has `held`, whether the
        measured gain lies in the predicted interval, `direction_right`, whether both are up,
        down or no change, and `error`, |predicted / measured - 1|; all None where it was not
        scored, for the reason in `why_not`.
    """
    searched = [t for t in trials if t.kind == "search"]
    testable = [item for item in advice if item["testable"]]
    if not searched or not testable:
        return None
    entries = [_entry(item, searched[0], trials, capacity, at_once) for item in testable]
    return {"entries": entries, **_summary(entries)}


def advised_config(default: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """The default with the knobs that a piece of advice sets."""
    return {**default, **item["knobs"]}


def _entry(
    item: Mapping[str, Any],
    default: TrialRecord,
    trials: Sequence[TrialRecord],
    capacity: bool,
    at_once: bool,
) -> dict[str, Any]:
    predicted = item["gain"]
    entry: dict[str, Any] = {
        **{name: item[name] for name in ("technique", "title", "knobs")},
        "metric": None if predicted is None else predicted["metric"],
        "statistic": None if predicted is None else predicted.get("statistic"),
        "predicted": predicted,
        "measured": None,
        "trials": [],
        **dict.fromkeys(("held", "direction", "direction_right", "error", "why_not")),
    }
    config = advised_config(default.config, item)
    if config == default.config:
        return {**entry, "why_not": "the default is set so already"}
    tried = [t for t in trials if t.kind in ("search", "proof") and t.config == config]
    entry["trials"] = [t.number for t in tried]
    metric, statistic = entry["metric"], entry["statistic"]
    found = _measured(metric, statistic, default, trials, tried, capacity, at_once)
    if isinstance(found, str):
        return {**entry, "why_not": found}
    assert predicted is not None
    ways = {"predicted": direction(predicted["value"]), "measured": direction(found.value)}
    return {
        **entry,
        "measured": asdict(found),
        "held": predicted["low"] <= found.value <= predicted["high"],
        "direction": ways,
        "direction_right": same_direction(predicted["value"], found.value),
        "error": abs(predicted["value"] / found.value - 1),
    }


def _measured(
    metric: str | None,
    statistic: str | None,
    default: TrialRecord,
    trials: Sequence[TrialRecord],
    tried: Sequence[TrialRecord],
    capacity: bool,
    at_once: bool,
) -> MeasuredGain | str:
    """The measured gain, or in one sentence why there is none."""
    if metric is None:
        return "no gain was predicted"
    if not tried:
        return (
            "it was not tried: the budget ended first, its knobs are not searched, or what was "
            "tried in its place is as fast"
        )
    if default.metrics is None:
        return "the default could not be measured"
    failed = next((t for t in tried if t.metrics is None), None)
    if failed is not None:
        return f"trial {failed.number} failed: {failed.reason or failed.outcome}"
    if metric not in (*_LATENCIES, *_RATES):
        return f"trials do not measure {metric}"
    if capacity and metric in (*_LATENCIES, "goodput"):
        return f"each trial of a capacity search bears another load, so their {metric} says nothing"
    pairs = _pairs(default, trials, tried)
    values = [
        (_value(a, metric, statistic, capacity), _value(b, metric, statistic, capacity))
        for a, b in pairs
    ]
    if any(not a or not b for a, b in values):
        return f"{metric} was not measured in both"
    if not capacity and not at_once and metric in ("throughput", "cost"):
        served = [t for pair in pairs for t in pair if _served(t)]
        if served:
            return "what arrives bounds the throughput here; --rate inf shows what the engine could"
    maximise = metric not in _LATENCIES
    return _gain(
        [a for a, _ in values if a],
        [b for _, b in values if b],
        maximise,
        (_interval(pairs[0][0], metric, statistic), _interval(pairs[0][1], metric, statistic)),
    )


def _pairs(
    default: TrialRecord, trials: Sequence[TrialRecord], tried: Sequence[TrialRecord]
) -> list[tuple[TrialRecord, TrialRecord]]:
    """Trials of both under the same traffic: the search's window, and each round of the proof."""
    pairs = [(default, t) for t in tried if t.kind == "search"][:1]
    rounds = {
        t.round: t
        for t in trials
        if t.kind == "proof" and t.config == default.config and t.metrics is not None
    }
    pairs += [(rounds[t.round], t) for t in tried if t.kind == "proof" and t.round in rounds]
    return pairs


def _gain(
    default: Sequence[float],
    advised: Sequence[float],
    maximise: bool,
    intervals: tuple[list[float] | None, list[float] | None],
) -> MeasuredGain:
    """Over several pairs Student's t of their ratios; of a single one, the bootstraps combined."""
    if len(default) >= MIN_PAIRS:
        gain = paired_gain(default, advised, maximise=maximise)
        assert gain is not None
        return MeasuredGain(gain.value, gain.low, gain.high, len(default))
    # One or two rounds say nothing of their spread; the middle is taken all the same.
    logs = [
        (math.log(b) - math.log(a)) * (1 if maximise else -1)
        for a, b in zip(default, advised, strict=True)
    ]
    value = math.exp(statistics.fmean(logs))
    low = high = None
    a_interval, b_interval = intervals
    if a_interval and b_interval and min(*a_interval, *b_interval) > 0:
        below, above = _ratio_interval(default[0], a_interval, advised[0], b_interval, maximise)
        low, high = value * below, value * above
    return MeasuredGain(value, low, high, len(default))


def _ratio_interval(
    a: float, a_interval: Sequence[float], b: float, b_interval: Sequence[float], maximise: bool
) -> tuple[float, float]:
    """Bounds of a gain over its value, from the bounds of both sides.

    The method of variance estimates recovery on logarithms (Zou and Donner 2008): the squares of
    the distances from each value to its bound are added. Both saw the same requests, so what they
    share is counted twice, and the interval is rather too wide.
    """
    first, second = (a_interval, b_interval) if not maximise else (b_interval, a_interval)
    x, y = (a, b) if not maximise else (b, a)  # the gain is x / y
    below = math.hypot(math.log(x / first[0]), math.log(second[1] / y))
    above = math.hypot(math.log(first[1] / x), math.log(y / second[0]))
    return math.exp(-below), math.exp(above)


def _value(trial: TrialRecord, metric: str, statistic: str | None, capacity: bool) -> float | None:
    metrics = trial.metrics or {}
    if metric in _LATENCIES:
        value = (metrics.get(metric) or {}).get(statistic or "mean")
    else:
        value = metrics.get("capacity_requests_per_s" if capacity else _RATES[metric])
    return None if value is None else float(value)


def _interval(trial: TrialRecord, metric: str, statistic: str | None) -> list[float] | None:
    """The interval of a latency or of goodput; a throughput has none from a single trial."""
    metrics = trial.metrics or {}
    if metric in _LATENCIES:
        known, name = (metrics.get(metric) or {}).get("intervals"), statistic or "mean"
    else:
        known, name = metrics.get("intervals"), _RATES[metric]
    interval: list[float] | None = (known or {}).get(name)
    return interval


def _served(trial: TrialRecord) -> bool:
    """Whether a trial's engine kept up with what arrived."""
    metrics = trial.metrics or {}
    offered, finished = metrics.get("offered_rate"), metrics.get("requests_per_s")
    if not offered or finished is None:
        return False
    return bool(finished >= SERVED_SHARE * offered)


def _summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often predictions held, over what was scored; shares are None without any."""
    scored = [entry for entry in entries if entry["held"] is not None]
    held = sum(entry["held"] for entry in scored)
    right = sum(entry["direction_right"] for entry in scored)
    return {
        "testable": len(entries),
        "scored": len(scored),
        "held": held,
        "held_share": held / len(scored) if scored else None,
        "direction_right": right,
        "direction_share": right / len(scored) if scored else None,
        "median_error": statistics.median(e["error"] for e in scored) if scored else None,
    }
