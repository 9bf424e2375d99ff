"""What trials of another engine would measure, by the bundled engine's scheduler in virtual time.

Knobs with the same meaning in both engines are played through; a step costs what the trials so far
say. What no simulation knows of, measured trials have to tell (`autotune.external_search.choose`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autotune.external.table import EngineTable
from autotune.external_search.space import FlagConfig
from autotune.external_search.step_costs import LinearCost
from autotune.predict.cost_model import CostDraw
from autotune.search.forecast import quantities
from autotune.search.objective import Objective
from autotune.search.trial_simulator import TrialSimulator
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.config import KNOBS, EngineConfig
from engine.engine import CacheShape
from engine.errors import ConfigError

# Knobs whose effect is one of scheduling: the bundled scheduler shows it for any engine.
PLAYED = (
    "max_num_batched_tokens",
    "max_num_seqs",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "long_prefill_token_threshold",
    "watermark",
)
# Blocks of another size only round: the cache is played as so many tokens in blocks of this size.
_BLOCK = 16


class Forecasts:
    """Simulated trials, each remembered.

    Args:
        table: the engine's; tells which knobs mean the same.
        cost: what steps cost.
        requests: the window that trials are offered.
        cache_tokens: what the KV cache holds, as the engine said; None: more than is needed.
        longest: tokens of the longest request that the engine takes.
        simulator: plays trials.
        slo: what is promised.
        objective: what is compared.
    """

    def __init__(
        self,
        table: EngineTable,
        cost: LinearCost,
        requests: Sequence[LoadRequest],
        cache_tokens: float | None,
        longest: int,
        simulator: TrialSimulator,
        slo: Slo,
        objective: Objective,
    ) -> None:
        self._table = table
        self._draw = CostDraw(cost)
        self._requests = requests
        self._longest = longest
        self._simulator = simulator
        self._slo = slo
        self._objective = objective
        needed = sum(len(r.token_ids) + r.output_tokens for r in requests) + longest
        tokens = min(float(needed), math.inf if cache_tokens is None else cache_tokens)
        self._cache = CacheShape(max(2, int(tokens // _BLOCK)), longest)
        self._known: dict[str, dict[str, float] | None] = {}

    def played(self, knobs: Iterable[str]) -> list[str]:
        """Those of the engine's knobs whose effect is simulated."""
        return [name for name in knobs if self._table.knobs[name].same_as in PLAYED]

    def simulate(self, config: FlagConfig) -> dict[str, float] | None:
        """`quantities` of a trial; None where the scheduler cannot play it."""
        try:
            played = self._config(config.to_dict())
        except ConfigError:
            return None
        key = str(played)
        if key not in self._known:
            metrics = self._simulator.metrics(self._requests, played, self._draw, self._cache)
            self._known[key] = (
                None if metrics is None else quantities(metrics, self._slo, self._objective)
            )
        return self._known[key]

    def _config(self, values: Mapping[str, Any]) -> EngineConfig:
        knobs: dict[str, Any] = {"block_size": _BLOCK, "max_model_len": self._longest}
        for name, value in values.items():
            same = self._table.knobs[name].same_as if name in self._table.knobs else None
            if same in PLAYED and value is not None:
                knobs[same] = _within_bounds(same, value)
        return EngineConfig.from_mapping(knobs)


def _within_bounds(name: str, value: Any) -> Any:
    """What an engine takes beyond the bundled one's bounds plays as the bound."""
    knob = KNOBS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    low = value if knob.minimum is None else max(value, knob.minimum)
    return low if knob.maximum is None else min(low, knob.maximum)
