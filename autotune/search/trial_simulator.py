"""A trial of the search in virtual time: the same load, limits and rate search as a measured one.

The scheduler and the block pool are the engine's own; only what a step costs is somebody's word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotune.measure import at_rate
from autotune.metrics import compute_metrics
from autotune.predict.cost_model import CostDraw
from autotune.predict.recorded_traffic import leading_requests
from autotune.predict.replay import replay
from autotune.search.capacity import find_capacity
from autotune.search.forecast import load_limits
from autotune.search.messages import BrokeGuard, CutShort, Failed, Measured
from autotune.search.objective import Objective
from autotune.search.schedule import Schedule
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

# A simulated search for the highest rate may take more loads than a measured one, which begins
# where the trial before it ended.
MORE_PROBES = 2


class TrialSimulator:
    """Plays trials of a run.

    Args:
        slo: what is promised; limits on the quality are left out, as no load measures them.
        objective: what is compared.
        schedule: length and number of the loads of a trial.
        at_once: whether all requests of a window arrive at once.
    """

    def __init__(self, slo: Slo, objective: Objective, schedule: Schedule, at_once: bool) -> None:
        self._slo = Slo(tuple(load_limits(slo)))
        self._objective = objective
        self._schedule = schedule
        self._at_once = at_once
        # Where the search for a capacity begins, as a factor on the window's rate.
        self.start = 1.0

    def metrics(
        self,
        requests: Sequence[LoadRequest],
        config: EngineConfig,
        draw: CostDraw,
        cache: CacheShape,
        seed: int = 0,
    ) -> dict[str, Any] | None:
        """What a trial would measure under a draw, by the keys of `bench`; None if nothing."""
        if self._objective.name != "capacity":
            return self._load(requests, config, draw, cache, 1.0, seed)

        def measure_at(factor: float) -> Measured:
            return Measured(self._load(requests, config, draw, cache, factor, seed))

        probes = self._schedule.probes + MORE_PROBES
        found = find_capacity(measure_at, self._slo, self.start, probes)
        if isinstance(found, (BrokeGuard, CutShort, Failed)):
            return None
        rate = found.metrics["offered_rate"] if found.factor else 0.0
        return None if rate is None else {**found.metrics, "capacity_requests_per_s": rate}

    def _load(
        self,
        requests: Sequence[LoadRequest],
        config: EngineConfig,
        draw: CostDraw,
        cache: CacheShape,
        factor: float,
        seed: int,
    ) -> dict[str, Any]:
        schedule = self._schedule
        played = replay(
            at_rate(requests, factor),
            config,
            draw.cost,
            cache,
            drain_limit=schedule.drain_limit + (schedule.window_s if self._at_once else 0.0),
            times=draw.times,
            pace=draw.pace,
            drafts=draw.drafts,
            seed=seed,
        )
        return compute_metrics(
            played.records,
            self._slo,
            duration=played.duration,
            config=config,
            load_delivered=True,
            load_note=None,
            resamples=0,
        )


def tokens_of_work(requests: Sequence[LoadRequest]) -> float:
    """How much there is to simulate: output tokens, and prompt tokens at a sixteenth of one."""
    return sum(r.output_tokens + len(r.token_ids) / 16 for r in requests)


def shortened(
    requests: Sequence[LoadRequest], most_tokens: float, at_least: int
) -> list[LoadRequest]:
    """The beginning of a load that is too long to be simulated often."""
    return leading_requests(requests, int(most_tokens), at_least)
