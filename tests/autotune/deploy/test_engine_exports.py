"""What each engine is given: its files as a person gets them, and what its own parser demands."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.deploy.engine_launch import flag_words, launch_words, model_of
from autotune.deploy.engine_targets import engine_targets
from autotune.deploy.evidence import Evidence
from autotune.deploy.serving_engine import load_serving_engine, serving_engines
from autotune.deploy.target import BUNDLED, Deployment, Exported
from autotune.deploy.translate import Translation, translate
from engine.config import EngineConfig
from tests.autotune.deploy.test_golden import RUNS
from tests.autotune.deploy.test_round_trip import configs

GOLDEN = Path(__file__).parent / "golden"
FACTS: dict[str, dict[str, int]] = {
    "cpu": {
        "kv_cache_memory_bytes": 3 << 30,
        "kv_cache_tokens": 160_000,
        "kv_cache_tokens_unquantized": 80_000,
        "weights_bytes": 300 << 20,
        "device_memory_bytes": 24 << 30,
        "max_model_len": 4096,
    },
    "cuda": {
        "kv_cache_memory_bytes": 20 << 30,
        "kv_cache_tokens": 160_000,
        "kv_cache_tokens_unquantized": 80_000,
        "weights_bytes": 16 << 30,
        "device_memory_bytes": 80 << 30,
        "max_model_len": 8192,
    },
}
# Keys that each engine's own parser or source has; see the tables' `checked`.
KEYS = {
    "sglang": {
        "enable-metrics", "model-path", "tokenizer-path", "device", "dtype", "tensor-parallel-size",
        "context-length", "random-seed", "kv-cache-dtype", "page-size", "mem-fraction-static",
        "cuda-graph-backend-decode", "cuda-graph-backend-prefill", "disable-radix-cache",
        "max-running-requests", "chunked-prefill-size", "max-prefill-tokens", "enable-mixed-chunk",
        "schedule-policy", "enable-priority-scheduling", "schedule-low-priority-values-first",
        "max-queued-requests", "speculative-algorithm", "speculative-draft-model-path",
        "speculative-num-draft-tokens", "speculative-num-steps", "speculative-eagle-topk",
    },
    "trtllm": {
        "tokenizer", "dtype", "tensor_parallel_size", "max_seq_len", "max_batch_size",
        "max_num_tokens", "enable_chunked_prefill", "disable_overlap_scheduler",
        "cuda_graph_config", "cuda_graph_config.max_batch_size", "cuda_graph_config.enable_padding",
        "kv_cache_config.dtype", "kv_cache_config.tokens_per_block", "kv_cache_config.max_tokens",
        "kv_cache_config.free_gpu_memory_fraction", "kv_cache_config.enable_block_reuse",
        "speculative_config.decoding_type", "speculative_config.speculative_model",
        "speculative_config.max_draft_len", "speculative_config.max_matching_ngram_size",
    },
    "tgi": {
        "max-concurrent-requests", "model-id", "dtype", "num-shard", "max-total-tokens",
        "kv-cache-dtype", "cuda-graphs", "max-batch-total-tokens", "max-batch-size",
        "max-batch-prefill-tokens", "speculate",
    },
    "llamacpp": {
        "kv-unified", "metrics", "model", "n-gpu-layers", "kv-unified-per-slot", "cache-type-k",
        "cache-type-v", "ctx-size", "cache-prompt", "no-cache-prompt", "parallel", "batch-size",
        "ubatch-size", "no-cont-batching", "spec-type", "spec-draft-model", "spec-draft-n-max",
        "spec-ngram-simple-size-n", "spec-ngram-simple-size-m", "threads", "threads-batch",
    },
    "lmdeploy": {
        "dtype", "tp", "session-len", "quant-policy", "cache-block-seq-len",
        "cache-max-entry-count", "enable-prefix-caching", "max-batch-size", "num-tokens-per-iter",
        "max-prefill-iters", "max-prefill-token-num",
    },
    "openvino": {
        "target_device", "kv_cache_precision", "cache_size", "enable_prefix_caching",
        "max_num_seqs", "max_num_batched_tokens", "dynamic_split_fuse", "draft_source_model",
    },
}  # fmt: skip


def export(engine: str, name: str) -> Exported:
    run = RUNS[name]
    config = EngineConfig.from_mapping(run["result"]["winner_config"])
    deployment = Deployment(config, Evidence.from_run(run), run, FACTS[name])
    target = next(target for target in engine_targets() if target.name == engine)
    return target.write(deployment)


@pytest.mark.parametrize("engine", [name for name in serving_engines() if name != "vllm"])
@pytest.mark.parametrize("name", RUNS)
def test_files_are_as_they_were_read_and_approved(engine: str, name: str) -> None:
    exported = export(engine, name)
    table = load_serving_engine(engine)
    expected = [table.file] if table.file else []
    assert list(exported.files) == [*expected, "start.sh", "smoke_test.sh", "benchmark.sh"]
    for file in (*expected, "start.sh"):
        text = exported.files[file]
        approved = GOLDEN / f"{name}-{engine}-{file}".replace(f"{engine}-{engine}.", f"{engine}.")
        if os.environ.get("UPDATE_GOLDEN"):
            approved.write_text(text)
        assert text == approved.read_text()
        lines = text.splitlines()
        assert all(len(line) <= 102 for line in lines if line.lstrip().startswith("#"))
    assert any("bundled engine" in warning for warning in exported.warnings)
    assert exported.lost
    for left in exported.lost:
        assert f"# - {left.knob}:" in next(iter(exported.files.values()))


@pytest.mark.parametrize("engine", KEYS)
def test_keys_are_the_engines_own(engine: str) -> None:
    assert load_serving_engine(engine).keys() == KEYS[engine]


def test_a_gpu_engine_warns_of_what_a_cpu_measured() -> None:
    assert not any("runs on GPUs only" in warning for warning in export("tgi", "cuda").warnings)
    assert any("runs on GPUs only" in warning for warning in export("tgi", "cpu").warnings)
    assert not any("runs on GPUs only" in warning for warning in export("vllm", "cpu").warnings)


@pytest.mark.parametrize("engine", serving_engines())
def test_the_start_script_starts_what_it_says(engine: str, tmp_path: Path) -> None:
    """Run it with a shell, its program replaced by one that prints what it was called with."""
    exported, table = export(engine, "cpu"), load_serving_engine(engine)
    for file, text in exported.files.items():
        (tmp_path / file).write_text(text)
    program = tmp_path / "bin" / table.command[0]
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nenv | grep -E "_BIND|^PREFI" || true\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tmp_path / "start.sh", "--more", "a b"],
        env={"PATH": path, "PORT": "9"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    run = RUNS["cpu"]
    config = EngineConfig.from_mapping(run["result"]["winner_config"])
    translation = translate(config, table, "cpu", FACTS["cpu"])
    file = None if table.file is None else str(tmp_path / table.file)
    words = launch_words(table, translation, port=9, file=file)[1:]
    environment = [f"{key}={value}" for key, value in translation.environment().items()]
    said = done.stdout.splitlines()
    if table.prepare:
        flags = [w for k, v in translation.flags().items() for w in flag_words(table, k, v)]
        filled = {"{flags}": flags, "{model}": [model_of(translation)]}
        prepared = [w for word in table.prepare[1:] for w in filled.get(word, [word])]
        assert said[: len(prepared)] == prepared
        said = said[len(prepared) :]
    assert said[: len(words) + 2] == [*words, "--more", "a b"]
    assert sorted(said[len(words) + 2 :]) == sorted(environment)


def test_the_scripts_are_shell() -> None:
    for engine in serving_engines():
        for file, text in export(engine, "cuda").files.items():
            if file.endswith(".sh"):
                subprocess.run(["bash", "-n"], input=text, text=True, timeout=20, check=True)


def test_without_a_file_every_key_is_a_flag() -> None:
    table = load_serving_engine("vllm")
    config = EngineConfig(model="m", enable_prefix_caching=False)
    words = launch_words(table, translate(config, table, "cuda"), host="0.0.0.0")
    assert words[:2] == ["vllm", "serve"]
    assert "--config" not in words
    assert words[words.index("--model") + 1] == "m"
    assert "--no-enable-prefix-caching" in words
    assert words[words.index("--max-num-seqs") + 1] == "256"
    assert words[-4:] == ["--host", "0.0.0.0", "--port", "8000"]


def translated(engine: str, config: EngineConfig, device: str) -> Translation:
    return translate(config, load_serving_engine(engine), device, FACTS[device])


@settings(max_examples=60, deadline=None)
@given(config=configs(), device=st.sampled_from(["cpu", "cuda"]))
def test_what_an_engine_refuses_is_never_written(config: EngineConfig, device: str) -> None:
    """The engines' own validators, restated here from their sources."""
    sglang = translated("sglang", config, device).settings()
    assert 0 < sglang.get("mem-fraction-static", 0.5) < 1
    if sglang.get("chunked-prefill-size", -1) > 0:
        assert sglang["chunked-prefill-size"] % sglang["page-size"] == 0
    drafting = [key for key in sglang if key.startswith("speculative")]
    assert not drafting or "speculative-algorithm" in drafting
    if sglang.get("speculative-algorithm") == "STANDALONE":
        assert sglang["speculative-eagle-topk"] == 1
        steps = sglang["speculative-num-steps"]
        assert sglang["speculative-num-draft-tokens"] == steps + 1
    # A flag that is there is true: nothing false may be written.
    assert all(value is not False and value is not None for value in sglang.values())

    llama = translated("llamacpp", config, device).settings()
    assert 1 <= llama["parallel"] <= 256
    assert llama["ubatch-size"] <= llama["batch-size"]
    assert ("cache-type-k" in llama) == ("cache-type-v" in llama)
    assert llama["model"].lower().endswith(".gguf")
    assert all(value is not False and value is not None for value in llama.values())

    trtllm = translated("trtllm", config, device).settings()
    assert trtllm["kv_cache_config"].get("tokens_per_block", 32) >= 32
    speculation = trtllm.get("speculative_config")
    if speculation is not None:
        assert speculation["decoding_type"] in ("NGram", "Draft_Target")
        assert speculation["max_draft_len"] > 0
        model = speculation["decoding_type"] == "Draft_Target"
        assert ("speculative_model" in speculation) == model
    graphs = trtllm.get("cuda_graph_config")
    assert graphs is None or graphs["max_batch_size"] == trtllm["max_batch_size"]

    lmdeploy = translated("lmdeploy", config, device).settings()
    assert lmdeploy["cache-block-seq-len"] % 32 == 0
    assert 0 < lmdeploy.get("cache-max-entry-count", 0.8) < 1
    per_pass = lmdeploy.get("num-tokens-per-iter", 0)
    if per_pass:
        longest = config.max_model_len or FACTS[device]["max_model_len"]
        assert per_pass * lmdeploy["max-prefill-iters"] >= longest
    assert all(value is not False and value is not None for value in lmdeploy.values())

    tgi: dict[str, Any] = translated("tgi", config, device).settings()
    assert tgi.get("dtype") in (None, "float16", "bfloat16")
    assert tgi["max-concurrent-requests"] >= tgi["max-batch-size"]
    openvino = translated("openvino", config, device).settings()
    assert openvino.get("kv_cache_precision", "u8") == "u8"


