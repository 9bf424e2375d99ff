"""Profiles of loads that were played in virtual time, so that the truth is known."""

from __future__ import annotations

import random
from typing import Any

from autotune.metrics import compute_metrics
from autotune.model_info import with_default_model
from autotune.predict.fit import probed_cost
from autotune.predict.replay import Replayed, replay
from autotune.predict.step_cost import StepCost
from autotune.profiling.evidence import LoadEvidence, prompts_of
from autotune.profiling.model_facts import model_facts
from autotune.profiling.schema import (
    AttentionProbe,
    KvCache,
    LinearProbe,
    Probes,
    Profile,
    Source,
    StepFit,
    Traffic,
)
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

ROWS = [1, 8, 64, 512, 2048]


def probes() -> Probes:
    """int8 takes half of the time to read and two thirds to multiply; its cache is read faster."""

    def linear(method: str, read: float, row: float) -> LinearProbe:
        layers = [max(read, row * rows) for rows in ROWS]
        return LinearProbe(
            method=method, rows=ROWS, layers_s=layers, head_s=[s / 10 for s in layers]
        )

    def attention(dtype: str, token: float) -> AttentionProbe:
        points = [(s, c) for s in (1, 16, 256) for c in (16, 256, 2048)]
        return AttentionProbe(
            kv_cache_dtype=dtype,
            sequences=[s for s, _ in points],
            contexts=[c for _, c in points],
            seconds=[1e-4 + token * s * c for s, c in points],
        )

    return Probes(
        linears=[linear("none", 4e-3, 6e-5), linear("int8", 2e-3, 4e-5)],
        attention=[attention("auto", 2e-7), attention("int8", 1e-7)],
    )


def cost(config: EngineConfig) -> StepCost:
    return probed_cost(probes(), config.quantization, config.kv_cache_dtype)


def requests(
    count: int, rate: float | None, *, shared: int = 0, prompt: int = 100, output: int = 60
) -> list[LoadRequest]:
    rng = random.Random(3)
    stem = tuple(rng.randrange(3, 4000) for _ in range(shared))
    now, made = 0.0, []
    for index in range(count):
        own = tuple(rng.randrange(3, 4000) for _ in range(rng.randint(8, 2 * prompt)))
        made.append(LoadRequest(f"{index:03d}", now, stem + own, rng.randint(4, 2 * output)))
        now += rng.expovariate(rate) if rate else 0.0
    return made


def play(
    config: EngineConfig, load: list[LoadRequest], blocks: int, scale: float = 1.0
) -> Replayed:
    """What a load measures where steps take `scale` times what the probes say."""
    from autotune.predict.pace import Pace

    longest = model_facts(config).max_model_len
    return replay(
        load,
        config,
        cost(config),
        CacheShape(blocks, longest),
        drain_limit=60.0,
        pace=Pace(mean=scale),
        keep_steps=True,
    )


def metrics_of(played: Replayed, config: EngineConfig) -> dict[str, Any]:
    return compute_metrics(
        played.records,
        None,
        duration=played.duration,
        config=config,
        load_delivered=True,
        load_note=None,
        steps=played.steps,
        resamples=0,
    )


def profiled(
    load: list[LoadRequest], *, blocks: int = 4096, scale: float = 1.0, **knobs: Any
) -> tuple[Profile, LoadEvidence]:
    """A profile of a played load, and its evidence."""
    config = with_default_model(EngineConfig(device="cpu", **knobs))
    played = play(config, load, blocks, scale)
    facts = model_facts(config)
    count = len(load)
    profile = Profile(
        created_at="2026-01-01T00:00:00+00:00",
        source=Source(kind="run"),
        engine_config=config.to_dict(),
        hardware={"device": "cpu"},
        model=facts,
        traffic=Traffic(
            requests=count,
            completed=count,
            refused=0,
            failed=0,
            timed_out=0,
            duration_s=played.duration,
            rate=None,
            input_tokens=None,
            output_tokens=None,
        ),
        metrics=metrics_of(played, config),
        kv=KvCache(
            blocks_total=blocks,
            block_size=config.block_size,
            total_bytes=blocks * config.block_size * facts.kv_bytes_per_token,
            occupancy_peak=0.5,
        ),
        probes=probes(),
        step_fit=StepFit(coefficients={}, median_error=0.02, p90_error=0.05, steps=100),
    )
    return profile, LoadEvidence(played.records, played.steps, prompts_of(load))
