"""A model divided among ranks says what the whole one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.rank_threads import parallel_logits
from tests.engine.tiny_llama import VARIANTS, make_tiny_llama
from tests.engine.tiny_models import TinyModel, make_tiny

TOKENS = torch.randint(0, 128, (21,), generator=torch.Generator().manual_seed(7)).tolist()
CHUNKS = [9, 7, 1, 4]

# (how many ranks, the model and what is changed of it)
CASES: list[tuple[int, str, dict[str, Any]]] = [
    (2, "llama", {}),
    (4, "llama", {"num_key_value_heads": 2, "vocab_size": 130}),
    (4, "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    (2, "qwen2_tied_yarn", {"vocab_size": 141}),
    (2, "qwen3_window", {}),
    (2, "phi3", {}),
    (4, "phi3_tied", {"num_key_value_heads": 2}),
    (2, "gemma2_uncapped", {}),
    (2, "gemma3_images", {}),
    (2, "mixtral", {}),
    (4, "qwen3_moe_sparse", {}),
]


@pytest.mark.parametrize(("size", "case", "config"), CASES, ids=lambda x: str(x)[:20])
def test_every_family_is_divided(
    tmp_path: Path, size: int, case: str, config: dict[str, Any]
) -> None:
    check(make_tiny(case, tmp_path / "model", **config), size, tmp_path / "meeting")


def test_biases_are_added_once(tmp_path: Path) -> None:
    check(make_tiny_llama(tmp_path / "model", **VARIANTS["biased"]), 2, tmp_path / "meeting")


def check(tiny: TinyModel, size: int, meeting: Path) -> None:
    found = parallel_logits(tiny.folder, size, meeting, TOKENS, CHUNKS)
    expected = tiny.logits(TOKENS)
    scale = float(expected.abs().max())
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5 * scale)
        assert torch.equal(logits, found[0])  # all ranks would choose the same token
