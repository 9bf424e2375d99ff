"""The files as a person gets them, compared whole.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/autotune/deploy/test_golden.py`, then read
the difference.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.deploy.engine_yaml import read_knobs
from autotune.deploy.write import write_deploy
from autotune.records import RunFolder
from engine.config import EngineConfig

GOLDEN = Path(__file__).parent / "golden"

RUNS: dict[str, dict[str, Any]] = {
    "cpu": {
        "command": ["autotune", "run", "--slo", "ttft<200ms,tpot<100ms"],
        "started_at": "2026-03-01T12:00:00+00:00",
        "hardware": {"device": "cpu", "name": "Example Processor", "cores": 2},
        "versions": {"autotune": "0.1.0", "torch": "2.13.0"},
        "workload": {"source": "trace.csv", "rate": 2.5},
        "objective": "goodput",
        "slo": "ttft<200ms,tpot<100ms",
        "result": {
            "verdict": "max_num_seqs=32 and int8 weights serve 1.42 times the goodput.",
            "changes": {
                "max_num_seqs": [256, 32],
                "block_size": [16, 8],
                "quantization": ["none", "int8"],
                "enable_prefix_caching": [True, False],
                "speculative_method": ["none", "ngram"],
                "num_speculative_tokens": [4, 8],
            },
            "importances": {"max_num_seqs": 0.71, "quantization": 0.2},
            "baseline_trials": [30, 32, 34],
            "winner_trials": [31, 33, 35],
            "gain": {"value": 1.42, "low": 1.3, "high": 1.55, "confidence": 0.95, "unit": "ratio"},
            "winner": {"engine": {"kv_blocks_total": 1000}},
            "winner_config": {
                "model": "models/example",
                "max_num_seqs": 32,
                "block_size": 8,
                "quantization": "int8",
                "kv_cache_dtype": "fp8",
                "enable_prefix_caching": False,
                "scheduling_policy": "sjf",
                "max_num_queued_reqs": 10,
                "num_threads": 2,
                "max_model_len": 2048,
                "long_prefill_token_threshold": 4096,
                "speculative_method": "ngram",
                "num_speculative_tokens": 8,
            },
        },
    },
    "cuda": {
        "hardware": {"device": "cuda", "name": "Example GPU", "cores": 16},
        "result": {
            "changes": {},
            "winner_config": {
                "model": "models/example",
                "block_size": 8,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": 8192,
                "quantization": "int4",
                "kv_cache_dtype": "int8",
                "batching_mode": "static",
                "speculative_method": "medusa",
                "speculative_model": "models/heads",
                "num_speculative_tokens": 24,
            },
        },
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_files_are_as_they_were_read_and_approved(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    config = EngineConfig.from_mapping(run["result"]["winner_config"])
    paths = write_deploy(RunFolder(tmp_path), config, evidence=run)
    assert [path.name for path in paths] == ["engine.yaml", "vllm.yaml"]
    for path in paths:
        assert path.parent == tmp_path / "deploy"
        approved = GOLDEN / f"{name}-{path.name}"
        if os.environ.get("UPDATE_GOLDEN"):
            approved.parent.mkdir(exist_ok=True)
            approved.write_text(path.read_text())
        assert path.read_text() == approved.read_text()
        lines = path.read_text().splitlines()
        assert all(len(line) <= 100 for line in lines if line.startswith("#"))
    assert EngineConfig.from_mapping(read_knobs(paths[0])) == config


def test_unset_cache_size_on_a_cpu_becomes_the_bytes_that_were_measured(tmp_path: Path) -> None:
    # Shape read by hand from config.json below: 2 (K and V) x 3 layers x 2 heads x 8 x 4 bytes.
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3,'
        '"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,'
        '"vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,'
        '"rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float32"}'
    )
    config = EngineConfig(model=str(model), block_size=32)
    run = {
        "hardware": {"device": "cpu"},
        "result": {"winner": {"engine": {"kv_blocks_total": 50}}},
    }
    write_deploy(RunFolder(tmp_path), config, evidence=run)
    keys = yaml.safe_load((tmp_path / "deploy" / "vllm.yaml").read_text())
    assert keys["kv-cache-memory-bytes"] == 50 * 32 * (2 * 3 * 2 * 8 * 4)
    # A byte an element, and a float32 scale for each head.
    write_deploy(RunFolder(tmp_path), config.replace(kv_cache_dtype="int8"), evidence=run)
    keys = yaml.safe_load((tmp_path / "deploy" / "vllm.yaml").read_text())
    assert keys["kv-cache-memory-bytes"] == 50 * 32 * (2 * 3 * 2 * (8 + 4))
    on_gpu = {**run, "hardware": {"device": "cuda"}}
    write_deploy(RunFolder(tmp_path), config, evidence=on_gpu)
    keys = yaml.safe_load((tmp_path / "deploy" / "vllm.yaml").read_text())
    assert "kv-cache-memory-bytes" not in keys
    assert keys["gpu-memory-utilization"] == config.gpu_memory_utilization


def test_asked_cache_bytes_take_the_place_of_the_share(tmp_path: Path) -> None:
    config = EngineConfig(model="m", kv_cache_memory_bytes=1 << 30)
    write_deploy(RunFolder(tmp_path), config, evidence={"hardware": {"device": "cuda"}})
    keys = yaml.safe_load((tmp_path / "deploy" / "vllm.yaml").read_text())
    assert keys["kv-cache-memory-bytes"] == 1 << 30
    assert "gpu-memory-utilization" not in keys