def test_a_tuned_knob_has_its_evidence_wherever_its_meaning_went() -> None:
    def tuned(engine: str, device: str, knob: str) -> str:
        run = {"hardware": {"device": device}, "result": {"changes": {knob: ["before", "after"]}}}
        evidence = Evidence.from_run(run)
        config = EngineConfig(model="m", num_threads=2, kv_cache_dtype="int8")
        target = next(target for target in engine_targets() if target.name == engine)
        files = target.write(Deployment(config, evidence, run, FACTS[device])).files
        main = next(iter(files.values())).splitlines()
        return "\n".join(line.strip("# ") for line in main)

    # The share of memory is converted: the key that carries it tells what was tuned.
    text = tuned("sglang", "cuda", "gpu_memory_utilization")
    notes, _, _ = text.partition("mem-fraction-static:")
    assert "tuned, as gpu_memory_utilization: default before" in notes
    # A variable of the environment, a knob that is lost, one that needs no key.
    assert "for num_threads; tuned: default before" in tuned("vllm", "cpu", "num_threads")
    for engine, knob in (("sglang", "kv_cache_dtype"), ("vllm", "batching_mode")):
        entry = tuned(engine, "cuda", knob).partition(f"\n- {knob}:")[2].partition("\n- ")[0]
        assert "(tuned: default before)" in " ".join(entry.split())


def test_another_model_is_loaded_where_one_is_given() -> None:
    run = RUNS["cuda"]
    config = EngineConfig.from_mapping(run["result"]["winner_config"])
    for target in engine_targets():
        deployment = Deployment(config, Evidence(), run, FACTS["cuda"], model="/srv/other")
        files = target.write(deployment).files
        text = files["engine.yaml" if target.name == BUNDLED else "start.sh"]
        if target.name in ("vllm", "sglang"):
            text = files[f"{target.name}.yaml"]
        assert "other" in text, target.name
        assert "models/example" not in text


def test_nested_keys_are_a_nested_file() -> None:
    text = export("trtllm", "cuda").files["trtllm.yaml"]
    content = yaml.safe_load(text)
    assert content["kv_cache_config"]["enable_block_reuse"] is True
    assert content["cuda_graph_config"] == {"max_batch_size": 256, "enable_padding": True}
    eager = EngineConfig(model="m", cuda_graphs=False)
    settings_ = translated("trtllm", eager, "cuda").settings()
    assert settings_["cuda_graph_config"] is None
