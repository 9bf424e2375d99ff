"""A config.json is untrusted: whatever stands in it ends in a shape or in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.planning.read_shape import read_shape, shape_of
from engine.errors import ModelError
from tests.autotune.planning import known_models as models
from tests.autotune.planning.known_models import known

BAD = [
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": -4096}, "hidden_size must be a positive integer"),
    ({"hidden_size": 10**400}, "hidden_size must be at most"),
    ({"hidden_size": 1 << 40}, "hidden_size must be at most"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most"),
    ({"num_attention_heads": "32"}, "num_attention_heads must be a positive integer"),
    ({"num_key_value_heads": 7}, "must be a multiple of num_key_value_heads=7"),
    ({"vocab_size": True}, "vocab_size must be a positive integer"),
    ({"intermediate_size": [1]}, "intermediate_size must be a positive integer"),
    ({"torch_dtype": "int3"}, "dtype 'int3' is not known"),
    ({"torch_dtype": 16}, "must be a text"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"layer_types": ["full_attention"]}, "layer_types must be a list of 32 texts"),
    ({"layer_types": ["mamba"] * 32}, "'mamba', whose arithmetic is not known here"),
    ({"layer_types": ["sliding_attention"] * 32}, "sliding_window is null"),
    ({"mamba_d_state": 16}, "mamba_d_state says state-space layers"),
    ({"is_encoder_decoder": True}, "an encoder with a decoder"),
    ({"num_local_experts": 8}, "num_experts_per_tok is missing, of 8 experts"),
    ({"num_local_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8"),
    ({"strange_experts": 8}, "strange_experts=8 speaks of experts"),
    ({"block_configs": [{}]}, "block_configs says layers of several sizes"),
    ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
    ({"text_config": 3}, "text_config must be an object"),
    (
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 1e300,
                "original_max_position_embeddings": 4096,
            }
        },
        "factor=1e+300 is too large",
    ),
]


@pytest.mark.parametrize(("changed", "told"), BAD, ids=[str(next(iter(c))) for c, _ in BAD])
def test_bad_fields_end_in_one_sentence(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape_of(models.LLAMA_3_8B | changed, "there/config.json", "bad")
    text = str(caught.value)
    assert told in text
    assert "there/config.json" in text
    assert "\n" not in text
    assert len(text) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
FIELDS = sorted(
    {
        *models.LLAMA_3_8B,
        *models.DEEPSEEK_V3,
        *models.QWEN3_30B_A3B,
        *models.GPT_OSS_120B,
        "text_config",
        "attention_chunk_size",
        "no_rope_layers",
        "sliding_window_pattern",
        "max_window_layers",
        "use_sliding_window",
    }
)


@settings(max_examples=300, deadline=None)
@given(
    base=st.sampled_from([models.LLAMA_3_8B, models.DEEPSEEK_V3, models.QWEN3_30B_A3B, {}]),
    kind=st.sampled_from(["llama", "mistral", "gemma3", "gpt_oss", "llama4_text", "falcon", "x"]),
    changed=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
)
def test_no_config_ends_in_a_traceback(
    base: dict[str, Any], kind: str, changed: dict[str, Any]
) -> None:
    try:
        shape = shape_of({**base, "model_type": kind, **changed}, "config.json", "x")
    except ModelError:
        return
    assert shape.num_parameters > 0
    assert shape.weight_bytes("int4", 2) > 0
    assert shape.kv_bytes_per_token("fp8", 4) > 0
    assert shape.obstacle(8) is None or "do not divide" in str(shape.obstacle(8))


def test_what_is_no_model(tmp_path: Path) -> None:
    for path, told in (
        ("", "no model was given"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "has no config.json"),
        ("a\0b", "does not exist"),
        ("a" * 5000, "does not exist"),
    ):
        with pytest.raises(ModelError, match=told):
            read_shape(path)
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        read_shape(tmp_path)


def test_folder_and_file_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(models.LLAMA_3_8B), encoding="utf-8")
    assert read_shape(folder) == read_shape(file)
    assert read_shape(file).name == "Some-Model"
    assert read_shape(file).architecture == "LlamaForCausalLM"


def test_windows_by_family() -> None:
    gemma2, gemma3 = known(models.GEMMA_2_9B), known(models.GEMMA_3_4B)
    assert gemma2.layer_windows == (4096, 0) * 21
    assert gemma3.layer_windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4
    assert known(models.GPT_OSS_120B).layer_windows == (128, 0) * 18
    assert known(models.LLAMA_4_SCOUT).layer_windows == (8192, 8192, 8192, 0) * 12
    assert known(models.PHI_3_MINI).layer_windows == (2047,) * 32
    assert not any(known(models.QWEN2_5_7B).layer_windows)


def test_experts_by_family() -> None:
    deepseek = known(models.DEEPSEEK_V3).experts
    assert deepseek is not None
    assert deepseek.layers == (False,) * 3 + (True,) * 58
    assert deepseek.shared_size == 2048
    sparse = known(models.QWEN3_30B_A3B | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert sparse.experts is not None
    assert sparse.experts.layers[:6] == (False, False, False, True, False, True)


def test_the_text_part_is_planned_for_and_the_rest_is_told() -> None:
    shape = known(models.GEMMA_3_4B)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (8, 4, 256)
    assert len(shape.notes) == 1
    assert "text_config" in shape.notes[0]


def test_yarn_reaches_beyond_the_original_length() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert known(models.QWEN2_5_7B | {"rope_scaling": scaling}).max_position == 131072


def test_no_experts_is_no_mixture() -> None:
    assert known(models.LLAMA_3_8B | {"num_local_experts": 0}).experts is None
    assert known(models.LLAMA_3_8B | {"num_experts": 1}).experts is None


def test_sparse_attention_is_told_to_be_planned_as_full() -> None:
    shape = known(models.DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_topk": 2048})
    assert "index_topk" in shape.notes[0]
