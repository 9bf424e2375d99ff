"""Forecasts of a run's trials by simulation: the costs that are believed, the load of the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from autotune.errors import Interrupted
from autotune.predict.apply import NotPredictable
from autotune.predict.cost_model import CostDraw, CostModel
from autotune.predict.drafting import check_drafts
from autotune.search.forecast import quantities
from autotune.search.objective import Objective
from autotune.search.trial_simulator import TrialSimulator
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.errors import EngineError


class SimulatedTrials:
    """A `Forecaster`; what was simulated once is remembered.

    Args:
        model: what steps cost.
        simulator: plays trials.
        requests: the window that trials are offered.
        slo: what is promised.
        objective: what is compared.
        seed: of the draws.
        stop: set to stop; the next simulation then raises `Interrupted`.
    """

    def __init__(
        self,
        model: CostModel,
        simulator: TrialSimulator,
        requests: Sequence[LoadRequest],
        slo: Slo,
        objective: Objective,
        seed: int,
        stop: threading.Event | None = None,
    ) -> None:
        self._stop = stop
        self.model = model
        self._simulator = simulator
        self._requests = requests
        self._slo = slo
        self._objective = objective
        self._seed = seed
        self._known: dict[str, Mapping[str, float] | None] = {}
        self.simulations = 0

    def simulate(self, config: EngineConfig) -> Mapping[str, float] | None:
        """What a trial would measure under the likeliest cost; None where nothing is known."""
        return self._play(config, "middle", self.model.middle)

    def draws(self, config: EngineConfig, count: int) -> Sequence[Mapping[str, float]]:
        """What trials would measure under drawn costs; empty where nothing is known."""
        try:
            drawn = self.model.draws(config, count, self._seed)
        except (NotPredictable, EngineError):
            return []
        plays = []
        for place, draw in enumerate(drawn):
            plays.append(self._play(config, f"{place} of {count}", partial(_given, draw)))
        return [play for play in plays if play is not None]

    def _play(
        self, config: EngineConfig, what: str, draw: Callable[[EngineConfig], CostDraw]
    ) -> Mapping[str, float] | None:
        key = f"{what} {config}"
        if key not in self._known:
            self._known[key] = self._played(config, draw)
        return self._known[key]

    def _played(
        self, config: EngineConfig, draw: Callable[[EngineConfig], CostDraw]
    ) -> Mapping[str, float] | None:
        try:
            cache: CacheShape | None = self.model.cache(config)
            if cache is None:
                return None
            cost = draw(config)
            check_drafts(config, cost.drafts)
        except (NotPredictable, EngineError):
            return None
        if self._stop is not None and self._stop.is_set():
            raise Interrupted("stopped; what was measured is kept")
        self.simulations += 1
        metrics = self._simulator.metrics(self._requests, config, cost, cache, self._seed)
        return None if metrics is None else quantities(metrics, self._slo, self._objective)


def _given(draw: CostDraw, _: EngineConfig) -> CostDraw:
    return draw
