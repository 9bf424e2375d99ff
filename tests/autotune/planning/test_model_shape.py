"""Sizes of models against what is published of them, and against the engine's own sums."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from autotune.embedded import TARGET
from autotune.planning.model_shape import Experts
from autotune.planning.read_shape import read_shape
from autotune.profiling.model_facts import model_facts
from engine.checkpoints.model_folder import open_model_folder
from engine.config import EngineConfig
from engine.models.registry import decoder_spec
from engine.models.sharding import divides
from engine.quantize.method_table import METHODS
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known
from tests.engine.tiny_models import CASES, SIZES, VISION


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (models.LLAMA_3_8B, 8.030),
        (models.LLAMA_3_70B, 70.554),
        (models.LLAMA_2_7B, 6.738),
        (models.LLAMA_2_70B, 68.977),
        (models.MIXTRAL_8X7B, 46.703),
        (models.QWEN2_5_7B, 7.616),
        (models.QWEN3_30B_A3B, 30.532),
        (models.QWEN2_57B_A14B, 57.409),
        (models.DEEPSEEK_V3, 671.026),
        (models.DEEPSEEK_V2_LITE, 15.706),
        (models.GEMMA_2_9B, 9.242),
        (models.GEMMA_3_4B, 3.880),
        (models.GPT_OSS_120B, 116.83),
        (models.LLAMA_4_SCOUT, 107.77),
        (models.PHI_3_MINI, 3.821),
        (models.GPT_2, 0.12444),
    ],
)
def test_parameters_are_those_that_are_published(config: dict[str, Any], billions: float) -> None:
    assert known(config).num_parameters / 1e9 == pytest.approx(billions, rel=2e-4)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (models.MIXTRAL_8X7B, 12.9),
        (models.QWEN3_30B_A3B, 3.3),
        (models.QWEN2_57B_A14B, 14.0),
        (models.DEEPSEEK_V3, 37.0),
        (models.GPT_OSS_120B, 5.1),
        (models.LLAMA_4_SCOUT, 17.0),
    ],
)
def test_active_parameters_are_those_in_the_names(config: dict[str, Any], billions: float) -> None:
    shape = known(config)
    with_embeddings = shape.active_parameters + shape.head_parameters
    assert shape.active_parameters / 1e9 <= billions * 1.01
    assert with_embeddings / 1e9 >= billions * 0.99


def test_cached_tokens_of_known_models() -> None:
    assert known(models.LLAMA_3_8B).kv_bytes_per_token() == 131072
    assert known(models.LLAMA_2_7B).kv_bytes_per_token() == 524288
    assert known(models.LLAMA_3_70B).kv_bytes_per_token() == 327680
    # 61 layers of a latent of 512 and a key of 64, in 16 bits.
    assert known(models.DEEPSEEK_V3).kv_bytes_per_token() == 61 * 576 * 2


def test_heads_are_divided_among_ranks_until_there_is_one_each() -> None:
    shape = known(models.LLAMA_3_8B)
    whole = shape.kv_bytes_per_token()
    each = [whole // 2, whole // 8, whole // 8]
    assert [shape.kv_bytes_per_token("auto", ranks) for ranks in (2, 8, 16)] == each


def test_a_latent_is_on_every_rank() -> None:
    shape = known(models.DEEPSEEK_V3)
    assert shape.kv_bytes_per_token("auto", 8) == shape.kv_bytes_per_token()


def test_weights_of_stored_formats() -> None:
    assert known(models.DEEPSEEK_V3).weight_bytes() / 1e9 == pytest.approx(671.03 + 1.9, rel=5e-3)
    # The published shards of gpt-oss-120b sum to 65.2 GB.
    assert known(models.GPT_OSS_120B).weight_bytes() / 1e9 == pytest.approx(65.2, rel=0.03)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("config", [models.LLAMA_3_8B, models.QWEN3_30B_A3B])
def test_ranks_share_the_weights(config: dict[str, Any], quantization: str) -> None:
    shape = known(config)
    whole = shape.weight_bytes(quantization)
    for ranks in (2, 4, 8):
        each = shape.weight_bytes(quantization, ranks)
        # Narrow experts have smaller groups, and so more scales.
        assert whole / ranks <= each <= whole / ranks * 1.06


def test_touched_experts_are_the_mean_over_random_choices() -> None:
    import random

    experts = Experts(16, 3, 8, (True,))
    choose = random.Random(5)
    for rows in (1, 4, 20):
        trials = [
            len({e for _ in range(rows) for e in choose.sample(range(16), 3)}) for _ in range(3000)
        ]
        mean = sum(trials) / len(trials)
        spread = math.sqrt(sum((t - mean) ** 2 for t in trials) / len(trials) / len(trials))
        assert abs(experts.touched(rows) - mean) <= 5 * spread + 1e-9


def test_touched_experts_at_the_ends() -> None:
    experts = Experts(8, 2, 8, (True,))
    assert experts.touched(0) == 0
    assert experts.touched(1) == pytest.approx(2)
    assert experts.touched(10_000) == pytest.approx(8)


@pytest.mark.parametrize("quantization", list(METHODS))
@pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])
def test_the_embedded_model_is_as_the_engine_counts_it(quantization: str, cache: str) -> None:
    _agrees(TARGET, quantization, cache, 1)


@pytest.mark.parametrize("case", list(CASES))
def test_every_family_is_as_the_engine_counts_it(case: str, tmp_path: Path) -> None:
    write_config(case, tmp_path)
    for quantization, ranks in (("none", 1), ("int4", 1), ("none", 2)):
        _agrees(tmp_path, quantization, "auto", ranks)
    _agrees(tmp_path, "none", "fp8", 1)


def _agrees(folder: Path, quantization: str, cache: str, ranks: int) -> None:
    shape = read_shape(folder)
    spec = decoder_spec(open_model_folder(folder))
    assert shape.num_parameters == spec.num_parameters
    assert shape.layer_windows == spec.layer_windows
    assert (shape.obstacle(ranks) is None) or not divides(spec, ranks)
    if shape.obstacle(ranks) is not None:
        return
    facts = model_facts(
        EngineConfig(
            model=str(folder),
            quantization=quantization,
            kv_cache_dtype=cache,
            tensor_parallel_size=ranks,
        )
    )
    assert shape.matmul_parameters == facts.matmul_parameters
    assert shape.max_position == facts.max_model_len
    assert shape.dtype == facts.dtype
    assert shape.weight_bytes(quantization) == facts.resident_bytes
    assert shape.head_bytes(quantization) == facts.head_bytes
    assert ranks * shape.kv_bytes_per_token(cache, ranks) == facts.kv_bytes_per_token


def write_config(case: str, folder: Path) -> None:
    """The config.json that transformers saves of a tiny model, without the model."""
    family, fields = CASES[case]
    if family == "Gemma3ForConditionalGeneration":
        config = transformers.Gemma3Config(**fields, vision_config=VISION)
        name = family
    else:
        prefix = "Gemma3Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **fields})
        name = f"{family}ForCausalLM"
    values = {**config.to_dict(), "architectures": [name]}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
