"""Plans for tests, written by hand: an 8B model on four GPUs, one of which misses the promise."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

GIB = 2**30
PARAMETERS = 8_030_261_248
BYTES_OF_WEIGHT = {"none": 2.0, "fp8": 1.07, "int4": 0.66}
MEMORY = {
    "h100-sxm": 80 * GIB,
    "h200-sxm": 141 * GIB,
    "l40s": 48 * GIB,
    "a100-sxm-80gb": 80 * GIB,
    "t4": 16 * GIB,
}
PRICE = {"h100-sxm": 2.49, "h200-sxm": 3.59, "l40s": 0.86, "a100-sxm-80gb": 1.79, "t4": 0.35}
WATTS = {"h100-sxm": 700, "h200-sxm": 700, "l40s": 350, "a100-sxm-80gb": 400, "t4": 70}
TITLES = {
    "h100-sxm": "NVIDIA H100 SXM 80 GB",
    "h200-sxm": "NVIDIA H200 SXM 141 GB",
    "l40s": "NVIDIA L40S 48 GB",
    "a100-sxm-80gb": "NVIDIA A100 SXM 80 GB",
    "t4": "NVIDIA T4 16 GB",
}
KV_BYTES = 131_072


def interval(value: float, spread: float = 0.12) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def latencies(p95: float, spread: float) -> dict[str, Any]:
    factors = {"mean": 0.55, "p50": 0.5, "p90": 0.85, "p95": 1.0, "p99": 1.4}
    return {name: interval(p95 * factor, spread) for name, factor in factors.items()}


def option(
    gpu: str,
    quantization: str,
    replicas: int,
    ttft: float,
    tpot: float,
    chance: float,
    *,
    size: int = 1,
    seats: int = 128,
    bound: str = "bandwidth",
    **changes: Any,
) -> dict[str, Any]:
    gpus = replicas * size
    weights = int(PARAMETERS * BYTES_OF_WEIGHT[quantization] / size)
    total = MEMORY[gpu]
    parts = {
        "weights": weights,
        "activations": 1_300_000_000,
        "graphs": 340_000_000,
        "libraries": 805_306_368 + (GIB // 2 if size > 1 else 0),
        "reserved": total // 10,
    }
    cache = total - sum(parts.values())
    tokens = cache // (KV_BYTES // size)
    hourly = gpus * PRICE[gpu]
    rate = 50 * 210
    made = {
        "gpu": gpu,
        "tensor_parallel_size": size,
        "quantization": quantization,
        "kv_cache_dtype": "auto",
        "max_num_seqs": seats,
        "max_num_batched_tokens": 2048,
        "fits": True,
        "replicas": replicas,
        "replicas_needed": replicas - 1,
        "spare_replicas": 1,
        "gpus": gpus,
        "output_tokens_per_s": interval(rate, 0.02),
        "ttft": latencies(ttft, 0.3),
        "tpot": latencies(tpot, 0.14),
        "e2e": latencies(ttft + 210 * tpot, 0.15),
        "p_meets_slo": chance,
        "method": "simulated",
        "feasible": chance >= 0.9,
        "usd_per_hour": hourly,
        "intervals": {"usd_per_hour": {"value": hourly, "low": hourly * 0.8, "high": hourly * 1.5}},
        "usd_per_million_tokens": hourly / (rate * 3600) * 1e6,
        "watts": gpus * WATTS[gpu],
        "binding_constraint": bound,
        "binding": {
            "text": "tpot<50ms is missed first; 10% more of memory bandwidth would carry 7% more"
        },
        "normal": {"ttft": latencies(ttft * 0.6, 0.2), "tpot": latencies(tpot * 0.8, 0.1)},
        "utilization": 0.68,
        "outgrown": {"rate": 50 * 2 ** (replicas / 12), "months": replicas / 2},
        "memory": {
            "parts": {**parts, "kv_cache": cache},
            "total_bytes": total,
            "kv_tokens": tokens,
            "kv_bytes_per_token": KV_BYTES,
            "kv_tokens_needed": min(tokens, 130_000),
            "shortfall_bytes": 0,
        },
    }
    return {**made, **changes}


def unfit(gpu: str, missing: int) -> dict[str, Any]:
    made = option(gpu, "none", 0, 1.0, 1.0, 0.0, bound="weights")
    parts = made["memory"]["parts"]
    parts["kv_cache"] = 0
    made["memory"] |= {"shortfall_bytes": missing, "kv_tokens": 0}
    for key in (
        "ttft",
        "tpot",
        "e2e",
        "p_meets_slo",
        "usd_per_hour",
        "intervals",
        "usd_per_million_tokens",
    ):
        made[key] = None
    return {**made, "fits": False, "method": "arithmetic", "normal": None, "replicas": 0, "gpus": 0}


OPTIONS = [
    option("l40s", "fp8", 9, 0.31, 0.041, 0.94, seats=48),
    option("h100-sxm", "fp8", 4, 0.22, 0.027, 1.0, seats=128),
    option("a100-sxm-80gb", "none", 6, 0.35, 0.038, 0.92, seats=96),
    option("h100-sxm", "none", 5, 0.25, 0.031, 1.0, seats=96),
    option("h200-sxm", "fp8", 4, 0.2, 0.023, 1.0, seats=256, bound="compute"),
    option("h100-sxm", "fp8", 4, 0.16, 0.019, 1.0, size=2, seats=128, bound="latency_floor"),
    option("l40s", "fp8", 7, 0.46, 0.049, 0.44, seats=64),
    option("l40s", "none", 12, 0.62, 0.06, 0.02, seats=32, bound="kv"),
    unfit("t4", 5 * GIB),
]
SHEET = {
    "title": "vendor's data sheet",
    "where": "example.com/sheet.pdf",
    "date": "2025-11-10",
    "basis": "read",
}
CATALOGUE = {
    name: {
        "name": name,
        "title": TITLES[name],
        "generation": "any",
        "memory_bytes": MEMORY[name],
        "bandwidth_bytes_per_s": 3.35e12,
        "operations_per_s": {"bf16": 9.89e14, "fp8": 1.979e15},
        "link": {"name": "NVLink 4", "bytes_per_s": 4.5e11, "gpus": 8},
        "tdp_watts": WATTS[name],
        "sources": dict.fromkeys(("memory", "bandwidth", "rates", "link", "power"), SHEET),
        "notes": [],
        "price": {
            "usd_per_hour": PRICE[name],
            "low": PRICE[name] * 0.8,
            "high": PRICE[name] * 1.5,
            "where": "public price lists of five clouds",
            "date": "2026-03-01",
        },
        "efficiency": {
            "bandwidth": interval(0.82, 0.1),
            "step_overhead": interval(3e-4, 0.5),
        },
        "efficiency_basis": {"basis": "published kernel measurements", "date": "2026-02-20"},
    }
    for name in MEMORY
}
MONTHS = (0, 3, 6, 12, 18, 24, 36)


def growth(*indices: int) -> list[dict[str, Any]]:
    """Twice the rate every six months, and what keeping up takes."""
    rows = []
    for month in MONTHS:
        told = []
        for index in indices:
            made = OPTIONS[index]
            replicas = math.ceil(made["replicas_needed"] * 2 ** (month / 6)) + 1
            usd = replicas * made["tensor_parallel_size"] * PRICE[made["gpu"]] * 730
            told.append({"index": index, "replicas": replicas, "usd_per_month": usd})
        rows.append({"month": month, "rate": 50 * 2 ** (month / 6), "options": told})
    return rows


def sensitivity(*indices: int) -> list[dict[str, Any]]:
    """Other rates, lengths and prices."""
    rows = []
    for change, kind, factor in (
        ("rate x 0.5", "rate", 0.5),
        ("rate x 1.5", "rate", 1.5),
        ("rate x 2", "rate", 2.0),
        ("prompts x 1.5", "lengths", 1.2),
        ("answers x 1.5", "lengths", 1.45),
        ("answers x 0.5", "lengths", 0.55),
    ):
        told = []
        for place, index in enumerate(indices):
            made = OPTIONS[index]
            # The first option suffers most from more load, so that another overtakes it.
            hurt = factor if place else factor**1.6
            replicas = math.ceil(made["replicas_needed"] * hurt) + 1
            usd = replicas * made["tensor_parallel_size"] * PRICE[made["gpu"]]
            told.append({"index": index, "replicas": replicas, "usd_per_hour": usd})
        rows.append({"change": change, "kind": kind, "factor": factor, "options": told})
    return rows


def plan_json(**changes: Any) -> dict[str, Any]:
    """A whole plan; `changes` replace entries at its top."""
    plan: dict[str, Any] = {
        "schema_version": 1,
        "created_at": "2026-03-04T10:20:30+00:00",
        "command": ["/opt/bin/autotune", "plan", "--rate", "50", "--slo", "ttft<500ms,tpot<50ms"],
        "versions": {"autotune": "0.1.0"},
        "seconds": 6.4,
        "request": {
            "model": {
                "name": "llama-3-8b",
                "architecture": "LlamaForCausalLM",
                "parameters": PARAMETERS,
                "layers": 32,
            },
            "gpus": list(MEMORY),
            "rate": 50.0,
            "slo": "ttft<500ms,tpot<50ms",
            "probability": 0.9,
            "headroom": 0.25,
            "spares": 1,
            "growth": {"factor": 2.0, "months": 6.0},
            "objective": "cost",
            "draws": 16,
            "seed": 0,
            "prices": {"l40s": 0.86},
            "workload": {
                "source": "preset chat",
                "requests": 400,
                "input_tokens": {"mean": 512.0, "p50": 380.0, "p95": 1500.0, "max": 4096.0},
                "output_tokens": {"mean": 210.0, "p50": 180.0, "p95": 520.0, "max": 1024.0},
            },
        },
        "options": OPTIONS,
        "frontier": [0, 1, 4, 5],
        "growth": growth(0, 1, 2, 4),
        "sensitivity": sensitivity(0, 1, 2, 4),
        "catalogue": CATALOGUE,
        "assumptions": ["Requests arrive as a Poisson process."],
        "not_simulated": [
            {"what": "int8 on every GPU", "why": "as fast as fp8 by the arithmetic"},
            "More than 8 GPUs a replica: no link joins them.",
        ],
        "notes": ["Prices are examples of March 2026."],
    }
    return copy.deepcopy({**plan, **changes})


def write_plan(path: Path, plan: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return path
