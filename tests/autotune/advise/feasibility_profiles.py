"""A profile whose bounds can be worked out by hand, and a predictor that knows the answer.

A model of a billion parameters in bf16 on a device of 100 GB/s and 10 TFLOP/s: a pass over its
weights takes 20 ms, a token of a prompt 0.2 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotune.advise.advice import Advice, Effort
from autotune.predict.change import Change
from autotune.predict.gain import Basis, PredictedGain
from autotune.profiling.schema import (
    Ceilings,
    KvCache,
    ModelFacts,
    Profile,
    Source,
    Spread,
    Traffic,
)

NO_CHANGE = Change()
HARDWARE: dict[str, Any] = {"device": "cpu", "cpu": {"features": []}, "gpus": []}
CONFIG: dict[str, Any] = {"quantization": "none", "kv_cache_dtype": "auto"}


def spread(value: float, p95: float | None = None, p99: float | None = None) -> Spread:
    p95 = value if p95 is None else p95
    p99 = p95 if p99 is None else p99
    return Spread(mean=value, p50=value, p95=p95, p99=p99, max=p99)


def model(**changes: Any) -> ModelFacts:
    facts: dict[str, Any] = {
        "name": "m",
        "parameters": 1_000_000_000,
        "matmul_parameters": 1_000_000_000,
        "head_parameters": 0,
        "weight_bytes": 2_000_000_000,
        "resident_bytes": 2_000_000_000,
        "kv_bytes_per_token": 100_000.0,
        "attention_features": 0,
        "num_layers": 10,
        "num_heads": 10,
        "num_kv_heads": 10,
        "head_dim": 10,
        "hidden_size": 100,
        "vocab_size": 100,
        "max_model_len": 4096,
        "weight_bits": 16,
        "dtype": "bfloat16",
    }
    return ModelFacts(**{**facts, **changes})


def ceilings(**changes: Any) -> Ceilings:
    known: dict[str, Any] = {
        "bandwidth": 100e9,
        "working_set_bandwidth": 100e9,
        "matmul": {"bfloat16": 10e12, "int8": 20e12},
        "compute_dtype": "bfloat16",
        "ridge": 100.0,
    }
    return Ceilings(**{**known, **changes})


def profile(
    measured: dict[str, float | None] | None = None,
    *,
    inputs: Spread | None = None,
    outputs: Spread | None = None,
    rate: float | None = 1.0,
    hits: float | None = 0.0,
    **changes: Any,
) -> Profile:
    """`measured` are p95 latencies by metric, or metrics of `bench`; without them nothing was."""
    metrics: dict[str, Any] | None = None
    if measured is not None:
        metrics = {"completed": 100, "failed": 0, "refused": 0, "timed_out": 0}
        for name, value in measured.items():
            latency = name in ("ttft", "tpot", "itl", "e2e")
            metrics[name] = {"p95": value, "mean": value, "p50": value} if latency else value
    inputs = spread(1000) if inputs is None else inputs
    outputs = spread(100) if outputs is None else outputs
    parts: dict[str, Any] = {
        "created_at": "2026-01-01T00:00:00+00:00",
        "source": Source(kind="run"),
        "engine_config": CONFIG,
        "hardware": HARDWARE,
        "model": model(),
        "ceilings": ceilings(),
        "metrics": metrics,
        "kv": KvCache(attainable_hit_rate=hits),
        "traffic": Traffic(
            requests=100,
            completed=100,
            refused=0,
            failed=0,
            timed_out=0,
            duration_s=100.0,
            rate=rate,
            input_tokens=inputs,
            output_tokens=outputs,
            prompt_output_ratio=inputs.mean / outputs.mean,
        ),
    }
    return Profile(**{**parts, **changes})


class Oracle:
    """A predictor of p95 latencies by a formula of (knobs, load, length of prompts)."""

    basis: Basis = "replay"

    def __init__(self, ttft: Callable[[dict[str, Any], float, float], float | None]) -> None:
        self.ttft = ttft
        self.asked = 0

    def metrics(
        self, change: Change = NO_CHANGE, rate_factor: float | None = 1.0
    ) -> dict[str, Any] | None:
        self.asked += 1
        factor = change.factors.get("input_tokens")
        value = self.ttft(dict(change.knobs), rate_factor or 1.0, factor.value if factor else 1.0)
        if value is None:
            return None
        return {"completed": 100, "ttft": {"p95": value}, "output_tokens_per_s": 1.0}

    def gains(self, change: Change) -> tuple[PredictedGain, ...]:
        return ()


def advice(
    technique: str,
    gain: float,
    *,
    metric: str = "ttft",
    knobs: dict[str, Any] | None = None,
    effort: Effort = "knob",
) -> Advice:
    """Testable where it has knobs; its gain lies within a tenth."""
    statistic = "p95" if metric in ("ttft", "tpot", "e2e") else None
    predicted = PredictedGain(metric, gain, 0.9 * gain, 1.1 * gain, "replay", statistic)
    return Advice(
        technique=technique,
        title=f"Use {technique}",
        category="model",
        problems=(),
        role="primary",
        knobs=knobs or {},
        opens={},
        gain=predicted,
        gains=(predicted,),
        confidence="high",
        effort=effort,
        trade_off="",
        check="",
        why="",
        testable=bool(knobs),
    )
