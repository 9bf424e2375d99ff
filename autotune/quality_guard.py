"""The limits that an SLO sets to the harm of a quantization.

A limit such as `kl<0.02` is decided by the measured value, as every other limit of an SLO is: the
text is the same for all configurations, so none is favoured, and a bound is not made stricter by
how much text there was. The interval is told beside it, and where the limit lies within it the
outcome is said to be uncertain. Who wants certainty sets a stricter bound.

A configuration that breaks such a limit is infeasible, whatever its speed: it is told to the
sampler as a violated constraint and is never a finalist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autotune.records import LimitResult, TrialRecord
from autotune.slo import QUALITY_METRICS, Limit, Slo


def quality_entries(quality: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a measured quality adds to a measurement's metrics: itself, and what limits are on."""
    if quality is None:
        return {}
    return {"quality": dict(quality), **{name: quality[name] for name in QUALITY_METRICS}}


def broken_limits(slo: Slo, quality: Mapping[str, Any] | None) -> list[LimitResult]:
    """The limits on the quality that a measured one breaks; those that could not be measured too.

    None stands for a quality of which nothing could be measured.
    """
    return [result for result in slo.guard.evaluate(quality or {}) if not result.met]


def breaks_guard(slo: Slo, results: Sequence[LimitResult]) -> bool:
    """Whether one of the limits that were missed is on the quality."""
    guard = {limit.text for limit in slo.guard.limits}
    return any(result.limit in guard and not result.met for result in results)


def guard_reason(slo: Slo, quality: Mapping[str, Any] | None) -> str:
    """One sentence on the limits that a quality breaks."""
    parts = []
    for limit in slo.guard.limits:
        value = (quality or {}).get(limit.metric)
        if value is None:
            parts.append(f"{limit.metric} could not be measured, so {limit.text} is not met")
        elif not limit.met_by(value):
            parts.append(f"{_measured(limit, quality or {})} breaks {limit.text}")
    return "; ".join(parts)


def uncertain_limits(slo: Slo, quality: Mapping[str, Any] | None) -> list[str]:
    """A sentence on each quality limit that lies within the interval of what was measured."""
    sentences = []
    for limit in slo.guard.limits:
        ends = _interval(limit, quality or {})
        if ends is not None and limit.met_by(ends[0]) != limit.met_by(ends[1]):
            met = limit.met_by((quality or {})[limit.metric])
            sentences.append(
                f"{_measured(limit, quality or {})} {'meets' if met else 'breaks'} {limit.text}, "
                "but the interval holds the limit: more text could decide otherwise"
            )
    return sentences


def qualities(trials: Sequence[TrialRecord], slo: Slo) -> dict[str, dict[str, Any]]:
    """What the trials measured of each way of quantizing, by its name as `variant` tells it.

    Each has the entries of a measured quality and `feasible` (whether the SLO's limits on the
    quality are met), `reason` (why not), `uncertain` (sentences) and `trials` (their numbers).
    """
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        quality = trial.quality
        if quality is None:
            continue
        entry = found.get(quality["variant"])
        if entry is None:
            reason = guard_reason(slo, quality)
            entry = found[quality["variant"]] = {
                **quality,
                "feasible": not reason,
                "reason": reason or None,
                "uncertain": uncertain_limits(slo, quality),
                "trials": [],
            }
        entry["trials"].append(trial.number)
    return found


def _measured(limit: Limit, quality: Mapping[str, Any]) -> str:
    def written(value: float) -> str:
        return f"{value:.3g}" if limit.metric == "kl" else f"{100 * value:.3g}%"

    ends = _interval(limit, quality)
    text = f"{limit.metric} {written(quality[limit.metric])}"
    return (
        text if ends is None else f"{text} (95% interval {written(ends[0])} to {written(ends[1])})"
    )


def _interval(limit: Limit, quality: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = (quality.get(f"{limit.metric}_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (float(low), float(high))
