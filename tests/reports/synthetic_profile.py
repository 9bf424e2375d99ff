"""A profile, its diagnosis and the advice on it, as files beside a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PHASES = [
    {
        "name": "prefill",
        "steps": 40,
        "seconds": 0.8,
        "share": 0.08,
        "device_seconds": 0.7,
        "host_seconds": 0.1,
        "tokens": 9000,
        "sampled": 40,
        "mean_batch": 1.2,
        "step_p50": 0.019,
        "step_p95": 0.05,
        "flops": 1.8e11,
        "weight_bytes": 8.0e8,
        "kv_bytes": 2.0e7,
        "intensity": 219.0,
        "mfu": 0.17,
        "mbu": 0.02,
        "bound": "compute",
    },
    {
        "name": "decode",
        "steps": 900,
        "seconds": 9.2,
        "share": 0.92,
        "device_seconds": 8.6,
        "host_seconds": 0.6,
        "tokens": 18000,
        "sampled": 18000,
        "mean_batch": 20.0,
        "step_p50": 0.01,
        "step_p95": 0.014,
        "flops": 3.9e11,
        "weight_bytes": 1.9e10,
        "kv_bytes": 6.0e10,
        "intensity": 4.9,
        "mfu": 0.03,
        "mbu": 0.42,
        "bound": "bandwidth",
    },
]
PROFILE: dict[str, Any] = {
    "profile_version": 1,
    "source": {"kind": "run"},
    "ceilings": {
        "bandwidth": 2.2e10,
        "working_set_bandwidth": 6.0e10,
        "matmul": {"bfloat16": 1.5e12, "float32": 3e11},
        "compute_dtype": "bfloat16",
        "ridge": 25.0,
    },
    "traffic": {"requests": 300, "rate": 6.0, "arrival_cv": 1.02, "dispersion": 1.1},
    "phases": PHASES,
    "kv": {"occupancy_mean": 0.4, "occupancy_peak": 0.93, "preemptions": 3, "hit_rate": 0.1},
    "queueing": {"utilisation": 0.8, "wait_share": 0.3, "queue_max": 9},
    "host": {"share": 0.07, "decode_share": 0.06, "per_step_s": 0.0006, "scheduler_share": 0.001},
    "breakdowns": [
        {
            "metric": "ttft",
            "seconds": 0.081,
            "parts": {"queue": 0.5, "prefill_linear": 0.3, "prefill_attention": 0.1, "host": 0.1},
        },
        {"metric": "tpot", "seconds": 0.011, "parts": {"weights": 0.3, "kv_reads": 0.7}},
    ],
    "speculation": {"tokens_per_step": {"2": 1.6, "4": 1.9}, "synthetic_prompts": True},
    "series": [
        {"at_s": i * 0.1, "queue": i % 5, "running": 9, "occupancy": 0.3} for i in range(50)
    ],
    "partial": ["power and clocks are unknown: NVML is absent"],
}
DIAGNOSIS: dict[str, Any] = {
    "diagnosis_version": 1,
    "binding": "tpot",
    "binding_limit": "tpot<10ms",
    "binding_ratio": 1.14,
    "findings": [
        {
            "metric": "tpot",
            "bottleneck": "decode_kv",
            "severity": 0.7,
            "level": "high",
            "share": 0.7,
            "evidence": {"kv.occupancy_peak": 0.93, "tokens": 400},
            "sentence": "Reading keys and values takes 70% of each decode step.",
        },
        {
            "metric": "ttft",
            "bottleneck": "queue_bursts",
            "severity": 0.3,
            "level": "medium",
            "share": 0.5,
            "evidence": {},
            "sentence": "Half of the time to the first token is waiting.",
        },
    ],
    "unjudged": ["cost: no price was given"],
}
ADVICE: dict[str, Any] = {
    "advice_version": 1,
    "first": "kv_cache_int8",
    "advice": [
        {
            "technique": "kv_cache_int8",
            "title": "Quantize the KV cache to int8",
            "problems": ["decode_kv", "kv_capacity"],
            "knobs": {"kv_cache_dtype": "int8"},
            "gain": {
                "metric": "tpot",
                "statistic": "p95",
                "value": 1.31,
                "low": 1.1,
                "high": 1.5,
                "basis": "replay",
            },
            "confidence": "high",
            "effort": "knob",
            "trade_off": "a little quality",
            "check": "quality_loss",
            "why": "keys and values are 70% of a decode step",
            "testable": True,
            "commands": ["autotune bench --kv-cache-dtype int8"],
        },
        {
            "technique": "another_gpu",
            "title": "A GPU with more bandwidth",
            "problems": ["decode_kv"],
            "knobs": {},
            "gain": None,
            "effort": "buy",
            "testable": False,
            "why_not": "it is not here",
        },
    ],
    "infeasible": [
        {
            "limit": "tpot<1ms",
            "metric": "tpot",
            "asked": 0.001,
            "bound": 0.0031,
            "proven": True,
            "proof": "A step must read 22 MB of weights at 7.1 GB/s.",
            "relaxations": [{"kind": "limit", "sentence": "tpot<3.4ms would be met"}],
        }
    ],
    "notes": ["gains are over tpot p95"],
}
SCOREBOARD: dict[str, Any] = {
    "scored": 1,
    "held_share": 1.0,
    "direction_share": 1.0,
    "median_error": 0.05,
    "entries": [
        {
            "technique": "kv_cache_int8",
            "title": "Quantize the KV cache to int8",
            "knobs": {"kv_cache_dtype": "int8"},
            "metric": "tpot",
            "statistic": "p95",
            "trial": 3,
            "predicted": {"value": 1.31, "low": 1.1, "high": 1.5},
            "measured": {"value": 1.25, "low": 1.2, "high": 1.3},
            "held": True,
            "direction_right": True,
        },
        {
            "technique": "sjf",
            "title": "Shortest job first",
            "knobs": {"scheduling_policy": "sjf"},
            "metric": "ttft",
            "statistic": "p95",
            "predicted": {"value": 1.05, "low": 0.9, "high": 1.2},
            "measured": None,
            "held": None,
            "direction_right": None,
        },
    ],
}


def write_profile_files(
    folder: Path,
    profile: object = PROFILE,
    diagnosis: object = DIAGNOSIS,
    advice: object = ADVICE,
) -> None:
    """`profile.json`, `diagnosis.json` and `advice.json` in a folder."""
    for name, content in (("profile", profile), ("diagnosis", diagnosis), ("advice", advice)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
