"""Where a GPU's memory goes, against the engine's own sums."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.embedded import TARGET
from autotune.hardware.catalogue import Gpu, load_catalogue
from autotune.planning.memory import PARTS, memory_plan
from autotune.planning.methods_run import cache_dtypes_run, methods_run, why_not
from autotune.planning.read_shape import read_shape
from engine.block_groups import block_groups
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.kv_cache import cache_bytes, cache_dtype, num_blocks_for
from engine.models.registry import decoder_spec
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known
from tests.autotune.planning.test_model_shape import write_config

CATALOGUE = load_catalogue()


def on(gpu: str, memory: int | None = None) -> Gpu:
    found = CATALOGUE.find(gpu)
    return found if memory is None else dataclasses.replace(found, memory_bytes=memory)


@pytest.mark.parametrize("gpu", ["h100-sxm", "l4", "t4", "b200", "mi300x"])
@pytest.mark.parametrize("config", [models.LLAMA_3_8B, models.DEEPSEEK_V3, models.GEMMA_3_4B])
def test_parts_sum_to_the_memory_or_more_is_needed(gpu: str, config: dict[str, Any]) -> None:
    plan = memory_plan(known(config), on(gpu), EngineConfig(max_model_len=4096))
    assert list(plan.parts) == list(PARTS)
    assert all(size >= 0 for size in plan.parts.values())
    if plan.fits:
        assert sum(plan.parts.values()) == plan.total
        assert plan.shortfall == 0
    else:
        assert sum(plan.parts.values()) <= plan.total + plan.shortfall
        assert plan.shortfall > 0
        assert plan.kv_tokens < 4096


@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen3_window", "mistral_window"])
@pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])
def test_blocks_are_those_of_the_engine(case: str, cache: str, tmp_path: Path) -> None:
    write_config(case, tmp_path)
    spec = decoder_spec(open_model_folder(tmp_path))
    budget = 1 << 20
    for length in (96, 256):
        config = EngineConfig(
            model=str(tmp_path),
            kv_cache_dtype=cache,
            kv_cache_memory_bytes=budget,
            max_model_len=length,
            block_size=8,
        )
        plan = memory_plan(read_shape(tmp_path), on("h100-sxm"), config)
        assert plan.cache is not None
        groups = block_groups(spec.layer_windows, length)
        dtype = cache_dtype(config, torch.float32)
        assert plan.cache.groups == groups
        assert plan.cache.num_blocks == num_blocks_for(config, spec, dtype, length, budget, groups)
        told = cache_bytes(config, spec, torch.float32, length, plan.cache.num_blocks)
        assert plan.parts["kv_cache"] == told


def test_the_cache_is_no_larger_than_the_engine_could_fill() -> None:
    shape = read_shape(TARGET)
    config = EngineConfig(model=str(TARGET), max_num_seqs=300)
    plan = memory_plan(shape, on("h100-sxm"), config)
    assert plan.cache is not None
    assert plan.cache.num_blocks == 300 * 2048 // 16
    roomy = memory_plan(shape, on("h100-sxm"), config, cap_to_seats=False)
    assert roomy.kv_tokens > 10 * plan.kv_tokens


def test_a_known_fit_and_a_known_misfit() -> None:
    config = EngineConfig(max_model_len=8192)
    small = memory_plan(known(models.LLAMA_3_8B), on("h100-sxm"), config, cap_to_seats=False)
    # vLLM reports 380 to 450 thousand tokens at 0.9 of 80 GB.
    assert 350_000 < small.kv_tokens < 480_000
    large = known(models.LLAMA_3_70B)
    assert not memory_plan(large, on("h100-sxm"), config).fits
    assert memory_plan(large, on("h100-sxm"), config.replace(tensor_parallel_size=4)).fits
    assert memory_plan(large, on("h200-sxm"), config.replace(quantization="fp8")).fits
    assert not memory_plan(known(models.DEEPSEEK_V3), on("h100-sxm"), config).fits


@pytest.mark.parametrize("config", [models.LLAMA_3_70B, models.GEMMA_2_9B, models.DEEPSEEK_V3])
def test_the_shortfall_is_what_is_missing(config: dict[str, Any]) -> None:
    shape, knobs = known(config), EngineConfig(max_model_len=8192, gpu_memory_utilization=0.5)
    gpu = on("a10")
    plan = memory_plan(shape, gpu, knobs)
    assert not plan.fits
    enough = gpu.memory_bytes + 2 * plan.shortfall  # half of what is added may be used
    assert memory_plan(shape, on("a10", enough + 4), knobs).fits
    assert not memory_plan(shape, on("a10", enough - 8), knobs).fits


def test_the_longest_sequence_that_fits_is_told() -> None:
    shape, gpu = known(models.LLAMA_3_8B), on("l4")
    plan = memory_plan(shape, gpu, EngineConfig())  # 131072 tokens need 17 GB
    assert not plan.fits
    assert 0 < plan.longest < 131072
    assert memory_plan(shape, gpu, EngineConfig(max_model_len=plan.longest)).fits
    assert not memory_plan(shape, gpu, EngineConfig(max_model_len=plan.longest + 16)).fits


def test_windows_hold_more_sequences() -> None:
    shape = known(models.GEMMA_3_4B)
    whole = dataclasses.replace(shape, layer_windows=(0,) * shape.num_layers)
    config, gpu = EngineConfig(max_model_len=32768), on("l40s")
    windowed = memory_plan(shape, gpu, config, cap_to_seats=False)
    plain = memory_plan(whole, gpu, config, cap_to_seats=False)
    assert 3 * plain.kv_tokens < windowed.kv_tokens < 7 * plain.kv_tokens


def test_which_methods_a_gpu_runs() -> None:
    shape = known(models.LLAMA_3_8B)
    assert methods_run(on("t4"), shape) == ("none",)
    assert "fp8" not in methods_run(on("a100-80gb-sxm"))
    assert {"none", "int8", "int4"} <= set(methods_run(on("a100-80gb-sxm")))
    assert {"fp8", "int8", "awq"} <= set(methods_run(on("h100-sxm")))
    assert "int8" not in methods_run(on("b300"))
    assert "fp8" in methods_run(on("b300"))
    assert methods_run(on("mi300x"))[0] == "none"
    assert "int4" not in methods_run(on("mi300x"))
    assert methods_run(on("h100-sxm"), known(models.DEEPSEEK_V3)) == ("none",)
    assert why_not(on("h100-sxm"), "fp8") is None
    told = why_not(on("a100-80gb-sxm"), "fp8")
    assert told is not None
    assert "has no fast fp8 matrix units" in told
    assert cache_dtypes_run(on("t4")) == ("auto",)
    assert cache_dtypes_run(on("a100-80gb-sxm")) == ("auto", "int8")
    assert cache_dtypes_run(on("l4")) == ("auto", "int8", "fp8")
