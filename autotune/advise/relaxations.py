"""What would make a limit feasible: a weaker limit, less load, shorter requests, another technique.

In this order, the cheapest first; each is predicted, and left out where the prediction does not
say that it is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from autotune.advise.advice import EFFORTS, Advice, Relaxation
from autotune.advise.bounds import Bound
from autotune.advise.limit_words import quantity, rounded_outward, told
from autotune.advise.outlook import NO_CHANGE, Outlook, Prospect
from autotune.diagnose.sentences import percent
from autotune.predict.change import Change, Factor, Term

# Less than a sixteenth of the load, or of the lengths, is no relaxation but another service.
_LEAST_FACTOR = 1 / 16
# Halvings of the range: about 3% of the load.
_HALVINGS = 5
_MOST_TECHNIQUES = 3
# What each limit's time grows with, and how it is called.
_LENGTHS: dict[str, tuple[Term, str]] = {
    "ttft": ("input_tokens", "prompts"),
    "e2e": ("output_tokens", "answers"),
}


def relaxations(
    outlook: Outlook, best: Prospect | None, bound: Bound | None, advice: Sequence[Advice]
) -> tuple[Relaxation, ...]:
    """Ways to a limit that is met, each with what it takes.

    Arguments:
        outlook: predictions about the limit.
        best: the best that knobs are predicted to reach.
        bound: what the device allows.
        advice: techniques, those that cannot be tested here among them.
    """
    found = [_weaker_limit(outlook, best, bound)]
    start = best or Prospect(NO_CHANGE, 0.0, 0.0, 0.0)
    how = f" with {best.how}" if best is not None and best.how else ""
    if outlook.limit.metric not in ("throughput", "error_rate"):
        found.append(_less_load(outlook, start, how))
    if outlook.limit.metric in _LENGTHS:
        found.append(_shorter(outlook, start, how))
    return (*(r for r in found if r is not None), *_techniques(outlook, advice))


def _weaker_limit(
    outlook: Outlook, best: Prospect | None, bound: Bound | None
) -> Relaxation | None:
    """The limit that the best configuration is predicted to meet."""
    limit = outlook.limit
    if best is None:
        return None
    low, high = best.low, best.high
    if limit.operator in ("<", "<="):
        safe = max(high, bound.value if bound is not None else high)
    else:
        safe = min(low, bound.value if bound is not None else low)
    if outlook.meets(safe) or safe <= 0:
        return None
    asked = rounded_outward(limit, safe)
    expected = told(limit, best.value)
    between = f", between {told(limit, low)} and {told(limit, high)}" if low < high else ""
    how = f" with {best.how}" if best.how else " as it is"
    return Relaxation(
        kind="limit",
        sentence=f"a limit of {told(limit, asked)}: {quantity(limit)} comes to {expected}"
        f"{between}{how}",
        value=asked,
        low=low,
        high=high,
    )


def _less_load(outlook: Outlook, start: Prospect, how: str) -> Relaxation | None:
    """The greatest part of the load at which the limit is met."""

    def predict(factor: float) -> float | None:
        value = outlook.predict(start.change, factor)
        return None if value is None else start.scale * value

    return _part("load", lambda less: f"{less} less load{how}", predict, outlook)


def _shorter(outlook: Outlook, start: Prospect, how: str) -> Relaxation | None:
    """The greatest part of the prompts' or answers' length at which the limit is met."""
    term, called = _LENGTHS[outlook.limit.metric]

    def predict(factor: float) -> float | None:
        factors = {**start.change.factors, term: Factor(factor, factor, factor)}
        value = outlook.predict(Change(start.change.knobs, factors))
        return None if value is None else start.scale * value

    return _part("lengths", lambda less: f"{called} shorter by {less}{how}", predict, outlook)


def _part(
    kind: Literal["load", "lengths"],
    sentence: Callable[[str], str],
    predict: Callable[[float], float | None],
    outlook: Outlook,
) -> Relaxation | None:
    """The greatest part that meets the limit; `sentence` tells how much less it is."""
    factor = _greatest(predict, outlook)
    if factor is None:
        return None
    low, high = factor
    return Relaxation(kind, sentence(percent(1 - low)), value=low, low=low, high=high)


def _greatest(
    predict: Callable[[float], float | None], outlook: Outlook
) -> tuple[float, float] | None:
    """(greatest factor known to meet the limit, least known to miss it); None if none meets it.

    By halving: less load and shorter requests never make a limit harder, but for the chance of
    which requests meet.
    """
    if not outlook.meets(predict(_LEAST_FACTOR)):
        return None
    low, high = _LEAST_FACTOR, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if outlook.meets(predict(middle)):
            low = middle
        else:
            high = middle
    return low, high


def _techniques(outlook: Outlook, advice: Sequence[Advice]) -> list[Relaxation]:
    """Techniques that are predicted to be enough, the least effort first."""
    found = []
    for item in sorted(advice, key=lambda a: EFFORTS.index(a.effort)):
        prospect = outlook.with_technique(item)
        if prospect is None or not outlook.meets(prospect.value):
            continue
        limit = outlook.limit
        ends = sorted((prospect.low, prospect.high))
        between = ""
        if ends[0] < ends[1] and math.isfinite(ends[1]):
            between = f", between {told(limit, ends[0])} and {told(limit, ends[1])}"
        where = "" if item.testable else ", by an estimate that cannot be tested here"
        found.append(
            Relaxation(
                kind="technique",
                sentence=f"{item.title}: {told(limit, prospect.value)}{between}{where}",
                value=prospect.value,
                low=ends[0],
                high=ends[1],
                technique=item.technique,
            )
        )
    return found[:_MOST_TECHNIQUES]
