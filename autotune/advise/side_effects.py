"""What a change does beside what it is for: limits that it breaks, metrics that it ruins."""

from __future__ import annotations

from collections.abc import Sequence

from autotune.advise.rank import harms
from autotune.predict.gain import PredictedGain
from autotune.profiling.schema import Profile
from autotune.slo import Slo
from autotune.slo_grammar import Limit

# A metric that is at least twice as bad is ruined. TPOT is not among these: a larger batch trades
# it for all the others, and who minds limits it.
_RUINED = 0.5
_RUINABLE = ("ttft", "e2e", "throughput")


def broken_limits(gains: Sequence[PredictedGain], profile: Profile, slo: Slo) -> list[str]:
    """Limits that are met now and would not be, by the predicted gains."""
    by_metric = {gain.metric: gain for gain in gains}
    if "tpot" in by_metric:
        by_metric.setdefault("itl", by_metric["tpot"])
    broken = []
    for limit, result in zip(slo.limits, slo.evaluate(profile.metrics or {}), strict=True):
        gain = by_metric.get(limit.metric)
        if gain is None or not result.met or result.measured is None or not harms(gain):
            continue
        if not limit.met_by(_after(limit, result.measured, gain)):
            broken.append(limit.text)
    return broken


def ruined(gains: Sequence[PredictedGain], profile: Profile, slo: Slo) -> list[PredictedGain]:
    """Gains of metrics that get at least twice as bad, unless limits on them stay met."""
    return [
        gain
        for gain in gains
        if gain.metric in _RUINABLE
        and gain.value <= _RUINED
        and not _stays_within_limits(gain, profile, slo)
    ]


def _stays_within_limits(gain: PredictedGain, profile: Profile, slo: Slo) -> bool:
    results = zip(slo.limits, slo.evaluate(profile.metrics or {}), strict=True)
    about = [(limit, r.measured) for limit, r in results if limit.metric == gain.metric]
    return bool(about) and all(
        measured is not None and limit.met_by(_after(limit, measured, gain))
        for limit, measured in about
    )


def _after(limit: Limit, measured: float, gain: PredictedGain) -> float:
    if limit.metric == "throughput":
        return measured * gain.value
    return measured / max(gain.value, 1e-9)
