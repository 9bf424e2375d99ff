"""Memory goes to other engines through bytes; the expected numbers are worked out by hand."""

import pytest

from autotune.deploy.conversions import Known, NotConvertible, convert
from autotune.deploy.serving_engine import load_serving_engine
from autotune.deploy.translate import Translation, translate
from engine.config import EngineConfig

GIB = 1 << 30
ON_GPU = {
    "kv_cache_memory_bytes": 20 * GIB,
    "kv_cache_tokens": 160_000,
    "kv_cache_tokens_unquantized": 80_000,
    "weights_bytes": 16 * GIB,
    "device_memory_bytes": 80 * GIB,
    "max_model_len": 8192,
}


def exported(engine: str, device: str = "cuda", **knobs: object) -> Translation:
    config = EngineConfig.from_mapping({"model": "m", **knobs})
    return translate(config, load_serving_engine(engine), device, ON_GPU)


def test_each_engine_gets_the_share_that_means_the_same_bytes() -> None:
    # (16 + 20) / 80 of all memory; 20 / (80 - 16) of what the weights leave, in three digits.
    assert exported("sglang").settings()["mem-fraction-static"] == 0.45
    assert exported("trtllm").settings()["kv_cache_config"]["free_gpu_memory_fraction"] == 0.312
    assert exported("lmdeploy").settings()["cache-max-entry-count"] == 0.312
    assert exported("trtllm").settings()["kv_cache_config"]["max_tokens"] == 160_000
    assert exported("llamacpp").settings()["ctx-size"] == 160_000
    assert exported("tgi").settings()["max-batch-total-tokens"] == 160_000
    assert exported("openvino").settings()["cache_size"] == 20
    for engine in ("sglang", "trtllm", "lmdeploy", "llamacpp", "tgi", "openvino"):
        told = {left.knob: left.reason for left in exported(engine).unneeded}
        assert "converted through bytes" in told["gpu_memory_utilization"]


def test_vllm_means_the_same_share() -> None:
    settings = exported("vllm", gpu_memory_utilization=0.8).settings()
    assert settings["gpu-memory-utilization"] == 0.8
    assert "kv-cache-memory-bytes" not in settings


def test_bytes_that_held_8_bit_values_hold_half_as_many_where_that_type_is_lost() -> None:
    # TGI and TensorRT-LLM have no int8 cache; llama.cpp has q8_0.
    for engine, key in (("tgi", "max-batch-total-tokens"), ("llamacpp", "ctx-size")):
        tokens = exported(engine, kv_cache_dtype="int8").settings()[key]
        assert tokens == (80_000 if engine == "tgi" else 160_000)


def test_no_more_tokens_than_requests_can_fill() -> None:
    assert exported("llamacpp", max_num_seqs=4).settings()["ctx-size"] == 4 * 8192


def test_a_share_of_a_gpu_is_not_made_up_from_a_cpu() -> None:
    for engine, key in (("sglang", "mem-fraction-static"), ("lmdeploy", "cache-max-entry-count")):
        result = exported(engine, "cpu")
        assert key not in result.settings()
        lost = {left.knob: left.reason for left in result.lost}
        assert "20.00 GiB" in lost["kv_cache_memory_bytes"]


def test_without_the_bytes_the_share_is_told_to_be_lost() -> None:
    config = EngineConfig(model="m", gpu_memory_utilization=0.7)
    result = translate(config, load_serving_engine("sglang"), "cuda", {})
    assert "mem-fraction-static" not in result.settings()
    lost = {left.knob: left.reason for left in result.lost}
    assert "not known" in lost["gpu_memory_utilization"]


@pytest.mark.parametrize(
    ("how", "value", "facts", "expected"),
    [
        ("gib", 1, {}, 1),
        ("gib", GIB, {}, 1),
        ("gib", GIB + 1, {}, 2),
        ("core_list", 1, {}, "0"),
        ("core_list", 4, {}, "0-3"),
        ("prefill_passes", 2048, {"max_model_len": 2048}, 1),
        ("prefill_passes", 2048, {"max_model_len": 2049}, 2),
        ("one_more", 4, {}, 5),
        ("gguf", "/models/a.GGUF", {}, "/models/a.GGUF"),
        ("gguf", "/models/llama", {}, "llama.gguf"),
        ("openvino_folder", "/models/llama/", {}, "llama-openvino"),
        # 79 GiB of cache beside 0.5 GiB of weights leave too little for activations.
        ("share_with_weights", 79 * GIB, {**ON_GPU, "weights_bytes": GIB // 2}, 0.95),
    ],
)
def test_conversions(how: str, value: object, facts: dict[str, int], expected: object) -> None:
    assert convert(how, value, Known(facts, "cuda")).value == expected


@pytest.mark.parametrize("missing", ["weights_bytes", "device_memory_bytes"])
def test_what_is_missing_is_named(missing: str) -> None:
    facts = {name: value for name, value in ON_GPU.items() if name != missing}
    with pytest.raises(NotConvertible, match="is not known"):
        convert("share_of_free", GIB, Known(facts, "cuda"))


def test_more_than_the_gpu_has_is_refused() -> None:
    with pytest.raises(NotConvertible, match="exceed"):
        convert("share_of_free", 70 * GIB, Known(ON_GPU, "cuda"))
