"""Profiles made by hand: one without any fault, and what a test changes of it."""

from __future__ import annotations

from typing import Any

from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.finding import Diagnosis, Finding
from autotune.profiling.schema import (
    Breakdown,
    Ceilings,
    Host,
    KvCache,
    ModelFacts,
    Phase,
    PhaseName,
    Profile,
    Queueing,
    Source,
    Spread,
    Traffic,
)


def spread(mean: float, most: float | None = None) -> Spread:
    return Spread(mean=mean, p50=mean, p95=mean, p99=mean, max=most or mean)


def metrics(ttft: float = 0.02, tpot: float = 0.01) -> dict[str, Any]:
    """What `bench` would say, as far as limits need it; seconds."""
    return {
        name: {"mean": value, "p50": value, "p90": value, "p95": value, "p99": value}
        for name, value in (("ttft", ttft), ("tpot", tpot), ("itl", tpot), ("e2e", 1.0))
    } | {
        "output_tokens_per_s": 100.0,
        "completed": 100,
        "failed": 0,
        "refused": 0,
        "timed_out": 0,
        "slo_attainment": 1.0,
        "error_rate": 0.0,
    }


def phase(name: PhaseName, *, intensity: float = 1.0, **changed: Any) -> Phase:
    values: dict[str, Any] = {
        "name": name,
        "steps": 200,
        "seconds": 2.0,
        "share": 0.4,
        "device_seconds": 1.9,
        "host_seconds": 0.1,
        "tokens": 2000,
        "sampled": 200,
        "mean_batch": 4.0,
        "step_p50": 0.01,
        "step_p95": 0.02,
        "intensity": intensity,
        "mfu": 0.3,
        "mbu": 0.6,
        "weight_bytes": 3e9,
        "kv_bytes": 1e9,
    }
    return Phase(**(values | changed))


def parts(**shares: float) -> dict[str, float]:
    """Shares that sum to 1; what is left is not explained."""
    return {**shares, "other": 1.0 - sum(shares.values())}


def breakdowns(
    ttft: dict[str, float] | None = None,
    tpot: dict[str, float] | None = None,
    throughput: dict[str, float] | None = None,
) -> list[Breakdown]:
    return [
        Breakdown(
            metric="ttft",
            seconds=0.02,
            parts=ttft or parts(prefill_linear=0.8, host=0.04, queue=0.04, interference=0.04),
        ),
        Breakdown(
            metric="tpot",
            seconds=0.01,
            parts=tpot or parts(weights=0.8, kv_reads=0.1, host=0.04, interference=0.04),
        ),
        Breakdown(
            metric="throughput",
            seconds=10.0,
            parts=throughput or parts(idle=0.5, weights=0.3, prefill_linear=0.15, host=0.02),
        ),
    ]


MODEL = ModelFacts(
    name="m",
    parameters=10**9,
    matmul_parameters=9 * 10**8,
    head_parameters=10**8,
    weight_bytes=2 * 10**9,
    resident_bytes=2 * 10**9,
    kv_bytes_per_token=1e5,
    attention_features=10**5,
    num_layers=16,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    hidden_size=1024,
    vocab_size=32000,
    max_model_len=4096,
    weight_bits=16,
    dtype="bfloat16",
)


def profile(**changed: Any) -> Profile:
    """A server that is in use half of the time and does nothing but work."""
    values: dict[str, Any] = {
        "created_at": "2026-01-01T00:00:00+00:00",
        "source": Source(kind="run"),
        "engine_config": {"max_num_seqs": 256, "batching_mode": "continuous"},
        "hardware": {"device": "cpu", "memory_bytes": 64 * 2**30},
        "model": MODEL,
        "ceilings": Ceilings(
            bandwidth=1e11,
            working_set_bandwidth=1e11,
            matmul={"bfloat16": 1e13},
            compute_dtype="bfloat16",
            ridge=100.0,
        ),
        "traffic": Traffic(
            requests=100,
            completed=100,
            refused=0,
            failed=0,
            timed_out=0,
            duration_s=10.0,
            rate=10.0,
            input_tokens=spread(100.0, 400.0),
            output_tokens=spread(50.0, 100.0),
            arrival_cv=1.0,
            dispersion=1.0,
            dispersion_window_s=1.0,
            top_output_share=0.3,
            prompt_output_ratio=2.0,
        ),
        "metrics": metrics(),
        "phases": [
            phase("prefill", intensity=300.0),
            phase("decode", intensity=5.0),
            phase("mixed", intensity=50.0, step_p50=0.03),
        ],
        "kv": KvCache(
            blocks_total=1000,
            block_size=16,
            total_bytes=1.6e9,
            occupancy_mean=0.1,
            occupancy_peak=0.2,
            preemptions=0,
            preempted_share=0.0,
            recomputed_share=0.0,
            blocked_share=0.0,
            refused_for_size=0,
            hit_rate=0.0,
            attainable_hit_rate=0.0,
            seats=100.0,
        ),
        "queueing": Queueing(
            busy_share=0.5,
            utilisation=0.5,
            wait=spread(0.001),
            wait_share=0.04,
            queue_mean=0.0,
            queue_max=1,
            running_mean=4.0,
            running_max=10,
            at_seat_limit_share=0.0,
            at_token_budget_share=0.0,
            barrier_share=0.0,
            growth_per_s=0.0,
            stable=True,
        ),
        "host": Host(share=0.04, decode_share=0.04, per_step_s=0.0004, scheduler_share=0.01),
        "breakdowns": breakdowns(),
    }
    return Profile(**(values | changed))


def altered(part: Any, **changed: Any) -> Any:
    """A part of a profile with other values."""
    return part.model_copy(update=changed)


BASE = profile()


def first(diagnosis: Diagnosis, metric: str) -> Finding:
    return diagnosis.of(metric)[0]


def named(p: Profile, metric: str) -> list[str]:
    return [f.bottleneck for f in diagnose(p).of(metric)]


def queueing(**changed: Any) -> Any:
    return altered(BASE.queueing, **changed)


def kv(**changed: Any) -> Any:
    return altered(BASE.kv, **changed)


def traffic(**changed: Any) -> Any:
    return altered(BASE.traffic, **changed)


WAITING = breakdowns(ttft=parts(queue=0.8, prefill_linear=0.1, interference=0.05))
