"""Situations that call for each technique, and a predictor that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotune.advise.facts import Facts
from autotune.diagnose.finding import Diagnosis, Finding
from autotune.predict.change import Change
from autotune.predict.gain import Basis, PredictedGain
from autotune.profiling.schema import (
    Ceilings,
    Communication,
    Gpu,
    Host,
    KvCache,
    ModelFacts,
    Phase,
    Profile,
    Queueing,
    Source,
    Speculation,
    Spread,
    Traffic,
)
from autotune.search.methods_offered import offer_for
from autotune.slo import Slo, parse_slo
from engine.config import EngineConfig

NO_CHANGE = Change()
GIB = 2**30


def cpu(*features: str, memory: int = 64 * GIB) -> dict[str, Any]:
    return {
        "device": "cpu",
        "cores": 8,
        "memory_bytes": memory,
        "cpu": {"features": list(features)},
        "memory": {"available_bytes": 32 * GIB},
        "gpus": [],
        "gpu_kernels": None,
    }


def gpu(
    capability: str, count: int = 1, *, kernels: bool = True, memory: int = 80 * GIB
) -> dict[str, Any]:
    return {
        "device": "cuda",
        "cores": 8,
        "memory_bytes": memory,
        "cpu": {"features": []},
        "memory": {"available_bytes": 32 * GIB},
        "gpus": [{"compute_capability": capability, "name": "GPU"}] * count,
        "gpu_kernels": {"available": kernels},
    }


AMX = cpu("avx2", "avx512_vnni", "amx_bf16", "amx_int8")
AVX2 = cpu("avx2")
AMPERE, ADA, HOPPER, BLACKWELL = gpu("8.0"), gpu("8.9"), gpu("9.0"), gpu("10.0")
NO_TRITON = gpu("8.0", kernels=False)
TURING = gpu("7.5")


def spread(mean: float, tail: float = 4.0) -> Spread:
    return Spread(mean=mean, p50=mean * 0.8, p95=mean * tail / 2, p99=mean * tail, max=mean * tail)


def model(**changes: Any) -> ModelFacts:
    facts: dict[str, Any] = {
        "name": "m",
        "parameters": 8_000_000_000,
        "matmul_parameters": 7_000_000_000,
        "head_parameters": 500_000_000,
        "weight_bytes": 15_000_000_000,
        "resident_bytes": 16_000_000_000,
        "kv_bytes_per_token": 500_000.0,
        "attention_features": 131_072,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "hidden_size": 4096,
        "vocab_size": 32000,
        "max_model_len": 32768,
        "weight_bits": 16,
        "dtype": "bfloat16",
    }
    return ModelFacts(**{**facts, **changes})


def phase(name: str, **changes: Any) -> Phase:
    values: dict[str, Any] = {
        "name": name,
        "steps": 100,
        "seconds": 10.0,
        "share": 0.5,
        "device_seconds": 9.0,
        "host_seconds": 1.0,
        "tokens": 1000,
        "sampled": 1000,
        "mean_batch": 8.0,
        "step_p50": 0.1,
        "step_p95": 0.2,
    }
    return Phase(**{**values, **changes})


def profile(hardware: Mapping[str, Any] | None = AMX, **changes: Any) -> Profile:
    """One in which everything that a table's condition may ask is known and called for."""
    device = (hardware or {}).get("device", "cpu")
    knobs = changes.pop("knobs", {})
    values: dict[str, Any] = {
        "created_at": "2026-01-01T00:00:00+00:00",
        "source": Source(kind="run"),
        "engine_config": EngineConfig(model="m", device=device).replace(**knobs).to_dict(),
        "hardware": None if hardware is None else dict(hardware),
        "model": model(),
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
            duration_s=60.0,
            rate=2.0,
            input_tokens=Spread(mean=20000, p50=5000, p95=40000, p99=60000, max=60000),
            output_tokens=spread(200),
            arrival_cv=2.0,
            dispersion=3.0,
            prompt_output_ratio=100.0,
        ),
        "metrics": {
            "ttft": {"p95": 1.0},
            "tpot": {"p95": 0.1},
            "completed": 100,
            "requests_per_s": 2.0,
        },
        "phases": [phase("prefill"), phase("decode"), phase("mixed")],
        "kv": KvCache(
            blocks_total=1000,
            block_size=16,
            total_bytes=4 * GIB,
            occupancy_mean=0.8,
            occupancy_peak=1.0,
            fragmentation=0.4,
            preemptions=5,
            hit_rate=0.0,
            attainable_hit_rate=0.4,
            seats=6.0,
        ),
        "queueing": Queueing(
            busy_share=0.3,
            utilisation=1.1,
            wait_share=0.5,
            queue_max=20,
            running_max=32,
            running_mean=16.0,
            at_seat_limit_share=0.5,
            at_token_budget_share=0.5,
        ),
        "host": Host(share=0.3, decode_share=0.3, per_step_s=0.01, scheduler_share=0.01),
        "communication": Communication(ranks=1, share=0.0, imbalance=0.5),
        "speculation": Speculation(
            num_requests=100,
            min_ngram=2,
            max_ngram=4,
            tokens_per_step={1: 1.4, 3: 1.9, 8: 2.2},
            hit_share=0.5,
        ),
        "gpu": Gpu(samples=[], interval_s=0.1, clock_ratio=0.7),
    }
    return Profile(**{**values, **changes})


def finding(metric: str, bottleneck: str, severity: float = 0.5) -> Finding:
    return Finding(metric, bottleneck, severity, severity, {}, f"It is {bottleneck}.")  # type: ignore[arg-type]


def diagnosis(*findings: Finding, binding: str | None = "tpot") -> Diagnosis:
    return Diagnosis(tuple(findings), binding=binding)  # type: ignore[arg-type]


def facts(of: Profile, found: Diagnosis | None = None, slo: str = "ttft<200ms") -> Facts:
    hardware = of.hardware
    offer = None if hardware is None else offer_for(hardware, quantized=False)
    return Facts(of, found or diagnosis(), Slo() if not slo else parse_slo(slo), offer)


class Told:
    """Predicts what a function says of a change: a gain of each metric, or of the metrics named."""

    def __init__(
        self,
        gain: Callable[[Change], float | Mapping[str, float] | None] = lambda _: 1.5,
        basis: Basis = "replay",
    ) -> None:
        self.gain = gain
        self.basis: Basis = basis
        self.asked: list[Change] = []

    def gains(self, change: Change) -> tuple[PredictedGain, ...]:
        self.asked.append(change)
        found = self.gain(change)
        if found is None:
            return ()
        metrics = ("ttft", "tpot", "throughput", "cost")
        values = found if isinstance(found, Mapping) else dict.fromkeys(metrics, found)
        return tuple(
            PredictedGain(m, v, v * 0.95, v * 1.05, self.basis, "p95") for m, v in values.items()
        )

    def metrics(
        self, change: Change = NO_CHANGE, rate_factor: float | None = 1.0
    ) -> dict[str, Any] | None:
        return None
