"""Limits that cannot be met: with proof where bytes or operations forbid it, and what would do.

A limit is listed in two cases. Either a bound of `autotune.advise.bounds` breaks it: then no
configuration here meets it, and `proven` is true. Or it was missed, and neither a piece of advice
nor all that help together are predicted to meet it: then it is only that nothing known helps.
"""

from __future__ import annotations

from collections.abc import Sequence

from autotune.advise.advice import Advice, Infeasible
from autotune.advise.bounds import MARGIN, Bound, Bounds
from autotune.advise.limit_words import told
from autotune.advise.outlook import Outlook, Prospect
from autotune.advise.relaxations import relaxations
from autotune.predict.predictor import Predictor
from autotune.profiling.schema import Profile
from autotune.slo import QUALITY_METRICS, Slo
from autotune.slo_grammar import LATENCIES, Limit

# Limits that a growing queue breaks in the end.
_HURT_BY_GROWTH = ("ttft", "e2e", "goodput")


def infeasible_limits(
    profile: Profile,
    slo: Slo | None,
    predictor: Predictor | None,
    advice: Sequence[Advice],
    *,
    searched: bool = False,
) -> tuple[Infeasible, ...]:
    """The limits of an SLO that no configuration is expected to meet, in the SLO's order.

    Arguments:
        profile: what was measured; with the model and ceilings, for proofs.
        slo: the limits; None has none. Limits on quality are no matter of speed and left out.
        predictor: of the same profile; without one only what is proven or measured is told.
        advice: what could be done; after a search what it could not try.
        searched: whether the profile is of the best that a search found.
    """
    bounds = Bounds.of(profile)
    found = []
    for limit in slo.limits if slo else ():
        if slo is None or limit.metric in QUALITY_METRICS:
            continue
        outlook = Outlook(profile, predictor, slo, limit, advice)
        # What was measured to be met is met, whatever a bound says; what a server does not tell
        # of itself is no miss.
        result = outlook.result
        untold = profile.source.kind == "metrics" and outlook.measured is None
        if untold or (result is not None and result.met):
            continue
        bound = bounds.of_limit(limit, slo) if bounds else None
        best = outlook.best()
        if bound is not None and _breaks(limit, bound):
            proof = f"{limit.text} {_cannot(bound)} be met here: {bound.proof}"
            found.append(_infeasible(limit, bound, bound.certain, proof, outlook, best, advice))
            continue
        growth = bounds.utilisation() if bounds and limit.metric in _HURT_BY_GROWTH else None
        if growth is not None and growth.value >= MARGIN:
            proof = (
                f"{limit.text} {_cannot(growth)} be met for long: {growth.proof}, so that the "
                "queue grows"
            )
            found.append(_infeasible(limit, bound, growth.certain, proof, outlook, best, advice))
        elif result is not None and not (best and outlook.meets(best.value)):
            proof = _unproven(limit, outlook, best, bound, searched=searched)
            found.append(_infeasible(limit, bound, False, proof, outlook, best, advice))
    return tuple(found)


def _breaks(limit: Limit, bound: Bound) -> bool:
    """Whether a bound breaks a limit by more than ceilings are uncertain."""
    if limit.operator in ("<", "<="):
        return bound.value >= limit.bound * MARGIN
    # A share of requests has the margin in the bounds that it counts.
    margin = 1.0 if limit.metric == "goodput" else MARGIN
    return not limit.met_by(bound.value * margin)


def _cannot(bound: Bound) -> str:
    return "cannot" if bound.certain else "can hardly"


def _infeasible(
    limit: Limit,
    bound: Bound | None,
    proven: bool,
    proof: str,
    outlook: Outlook,
    best: Prospect | None,
    advice: Sequence[Advice],
) -> Infeasible:
    return Infeasible(
        limit=limit.text,
        metric=limit.metric,
        asked=limit.bound,
        bound=None if bound is None else bound.value,
        proven=proven,
        proof=proof,
        relaxations=relaxations(outlook, best, bound, advice),
    )


def _unproven(
    limit: Limit, outlook: Outlook, best: Prospect | None, bound: Bound | None, *, searched: bool
) -> str:
    """Why a limit is not expected to be met, without a proof."""
    if outlook.measured is not None:
        sentence = f"measured {told(limit, outlook.measured)}"
    else:
        sentence = "requests did not finish"
    if best is not None and best.how:
        sentence += f", and the best that is predicted is {told(limit, best.value)} ({best.how})"
    elif searched:
        sentence += ", the best of what was tried"
    else:
        sentence += ", and nothing that can be set here is predicted to help"
    if bound is not None and limit.metric in (*LATENCIES, "throughput"):
        sentence += f"; the device itself allows {told(limit, bound.value)}"
    return f"{limit.text} is not met: {sentence}"
