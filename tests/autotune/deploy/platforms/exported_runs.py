"""Finished runs to export: on a CPU and on GPUs, of a local folder and of a model of the hub."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from autotune.deploy.target import Exported
from autotune.deploy.targets import all_targets, find_target
from autotune.deploy.write import ExportOptions, export_config
from engine.config import EngineConfig

_CPU: dict[str, Any] = {
    "command": ["autotune", "run", "--slo", "ttft<200ms,tpot<100ms"],
    "started_at": "2026-03-01T12:00:00+00:00",
    "hardware": {"device": "cpu", "name": "Example Processor", "cores": 8, "memory_bytes": 1 << 35},
    "versions": {"autotune": "0.1.0", "torch": "2.13.0+cpu"},
    "model": {"name": "Example 1B", "path": "/srv/models/example"},
    "options": {"traffic": {"source": "chat", "rate": 4.0, "length_factor": 0.5}},
    "workload": {
        "source": "preset chat",
        "rate": 4.0,
        "input_tokens": {"mean": 388.3},
        "output_tokens": {"mean": 46.2},
    },
    "objective": "goodput",
    "slo": "ttft<200ms,tpot<100ms",
    "result": {
        "slo_met": True,
        "verdict": "max_num_seqs=32 serves 1.42 times the goodput.",
        "changes": {"max_num_seqs": [256, 32], "enable_prefix_caching": [True, False]},
        "importances": {"max_num_seqs": 0.71},
        "winner_trials": [31, 33, 35],
        "winner": {
            "requests_per_s": 4.0,
            "goodput_requests_per_s": 3.9,
            "offered_rate": 4.0,
            "slo_attainment": 0.975,
            "output_tokens_per_s": 184.8,
            "e2e": {"mean": 1.5},
            "engine": {"prefix_hit_rate": 0.0},
        },
        "winner_config": {
            "model": "/srv/models/example",
            "max_num_seqs": 32,
            "enable_prefix_caching": False,
            "scheduling_policy": "sjf",
            "num_threads": 8,
            "kv_cache_memory_bytes": 4 << 30,
        },
    },
}


def _gpus() -> dict[str, Any]:
    run = copy.deepcopy(_CPU)
    run["hardware"] = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "cores": 64}
    run["versions"]["torch"] = "2.13.0+cu128"
    run["model"] = {"name": "Llama-3.1-8B-Instruct"}
    result = run["result"]
    result["winner"] |= {
        "capacity_requests_per_s": 12.5,
        "requests_per_s": 12.4,
        "e2e": {"mean": 2.0},
        "engine": {"prefix_hit_rate": 0.4},
    }
    result["winner_config"] = {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "tensor_parallel_size": 2,
        "kv_cache_dtype": "fp8",
        "max_num_seqs": 128,
        "speculative_method": "ngram",
        "num_speculative_tokens": 4,
    }
    result["changes"] = {"kv_cache_dtype": ["auto", "fp8"], "speculative_method": ["none", "ngram"]}
    return run


def _bare() -> dict[str, Any]:
    """A run of which nothing was kept but the winner."""
    return {
        "hardware": {"device": "cuda", "name": "NVIDIA L4"},
        "result": {"winner_config": {"model": "/srv/models/a$b c"}},
    }


RUNS = {"cpu": _CPU, "gpus": _gpus(), "bare": _bare()}
# It did not keep its promise.
LATE = _CPU | {"result": _CPU["result"] | {"slo_met": False}}


@cache
def exported(run: str, target: str, engine: str | None = None, **options: Any) -> Exported:
    """The files of one target of one run."""
    return exported_of(LATE if run == "late" else RUNS[run], target, engine, **options)


def exported_of(
    content: dict[str, Any], target: str, engine: str | None = None, **options: Any
) -> Exported:
    """The same of a run that is given by the content of its `run.json`."""
    config = EngineConfig.from_mapping(content["result"]["winner_config"])
    return export_config(find_target(target), config, content, ExportOptions(engine, **options))


def changed(run: str, **winner: Any) -> dict[str, Any]:
    """One of the runs, its winner with other knobs."""
    content = copy.deepcopy(RUNS[run])
    content["result"]["winner_config"] |= winner
    return content


def combinations() -> Iterator[tuple[str, str, str]]:
    """Run, target and engine, wherever the target can be made of that run."""
    for run in RUNS:
        on_cpu = RUNS[run]["hardware"]["device"] == "cpu"
        for name, target in all_targets().items():
            for engine in target.carries:
                needs_gpu = name in ("dynamo", "nim") or (engine == "sglang" and name != "systemd")
                needs_folder = engine == "engine" and run == "gpus"
                if not (needs_gpu and on_cpu) and not needs_folder:
                    yield run, name, engine


def write(files: Exported, folder: Path) -> Path:
    """The files in a folder, as they would be written."""
    from autotune.deploy.write import write_exported

    write_exported(files, folder)
    return folder
