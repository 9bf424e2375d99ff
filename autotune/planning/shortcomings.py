"""Where nothing keeps an SLO: what is in the way, and how near it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from autotune.planning.candidates import Candidate
from autotune.planning.estimate import Estimate
from autotune.planning.floors import Floor, first_token_floor, token_floor
from autotune.planning.model_shape import ModelShape
from autotune.planning.option import Option
from autotune.planning.planned_traffic import LengthSample
from autotune.slo import Slo, statistic_of
from autotune.slo_grammar import Limit


def why_never(
    shape: ModelShape, option: Option, limits: Sequence[Limit], sample: LengthSample
) -> str:
    """Why no number of replicas meets the SLO."""
    known = option.known
    assert known is not None
    for limit in limits:
        floor = floor_of(shape, known.candidate, limit, sample)
        if floor is not None and floor.seconds > limit.bound:
            return (
                f"{limit.text} is below the physical floor of {_ms(floor.seconds)}, set by "
                f"{floor.set_by}"
            )
    for limit, value in alone(known, limits):
        if not limit.met_by(value):
            return f"{_shown(limit, value)} even with a request or two at a time"
    chance = option.probability or 0.0
    return f"however many replicas, the chance of meeting the SLO is at most {chance:.0%}"


def nearest(
    shape: ModelShape,
    options: Sequence[Option],
    limits: Sequence[Limit],
    sample: LengthSample,
    probability: float,
) -> list[str]:
    """How near the options come to an SLO that none meets."""
    fitting = [(o, o.known) for o in options if o.fits and o.known is not None]
    told = []
    for limit in limits:
        values = [
            (value, option.candidate.choice.label, option.candidate)
            for option, known in fitting
            for _, value in alone(known, [limit])
        ]
        if not values:
            continue
        value, label, candidate = min(values, key=lambda v: v[:2])
        if limit.met_by(value):
            continue
        floor = floor_of(shape, candidate, limit, sample)
        physical = "" if floor is None else f", {_ms(floor.seconds)} of it for {floor.set_by}"
        told.append(
            f"{limit.text} is out of reach: {label} comes nearest, with {_shown(limit, value)} "
            f"even with a request or two at a time{physical}; more replicas do not help"
        )
    if told or not fitting:
        return told
    best = max(fitting, key=lambda pair: pair[0].probability or 0.0)[0]
    return [
        f"{best.candidate.choice.label} comes nearest, with a chance of "
        f"{best.probability or 0.0:.0%} where {probability:.0%} is asked: loosen the SLO, or ask "
        "for less certainty with --probability"
    ]


def alone(known: Estimate, limits: Sequence[Limit]) -> Iterator[tuple[Limit, float]]:
    """What limits look at while hardly anything is asked, by arithmetic."""
    state = known.replica.at(known.replica.capacity(()) * 1e-3)
    for limit in limits:
        value = state.statistic(limit)
        if value is not None:
            yield limit, float(value[0])


def floor_of(
    shape: ModelShape, candidate: Candidate, limit: Limit, sample: LengthSample
) -> Floor | None:
    """The least that a limit's statistic can be on a candidate; None where nothing is known."""
    gpu, config = candidate.choice.gpu, candidate.config
    statistic = limit.statistic or "p50"
    if limit.metric == "ttft":
        tokens = statistic_of(sample.new, statistic)
        return None if tokens is None else first_token_floor(shape, gpu, config, tokens)
    if limit.metric in ("tpot", "itl"):
        if statistic != "mean" and float(np.max(sample.outputs)) < 2:
            return None
        return token_floor(shape, gpu, config)
    if limit.metric == "e2e":
        tokens, answers = (statistic_of(v, statistic) for v in (sample.new, sample.outputs))
        if tokens is None or answers is None:
            return None
        # Neither part alone reaches its quantile where the sum does: their means are a floor.
        first = first_token_floor(shape, gpu, config, float(np.mean(sample.new)))
        each = token_floor(shape, gpu, config)
        mean = first.seconds + (float(np.mean(sample.outputs)) - 1) * each.seconds
        return Floor(mean, each.set_by) if statistic == "mean" else None
    return None


def below_floor(
    shape: ModelShape, options: Iterable[Candidate], slo: Slo, sample: LengthSample
) -> list[str]:
    """Sentences on limits that no candidate can meet, whatever the software."""
    told = []
    fitting = list(options)
    for limit in slo.limits:
        floors = [
            (floor.seconds, candidate.choice.label, floor)
            for candidate in fitting
            if (floor := floor_of(shape, candidate, limit, sample)) is not None
        ]
        if not floors:
            continue
        seconds, label, floor = min(floors, key=lambda f: f[:2])
        if seconds > limit.bound:
            told.append(
                f"{limit.text} is below the physical floor: {label} comes nearest, and takes at "
                f"least {_ms(seconds)} for {floor.set_by}"
            )
    return told


def _shown(limit: Limit, value: float) -> str:
    return f"{limit.statistic}({limit.metric}) of {_ms(value)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
