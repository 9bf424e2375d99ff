"""Traffic that brings one bottleneck each, scaled to whatever model serves it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.workload.materialise import LoadRequest


@dataclass(frozen=True, slots=True)
class Situation:
    """Traffic and the default configuration that meets it.

    Lengths are drawn evenly from their ranges, in tokens. `load` is the share of the rate that the
    default sustains; None offers everything at once. `shared` tokens begin every prompt.
    `cache_sequences` sizes the KV cache for so many mean requests.
    """

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    load: float | None
    shared: int = 0
    cache_sequences: float | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    slo: str = "ttft<200ms,tpot<100ms"

    @property
    def mean_tokens(self) -> float:
        """Tokens of a mean request."""
        return self.shared + sum(self.inputs) / 2 + sum(self.outputs) / 2

    def requests(self, count: int, rate: float | None, vocab_size: int, seed: int) -> Any:
        """So many requests with Poisson arrivals at `rate` requests per second, or all at once."""
        rng = random.Random(f"{self.name} {seed}")
        stem = tuple(rng.randrange(3, vocab_size) for _ in range(self.shared))
        now, made = 0.0, []
        for index in range(count):
            prompt = tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(*self.inputs)))
            made.append(LoadRequest(f"{index:05d}", now, stem + prompt, rng.randint(*self.outputs)))
            now += rng.expovariate(rate) if rate else 0.0
        return made


SITUATIONS = (
    Situation("decodes at low load", (16, 64), (64, 160), 0.3, slo="tpot<2ms"),
    Situation("decodes at high load", (16, 64), (64, 160), 0.75, slo="tpot<5ms"),
    Situation("long prompts", (300, 900), (4, 24), 0.6, slo="ttft<50ms"),
    Situation("everything at once", (32, 160), (32, 96), None, slo="throughput>100000tok/s"),
    Situation(
        "shared prefixes",
        (8, 48),
        (8, 48),
        0.6,
        shared=384,
        knobs={"enable_prefix_caching": False},
        slo="ttft<30ms",
    ),
    Situation("a small cache", (64, 256), (64, 192), 0.7, cache_sequences=5, slo="ttft<50ms"),
    Situation("many short ones", (8, 32), (4, 16), 0.75, slo="ttft<20ms"),
    Situation("few seats", (32, 128), (32, 128), 0.7, knobs={"max_num_seqs": 4}, slo="ttft<30ms"),
    Situation(
        "prompts among decodes",
        (16, 1200),
        (48, 128),
        0.6,
        slo="p95(itl)<10ms,tpot<4ms",
    ),
    Situation(
        "static batches",
        (32, 128),
        (8, 128),
        0.5,
        knobs={"batching_mode": "static", "max_num_seqs": 8},
        slo="ttft<50ms",
    ),
)
