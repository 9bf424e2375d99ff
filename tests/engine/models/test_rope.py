"""Rotary frequencies against transformers' and, for the table, against float64."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.config_fields import ConfigFields
from engine.models.read_rope import read_rope
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


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        LLAMA_31,
        LLAMA_32,
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_transformers(parameters: dict[str, float], head_dim: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config).inv_freq
    spec, _ = read_rope(
        ConfigFields({"rope_parameters": parameters}, "config.json"), head_dim, 131072, 1e4
    )
    torch.testing.assert_close(inverse_frequencies(spec, head_dim), theirs, rtol=1e-6, atol=0)


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
