"""By how much speculation is expected to speed a load up, and how far that may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from autotune.metrics import latencies
from autotune.predict.cost_model import CostDraw, CostModel
from autotune.predict.drafting import DraftProfile
from autotune.predict.intervals import bounds
from autotune.simulation.interval import Interval
from autotune.simulation.play import Played, play
from autotune.simulation.simulate import DRAWS, cache_of
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig

Metric = Literal["tpot", "e2e", "throughput"]


def predicted_speedup(
    load: Sequence[LoadRequest],
    plain: EngineConfig,
    drafting: EngineConfig,
    model: CostModel,
    drafts: DraftProfile | None = None,
    *,
    metric: Metric = "tpot",
    outputs: Mapping[str, Sequence[int]] | None = None,
    draws: int = DRAWS,
    noise: float = 0.0,
    seed: int = 0,
    drain_limit: float = math.inf,
) -> Interval:
    """How many times as fast `drafting` serves a load as `plain`, both on a machine of one speed.

    Args:
        load: the requests.
        plain: the config without drafts.
        drafting: the one with them.
        model: what steps cost.
        drafts: how they fare; by default as the model says.
        metric: mean latencies before over after, or output tokens a second after over before.
        outputs: the tokens that requests get, by id.
        draws: guesses at what is not known; each plays both configs.
        noise: standard deviation of the logarithm of what steps with drafts take beside those
            without, as far as draws do not know of it; see `autotune.predict.intervals.misfit`.
        seed: of the draws, and of what is accepted.
        drain_limit: seconds after the last arrival at which a load ends.

    Raises:
        autotune.predict.apply.NotPredictable: nothing is known of a knob's effect or of drafts.
        autotune.simulation.simulate.DoesNotFit: a cache does not hold the longest sequence.
        ValueError: no request has a second token.
    """

    def ratio(number: int, before: CostDraw, after: CostDraw) -> float:
        drawn = drafts if drafts is None or not number else drafts.drawn((seed, number))
        speeds = []
        for config, draw, known in ((plain, before, None), (drafting, after, drawn)):
            cache = cache_of(model, config)
            played = play(
                load,
                config,
                draw,
                cache,
                drain_limit=drain_limit,
                drafts=known,
                outputs=outputs,
                seed=seed + number,
            )
            speeds.append(_speed(played, metric))
        return speeds[1] / speeds[0]

    value = ratio(0, model.middle(plain), model.middle(drafting))
    guesses = zip(model.draws(plain, draws, seed), model.draws(drafting, draws, seed), strict=True)
    drawn = Interval.of(value, [ratio(n, *pair) for n, pair in enumerate(guesses, 1)])
    return Interval(value, *bounds(value, [(drawn.low, drawn.high)], noise))


def _speed(played: Played, metric: Metric) -> float:
    if metric == "throughput":
        return sum(record.output_tokens for record in played.records) / played.duration
    values, _ = latencies(metric, [record for record in played.records if record.completed])
    if not len(values):
        raise ValueError("no request of the load has a second token, so that nothing is sped up")
    return 1.0 / statistics.fmean(values)
