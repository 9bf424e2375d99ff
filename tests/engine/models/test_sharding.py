"""A model divided among ranks says what the whole one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.models.sharding import Shard
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


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_token_is_on_one_rank(vocabulary: int, size: int) -> None:
    shards = [Shard(rank, size) for rank in range(size)]
    runs = [shard.vocabulary(vocabulary) for shard in shards]
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(vocabulary))
    # Logits are gathered as if all had as many rows, of which the last may be missing.
    each = shards[0].vocabulary_rows(vocabulary)
    assert [run.start for run in runs] == [min(rank * each, vocabulary) for rank in range(size)]


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 16), st.integers(1, 8))
def test_query_heads_have_their_key_heads(size: int, kv_heads: int, group: int) -> None:
    heads = kv_heads * group
    assume(heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0))
    for rank in range(size):
        shard = Shard(rank, size)
        own, kv = shard.of(heads), shard.kv_heads(kv_heads)
        # As attention maps them on this rank, and as the whole model does.
        local = len(own) // len(kv)
        for place, head in enumerate(range(own.start, own.stop)):
            assert kv.start + place // local == head // group
