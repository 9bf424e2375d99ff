"""A model whose steps cost what a line says, so that tests know the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune.planning.planned_traffic import LengthSample
from autotune.predict.cost_model import CostDraw
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from engine.config import EngineConfig
from engine.engine import CacheShape


@dataclass(frozen=True)
class LinearCost:
    """Seconds of a step: `base` and so much a row and a cached token of decodes."""

    base: float = 0.01
    row: float = 0.0
    kv_token: float = 0.0

    def device_seconds(self, work: StepWork) -> float:
        return self.base + self.row * work.rows + self.kv_token * work.decode_kv_tokens

    def host_seconds(self, work: StepWork) -> float:
        return 0.0

    def decode_line(self, sequences: int) -> DecodeLine:
        seconds = self.base + self.row * sequences
        return DecodeLine((0.0, 1e6), (seconds, seconds + 1e6 * self.kv_token))


@dataclass(frozen=True)
class LinearModel:
    """Draws lie `spread` apart in the logarithm, evenly."""

    cost: LinearCost
    spread: float = 0.1

    def middle(self, config: EngineConfig) -> CostDraw:
        return CostDraw(self.cost)

    def draws(self, config: EngineConfig, count: int, seed: int) -> Sequence[CostDraw]:
        factors = np.exp(self.spread * np.linspace(-1.6, 1.6, count))
        return [
            CostDraw(LinearCost(*(float(f) * v for v in (c.base, c.row, c.kv_token))))
            for f in factors
            for c in (self.cost,)
        ]

    def cache(self, config: EngineConfig) -> CacheShape | None:
        return CacheShape(100_000, 8192)


def even_sample(inputs: int, outputs: int, count: int = 256) -> LengthSample:
    """Requests that are all alike."""
    prompts = np.full(count, float(inputs))
    return LengthSample(prompts, prompts.copy(), np.full(count, float(outputs)))
