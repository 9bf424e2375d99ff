"""Rotary frequencies against transformers' and, for the table, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import ModelError
from engine.models.config_fields import ConfigFields
from engine.models.read_rope import read_rope
from engine.models.registry import spec_of
from engine.models.rope import cos_sin_table, inverse_frequencies
from engine.models.spec import RopeSpec

LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_32 = {**LLAMA_31, "factor": 32.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
}
LONGEST = 131072


def rope_of(config: dict[str, Any], head_dim: int) -> RopeSpec:
    return read_rope(ConfigFields(config, "config.json"), head_dim, LONGEST, 10000.0)[0]


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA_31,
        LLAMA_32,
        YARN,
        {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
        {**YARN, "attention_factor": 0.9},
        {**YARN, "original_max_position_embeddings": 40, "rope_theta": 10000.0},
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=LONGEST, rope_parameters=dict(parameters)
    )
    theirs = LlamaRotaryEmbedding(config)
    spec = rope_of({"rope_parameters": parameters}, head_dim)
    torch.testing.assert_close(
        inverse_frequencies(spec, head_dim), theirs.inv_freq, rtol=1e-6, atol=0
    )
    assert spec.attention_factor == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("length", [4096, 4097])
def test_longrope_takes_its_factors_by_the_longest_sequence(kind: str, length: int) -> None:
    """Also under the names of Phi-3's first files; a quarter of each head stays as it is."""
    pairs = 36
    scaling = {
        "type": kind,
        "short_factor": torch.linspace(1, 1.5, pairs).tolist(),
        "long_factor": torch.linspace(1, 60, pairs).tolist(),
    }
    config = {
        "hidden_size": 96 * 32,
        "max_position_embeddings": LONGEST,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
    }
    today = {**config, "rope_scaling": {**scaling, "type": "longrope"}}
    theirs, factor = ROPE_INIT_FUNCTIONS["longrope"](Phi3Config(**today), seq_len=length)
    sizes = {"num_attention_heads": 32, "num_hidden_layers": 1, "vocab_size": 9}
    rope = spec_of(
        "Phi3ForCausalLM", {**config, **sizes, "intermediate_size": 8}, "config.json"
    ).rope
    assert rope.rotary_dim(96) == 2 * pairs
    torch.testing.assert_close(inverse_frequencies(rope, 96, length), theirs, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor)
    table = cos_sin_table(rope, 96, 2)
    torch.testing.assert_close(table[0, :pairs], torch.full((pairs,), factor))


def test_yarn_reaches_past_what_the_config_says() -> None:
    """Qwen2.5's instructions add the scaling and leave max_position_embeddings as it was."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    fields = ConfigFields({"rope_scaling": scaling, "rope_theta": 1e6}, "config.json")
    rope, longest = read_rope(fields, 128, 32768, 10000.0)
    assert (rope.theta, rope.factor, longest) == (1e6, 4.0, 131072)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported; default, linear"),
        ({"rope_type": "default", "mrope_section": [16, 24]}, "mrope_section is not supported"),
        ({"full_attention": {"rope_theta": 1.0}}, "full_attention is not supported"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "yarn", "factor": -1}, "factor must be a positive number, got -1"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "short_factor must be a list of 32"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 31 + ["a"]},
            "short_factor must hold positive numbers",
        ),
        ({**LLAMA_31, "low_freq_factor": 4.0}, "low_freq_factor must be below"),
        ({"partial_rotary_factor": 0.71}, "must leave an even number of a head's 64"),
        ({"partial_rotary_factor": 1.5}, "must leave an even number of a head's 64"),
    ],
)
def test_scalings_that_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        rope_of({"rope_parameters": parameters}, 64)
    assert str(error.value).startswith("config.json")


def test_table_far_out() -> None:
    """Angles are float32 as in transformers: at 100,000 tokens that is 4 digits."""
    rope = RopeSpec(theta=500000.0)
    table = cos_sin_table(rope, 64, 100_001)[::50_000].double()
    angles = torch.outer(
        torch.tensor([0.0, 50_000.0, 100_000.0], dtype=torch.float64),
        500000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64),
    )
    expected = torch.cat([angles.cos(), angles.sin()], -1)
    torch.testing.assert_close(table, expected, rtol=0, atol=1.5e-2)
    torch.testing.assert_close(table[0], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({**YARN, "factor": 1e308}, "factor=1e\\+308 is too large"),
        ({**YARN, "rope_theta": 1.0}, "yarn needs a rope_theta above 1"),
        ({**YARN, "beta_fast": 1e-320}, "beta_fast and beta_slow between"),
        ({**YARN, "beta_slow": 1e308}, "beta_fast and beta_slow between"),
        (
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 1,
                "short_factor": [1.0] * 32,
                "long_factor": [1.0] * 32,
            },
            "original_max_position_embeddings must be at least 2",
        ),
    ],
)
def test_numbers_that_no_frequency_can_be_made_of(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rope_of({"rope_parameters": parameters}, 64)
