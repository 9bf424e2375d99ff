"""Which advice comes first: by what it is predicted to do for the metric that binds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autotune.advise.advice import EFFORTS, Advice, Confidence
from autotune.predict.gain import PredictedGain

# Gains within this of 1 are no change: the direction's tolerance of predictions and measurements.
NO_CHANGE = 0.05
# Advice whose logarithmic gain differs by less than this is told apart by confidence and effort.
_STEP = math.log(1.05)
# What to do first: of the advice with so much of the best one's logarithmic gain, the easiest.
_ENOUGH = 0.5
_CONFIDENCES: tuple[Confidence, ...] = ("high", "medium", "low")


def confidence_of(gain: PredictedGain | None) -> Confidence:
    """How far a prediction can be trusted: by its basis and the width of its interval."""
    if gain is None or gain.basis == "estimate" or gain.low <= 0:
        return "low"
    width = gain.high / gain.low
    if gain.basis == "replay" and width < 1.5:
        return "high"
    return "medium" if width < 3 else "low"


def helps(gain: PredictedGain | None) -> bool:
    """Whether a metric is predicted to get better."""
    return gain is not None and gain.value > 1 + NO_CHANGE


def harms(gain: PredictedGain | None) -> bool:
    """Whether a metric is predicted to get worse."""
    return gain is not None and gain.value < 1 - NO_CHANGE


def ranked(
    advice: Sequence[Advice], breaking: Sequence[str], alternatives: Sequence[str]
) -> list[Advice]:
    """Best first.

    What helps the binding metric comes before what helps another or could not be judged, and that
    before what helps nothing; `breaking` names techniques that would break a limit that is met, and
    `alternatives` those that stand in for an easier one: they come after the others of their group.
    Within a group by the lower bound of the gain, then confidence, role and effort.
    """

    def key(item: Advice) -> tuple[int, bool, float, int, bool, int, str]:
        gain = item.gain
        bound = 0.0 if gain is None else _log(max(gain.low, gain.value / 4))
        group = 0 if helps(gain) and item.technique not in breaking else 2 if harms(gain) else 1
        return (
            group,
            item.technique in alternatives,
            -round(bound / _STEP),
            _CONFIDENCES.index(item.confidence),
            item.role == "secondary",
            EFFORTS.index(item.effort),
            item.technique,
        )

    return sorted(advice, key=key)


def first_of(advice: Sequence[Advice]) -> str | None:
    """What to do first: the easiest with half of the best one's gain, in logarithms.

    A purchase that halves a latency is no first step where a flag takes off a third.
    """
    good = [a for a in advice if helps(a.gain) and a.gain is not None]
    if not good:
        return advice[0].technique if advice and not harms(advice[0].gain) else None
    best = max(_expected(a) for a in good)
    enough = [a for a in good if _expected(a) >= _ENOUGH * best]
    return min(enough, key=lambda a: (EFFORTS.index(a.effort), -_expected(a))).technique


def _expected(item: Advice) -> float:
    """The logarithm of a gain, midway between its value and its lower bound."""
    assert item.gain is not None
    return (_log(item.gain.value) + _log(max(item.gain.low, item.gain.value / 4))) / 2


def _log(value: float) -> float:
    return math.log(max(value, 1e-6))
