"""What a load would measure, with bounds: one play for each guess of what is not known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.errors import BadInput
from autotune.predict.cost_model import CostModel
from autotune.predict.drafting import DraftProfile
from autotune.records import LimitResult
from autotune.simulation.fleet import ONE, Fleet
from autotune.simulation.interval import Interval
from autotune.simulation.interval_tree import intervals_of, medians_of, plain
from autotune.simulation.play import Played, play
from autotune.slo import QUALITY_METRICS, Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

DRAWS = 20
MOST_DRAWS = 10_000
DRAIN_LIMIT_S = 30.0
# From this chance on an SLO is said to be met.
LIKELY = 0.5
# What is told as it is, and not as a number with bounds.
_PLAIN = ("load_delivered", "load_note", "config")

# The requests of a play by its number: 0 is the likeliest, higher ones are other such traffic.
Traffic = Callable[[int], Sequence[LoadRequest]]


class DoesNotFit(BadInput):
    """A configuration whose KV cache does not hold the longest sequence."""


@dataclass(frozen=True, slots=True)
class LimitForecast:
    """One limit of the SLO: what is expected of it, and the share of the draws that meet it.

    None is expected where it is undefined: no request finished, or none has a second token.
    """

    limit: str
    expected: Interval | None
    p_met: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"limit": self.limit, "expected": plain(self.expected), "p_met": self.p_met}


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulation forecasts.

    `metrics` has the keys of `bench --json` with an `Interval` for each number, None where it is
    undefined (no request finished). `p_meets_slo` is the share of the draws that meet every limit
    that a simulation can tell of; None if there is none. `middle` is the likeliest play.
    """

    metrics: dict[str, Any]
    p_meets_slo: float | None
    limits: list[LimitForecast]
    draws: int
    notes: list[str]
    middle: Played

    @property
    def slo_met(self) -> bool:
        """Whether the SLO is at least as likely met as missed."""
        return self.p_meets_slo is None or self.p_meets_slo >= LIKELY

    def to_json(self) -> dict[str, Any]:
        """By the keys of `simulate --json`."""
        return {
            **plain(self.metrics),
            "p_meets_slo": self.p_meets_slo,
            "slo": [limit.to_json() for limit in self.limits],
            "draws": self.draws,
            "notes": self.notes,
        }


def simulate(
    model: CostModel,
    config: EngineConfig,
    requests: Sequence[LoadRequest] | Traffic,
    *,
    slo: Slo,
    fleet: Fleet = ONE,
    drafts: DraftProfile | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    drain_limit: float = DRAIN_LIMIT_S,
    outputs: Mapping[str, Sequence[int]] | None = None,
    before_play: Callable[[int, int], None] = lambda _number, _total: None,
) -> Simulated:
    """Play a load at the likeliest cost of steps, and at `draws` others.

    Of given requests each value is that of the likeliest cost. Where each play has requests of its
    own the bounds are also those of the traffic's chances, and the value is the median.

    Args:
        model: what steps cost.
        config: the knobs, of every engine.
        requests: the load, or what gives it by the number of the play.
        slo: limits; those on the quality of answers are left out, and a note says so.
        fleet: the engines.
        drafts: how drafts fare, where the config has a `speculative_method` and the costs do not
            say; each play guesses at them as well, as far as they may be off.
        draws: how many guesses.
        seed: of the draws, and of what speculation accepts.
        drain_limit: seconds after the last arrival at which what is unfinished is given up.
        outputs: the tokens that requests get, by id.
        before_play: called with the number of each play and that of all; may raise to stop.

    Raises:
        BadInput: a number of draws that is out of range, or a load without requests.
        DoesNotFit: the cache does not hold the longest sequence.
        autotune.predict.apply.NotPredictable: nothing is known of a knob's effect.
    """
    if not 1 <= draws <= MOST_DRAWS:
        raise BadInput(f"the number of draws must be between 1 and {MOST_DRAWS}, got {draws}")
    cache = cache_of(model, config)
    judged = Slo(tuple(limit for limit in slo.limits if limit.metric not in QUALITY_METRICS))
    guesses = [model.middle(config), *model.draws(config, draws, seed)]
    found: list[dict[str, Any]] = []
    middle: Played | None = None
    for number, guess in enumerate(guesses):
        before_play(number, len(guesses))
        load = requests(number) if callable(requests) else requests
        if not load:
            raise BadInput("there are no requests to simulate")
        played = play(
            load,
            config,
            guess,
            cache,
            drain_limit=drain_limit,
            fleet=fleet,
            drafts=_guessed(drafts, seed, number),
            outputs=outputs,
            seed=seed + number,
        )
        middle = middle or played
        found.append(played.metrics(judged, config))
    assert middle is not None
    told = medians_of([_numbers(f) for f in found]) if callable(requests) else _numbers(found[0])
    metrics = intervals_of(told, [_numbers(f) for f in found[1:]])
    results = [judged.evaluate(f) for f in found[1:]]
    return Simulated(
        metrics=metrics | {name: found[0][name] for name in _PLAIN},
        p_meets_slo=_share([all(r.met for r in result) for result in results])
        if judged.limits
        else None,
        limits=_limits(judged, judged.evaluate(told), results),
        draws=draws,
        notes=_notes(slo, judged),
        middle=middle,
    )


def _guessed(drafts: DraftProfile | None, seed: int, number: int) -> DraftProfile | None:
    """Drafts as they are likeliest in the first play, and as they may be in the others."""
    return drafts if drafts is None or not number else drafts.drawn((seed, number))


def cache_of(model: CostModel, config: EngineConfig) -> CacheShape:
    """The KV cache under a config.

    Raises:
        DoesNotFit: it does not hold the longest sequence.
    """
    cache = model.cache(config)
    if cache is None:
        raise DoesNotFit(
            "the KV cache does not hold the longest sequence: lower max_model_len, or leave the "
            "cache more memory"
        )
    return cache


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in _PLAIN}


def _limits(
    slo: Slo, expected: Sequence[LimitResult], results: Sequence[Sequence[LimitResult]]
) -> list[LimitForecast]:
    forecasts = []
    for place, limit in enumerate(slo.limits):
        drawn = [result[place] for result in results]
        # What was never measured is infinitely late, unless nothing was there to be late.
        known = [r for r in drawn if r.measured is not None or not r.met]
        measured = [math.inf if r.measured is None else r.measured for r in known]
        value = expected[place].measured
        forecasts.append(
            LimitForecast(
                limit.text,
                None if value is None else Interval.of(value, measured or [value]),
                _share([r.met for r in drawn]),
            )
        )
    return forecasts


def _share(yes: Sequence[bool]) -> float:
    return sum(yes) / len(yes)


def _notes(slo: Slo, judged: Slo) -> list[str]:
    left_out = [limit.text for limit in slo.limits if limit not in judged.limits]
    if not left_out:
        return []
    return [f"not simulated, and left out: {', '.join(left_out)}"]
