"""Which advice comes first: by what it is predicted to do for the metric that binds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autotune.advise.advice import EFFORTS, Advice, Confidence, Effort
from autotune.predict.gain import PredictedGain

# Gains within this of 1 are no change: the direction's tolerance of predictions and measurements.
NO_CHANGE = 0.05
# What a logarithmic gain counts, by how sure it is and by what it takes: half of a gain that rests
# on published figures is taken for granted, and hardware has to gain twice what a flag does.
_TRUST: Mapping[Confidence, float] = {"high": 1.0, "medium": 0.8, "low": 0.5}
_EASE: Mapping[Effort, float] = {
    "knob": 1.0,
    "reload": 0.95,
    "prepare": 0.8,
    "deploy": 0.7,
    "train": 0.5,
    "buy": 0.5,
}
# What to do first: of the advice with so much of the best one's logarithmic gain, the easiest.
_ENOUGH = 0.5


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
    Within a group by the gain, midway between its value and its lower bound, discounted by
    confidence and effort.
    """

    def key(item: Advice) -> tuple[int, bool, float, bool, int, str]:
        gain = item.gain
        worth = 0.0 if gain is None else _expected(gain) * _TRUST[item.confidence]
        if worth > 0:
            worth *= _EASE[item.effort]
        group = 0 if helps(gain) and item.technique not in breaking else 2 if harms(gain) else 1
        return (
            group,
            item.technique in alternatives,
            -round(worth, 3),
            item.role == "secondary",
            EFFORTS.index(item.effort),
            item.technique,
        )

    return sorted(advice, key=key)


def first_of(advice: Sequence[Advice]) -> str | None:
    """What to do first: of what can be tried here, else of all, the easiest that is worth it.

    Worth it is half of the best one's gain, in logarithms. What a trial of minutes shows comes
    before what has to be built or bought, however much that promises.
    """
    good = [a for a in advice if helps(a.gain) and a.gain is not None]
    good = [a for a in good if a.testable and a.confidence != "low"] or good
    if not good:
        return advice[0].technique if advice and not harms(advice[0].gain) else None

    def worth(item: Advice) -> float:
        return 0.0 if item.gain is None else _expected(item.gain) * _TRUST[item.confidence]

    best = max(map(worth, good))
    # Half of a best that is itself below nothing would leave none.
    enough = [a for a in good if worth(a) >= min(best, _ENOUGH * best)]
    return min(enough, key=lambda a: (EFFORTS.index(a.effort), -worth(a))).technique


def _expected(gain: PredictedGain) -> float:
    """The logarithm of a gain, midway between its value and its lower bound."""
    # A bound that says nothing (some are near 0) must not hide a gain whose middle is known.
    return (_log(gain.value) + _log(max(gain.low, gain.value / 4))) / 2


def _log(value: float) -> float:
    return math.log(max(value, 1e-6))
