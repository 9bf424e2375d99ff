"""A cost model of which everything is known, and loads for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.predict.cost_model import CostDraw
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape


@dataclass(frozen=True)
class FakeCost:
    """Seconds of a step: a base, and more for each row and for each token that decodes see."""

    base: float = 0.01
    row: float = 0.0
    seen: float = 0.0
    lines: bool = True

    def decode_line(self, sequences: int) -> DecodeLine | None:
        if not self.lines:
            return None
        base = self.base + self.row * sequences
        return DecodeLine((0.0, 1e6), (base, base + 1e6 * self.seen))

    def device_seconds(self, work: StepWork) -> float:
        return self.base + self.row * work.rows + self.seen * work.decode_kv_tokens

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


@dataclass(frozen=True)
class FakeModel:
    """Of its draws each is slower than the one before, from `1 - spread` to `1 + spread`."""

    cost: FakeCost = FakeCost()
    spread: float = 0.2
    blocks: int | None = 1000
    max_model_len: int = 4096

    def middle(self, config: EngineConfig) -> CostDraw:
        return CostDraw(self.cost)

    def draws(self, config: EngineConfig, count: int, seed: int) -> Sequence[CostDraw]:
        rng = random.Random(seed)
        factors = [1 + self.spread * rng.uniform(-1, 1) for _ in range(count)]
        return [
            CostDraw(FakeCost(f * self.cost.base, f * self.cost.row, f * self.cost.seen))
            for f in factors
        ]

    def cache(self, config: EngineConfig) -> CacheShape | None:
        return None if self.blocks is None else CacheShape(self.blocks, self.max_model_len)


def config(**knobs: object) -> EngineConfig:
    """Knobs for a model that is never loaded."""
    return EngineConfig.from_mapping({"model": "none", "device": "cpu", **knobs})


def load(
    count: int,
    rate: float,
    seed: int,
    *,
    prompt: tuple[int, int] = (1, 60),
    output: tuple[int, int] = (1, 40),
    prefixes: int = 0,
    prefix_tokens: int = 64,
) -> list[LoadRequest]:
    """Poisson arrivals; with `prefixes` each prompt begins with one of so many."""
    rng = random.Random(seed)
    heads = [
        tuple(rng.randrange(1000) for _ in range(prefix_tokens)) for _ in range(max(1, prefixes))
    ]
    now, requests = 0.0, []
    for place in range(count):
        now += rng.expovariate(rate)
        head = rng.choice(heads) if prefixes else ()
        ids = tuple(rng.randrange(1000) for _ in range(rng.randint(*prompt)))
        requests.append(LoadRequest(f"r{place}", now, head + ids, rng.randint(*output)))
    return requests
