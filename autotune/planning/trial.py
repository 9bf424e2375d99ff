"""One replica at a rate, simulated from the middle of its traffic on.

A replica with hundreds of answers under way takes minutes to get there from an empty start. So it
starts with as many as arithmetic expects, each some way through its answer, its prompt's keys and
values in the cache; then a stretch of traffic passes before anything is counted, and traffic goes
on until all that is counted has been answered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autotune.metrics import compute_metrics
from autotune.planning.arithmetic import HOPELESS, Steady, log_shortfall
from autotune.planning.planned_traffic import LengthSample, PlannedTraffic
from autotune.predict.cost_model import CostDraw
from autotune.predict.virtual_engine import VirtualEngine
from autotune.records import RequestRecord
from autotune.slo import Slo
from autotune.slo_grammar import LATENCIES
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

# Requests that are counted: of fewer a 95th percentile says little, of more a plan takes too long.
# A limit on a rarer one takes twice as many.
COUNTED = 192
_USUAL_PERCENTILE = 95.0
# Before and after them, in mean times that a request stays.
_BEFORE, _AFTER = 0.5, 0.4
_LEAST_AROUND = 24
# A prefix cache that is to be filled first takes longer.
_LEAST_BEFORE_CACHED = 64
_MOST_UNDER_WAY = 1500
# A replica that has so many times as many requests as expected is not going to recover.
_PILED_UP = 3.0
_STARTING_TOKEN = 1 << 20
_MOST_SLICES = 200
# Tokens of a block: those of the presets' prefixes.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Trial:
    """What a simulated replica did: metrics by the keys of `bench`, None if requests piled up.

    `violation` is the logarithm of measured / bound of the limit that fares worst, and
    `violations` that of each limit.
    """

    rate: float
    metrics: dict[str, Any] | None
    violations: tuple[float, ...]
    simulated: int

    @property
    def violation(self) -> float:
        """Of the limit that fares worst; above 0 is a miss."""
        return max(self.violations, default=-HOPELESS)


@dataclass(frozen=True, slots=True)
class Stage:
    """What all trials of a configuration share."""

    config: EngineConfig
    cache: CacheShape
    traffic: PlannedTraffic
    sample: LengthSample
    slo: Slo

    @property
    def counted(self) -> int:
        """Requests that a trial counts."""
        rarest = max((limit.quantile or 0.0 for limit in self.slo.limits), default=0.0)
        return 2 * COUNTED if rarest > _USUAL_PERCENTILE else COUNTED

    def requests(self, expected: Steady, rate: float) -> int:
        """How many requests a trial at a rate takes."""
        under_way, before, after = _sizes(expected, rate, cached=self.traffic.shares_prefixes)
        return under_way + before + self.counted + after

    def run(self, cost: CostDraw, rate: float, parts: int, expected: Steady, draw: int) -> Trial:
        """Simulate a rate; `expected` is the arithmetic's state at about that rate."""
        cached = self.traffic.shares_prefixes
        under_way, before, after = _sizes(expected, rate, cached=cached)
        count = before + self.counted + after
        stream = self.traffic.stream(rate, count, parts, draw)
        config, cache = self._coarse(cached=cached)
        engine = VirtualEngine(
            config, cost.cost, cache, times=cost.times, pace=cost.pace, seed=draw
        )
        for load, received in _under_way(self.sample, under_way, draw):
            if len(load.token_ids) + load.output_tokens <= self.cache.max_model_len:
                engine.send(load, 0.0, received_tokens=received)
        most = max(64.0, _PILED_UP * (under_way + 3 * math.sqrt(under_way)))
        records: dict[str, RequestRecord] = {}
        for load in stream:
            due = load.arrival_s + cost.times.arrival
            engine.run(due)
            if engine.outstanding(due) > most:
                return Trial(rate, None, self._hopeless(), count)
            engine.send(load, due)
        counted = [load.request_id for load in stream[before : before + self.counted]]
        slice_s = max(1e-3, self.counted / rate / 4)
        for _ in range(_MOST_SLICES):
            records.update((r.request_id, r) for r in engine.take_records())
            if all(request_id in records for request_id in counted):
                break
            engine.run(engine.now + slice_s)
        else:
            return Trial(rate, None, self._hopeless(), count)
        return self._judged(rate, [records[request_id] for request_id in counted], count)

    def _coarse(self, *, cached: bool) -> tuple[EngineConfig, CacheShape]:
        """The same with larger blocks, which take less time to keep and change little.

        Where nothing is shared, prefixes are not looked for.
        """
        times = _BLOCK // self.config.block_size
        config = self.config.replace(block_size=_BLOCK, enable_prefix_caching=cached)
        return config, self.cache._replace(num_blocks=self.cache.num_blocks // times)

    def _judged(self, rate: float, records: Sequence[RequestRecord], count: int) -> Trial:
        metrics = compute_metrics(
            records,
            self.slo,
            duration=len(records) / rate,
            config=self.config,
            load_delivered=True,
            load_note=None,
            resamples=0,
        )
        violations = []
        for limit, result in zip(self.slo.limits, self.slo.evaluate(metrics), strict=True):
            if result.met and result.measured is None:
                violations.append(-HOPELESS)
            elif result.measured is None:
                violations.append(HOPELESS)
            elif limit.metric in LATENCIES:
                violations.append(math.log(max(result.measured, 1e-9) / limit.bound))
            elif limit.metric == "goodput":
                violations.append(log_shortfall(result.measured, limit.bound, len(records)))
            elif limit.metric == "error_rate":
                violations.append(-HOPELESS if result.met else HOPELESS)
        return Trial(rate, metrics, tuple(_within(v) for v in violations), count)

    def _hopeless(self) -> tuple[float, ...]:
        return (HOPELESS,) * max(1, len(self.slo.limits))


def _within(violation: float) -> float:
    return min(HOPELESS, max(-HOPELESS, violation))


def _sizes(expected: Steady, rate: float, *, cached: bool) -> tuple[int, int, int]:
    """Requests under way at the start, before those that are counted, and after."""
    if expected.saturated[0]:
        return 0, COUNTED, COUNTED // 2
    stay = float(np.mean(expected.e2e[0]))
    under_way = min(_MOST_UNDER_WAY, round(float(expected.batch[0])))
    around = min(_MOST_UNDER_WAY, rate * stay)
    before = max(_LEAST_BEFORE_CACHED if cached else _LEAST_AROUND, math.ceil(_BEFORE * around))
    # Steps of 32, so that streams of like rates are drawn once.
    return (
        under_way,
        -(-before // 32) * 32,
        max(_LEAST_AROUND, math.ceil(_AFTER * around / 32) * 32),
    )


def _under_way(sample: LengthSample, count: int, draw: int) -> list[tuple[LoadRequest, int]]:
    """Requests as they are met at a moment, and how many of their tokens are in the cache.

    Long answers are met more often, each as likely at any of its tokens.
    """
    if count == 0:
        return []
    rng = np.random.default_rng((99_991, draw))
    weights = np.maximum(sample.outputs - 1, 0.0)
    if weights.sum() <= 0:
        return []
    chosen = rng.choice(len(weights), count, p=weights / weights.sum())
    found = []
    for index, place in enumerate(chosen):
        answer = int(sample.outputs[place])
        done = int(rng.integers(1, answer))
        tokens = int(sample.inputs[place]) + done
        load = LoadRequest(
            f"under way {index}", 0.0, (_STARTING_TOKEN + index,) * tokens, answer - done
        )
        found.append((load, tokens - 1))
    return found
