"""Which advice comes first: by what it is predicted to do for the metric that binds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

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
# A gain from here on is clear, and worth to be the first thing that is tried.
_CLEAR = 1.1
# What nobody begins with while anything else might do.
_LAST: tuple[Effort, ...] = ("train", "buy")


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
    advice: Sequence[Advice], alternatives: Collection[str] = (), aside: Collection[str] = ()
) -> list[Advice]:
    """Best first.

    What helps the binding metric comes first, what can be tried here before what cannot; then what
    helps another metric, could not be judged or would break a limit; at last what harms. After the
    others of their group come those in `aside`, which answer no finding of the binding metric, and
    in `alternatives`, which stand in for an easier one. Within a group by the gain, midway between
    its value and its lower bound, discounted by confidence and effort.
    """

    def key(item: Advice) -> tuple[int, bool, bool, float, bool, int, str]:
        gain = item.gain
        worth = 0.0 if gain is None else _expected(gain) * _TRUST[item.confidence]
        if worth > 0:
            worth *= _EASE[item.effort]
        if helps(gain) and item.breaks is None:
            group = 0 if item.testable else 1
        else:
            group = 3 if harms(gain) else 2
        return (
            group,
            item.technique in aside and not helps(gain),
            item.technique in alternatives,
            -round(worth, 3),
            item.role == "secondary",
            EFFORTS.index(item.effort),
            item.technique,
        )

    return sorted(advice, key=key)


def first_of(advice: Sequence[Advice]) -> str | None:
    """What to do first: the easiest that is worth it, of what a person would begin with.

    That is what a trial of minutes shows, then what can be deployed, and training or buying only
    where nothing else is left, however much they promise. Worth it is half of the best one's gain
    among equals, in logarithms. Nothing that breaks a limit or harms comes first.
    """
    able = [a for a in advice if a.breaks is None and not harms(a.gain)]
    good = [a for a in able if helps(a.gain)]
    cheap = [a for a in good if a.effort not in _LAST]
    clear = [a for a in cheap if a.gain is not None and a.gain.value >= _CLEAR]
    unjudged = [a for a in able if not a.gains and a.effort not in _LAST]
    groups = [
        [a for a in clear if a.testable],
        clear,
        cheap,
        unjudged[:1],
        [a for a in good if a.effort == "train"],
        good,
        [a for a in able if a.effort not in _LAST][:1],
        able[:1],
    ]
    found = next((group for group in groups if group), None)
    return None if found is None else _easiest(found).technique


def _easiest(advice: Sequence[Advice]) -> Advice:
    """The least effort that is worth it, beside the best of them."""

    def worth(item: Advice) -> float:
        return 0.0 if item.gain is None else _expected(item.gain) * _TRUST[item.confidence]

    best = max(map(worth, advice))
    # Half of a best that is itself below nothing would leave none.
    enough = [a for a in advice if worth(a) >= min(best, _ENOUGH * best)]
    return min(enough, key=lambda a: (EFFORTS.index(a.effort), -worth(a)))


def _expected(gain: PredictedGain) -> float:
    """The logarithm of a gain, midway between its value and its lower bound."""
    # A bound that says nothing (some are near 0) must not hide a gain whose middle is known.
    return (_log(gain.value) + _log(max(gain.low, gain.value / 4))) / 2


def _log(value: float) -> float:
    return math.log(max(value, 1e-6))
