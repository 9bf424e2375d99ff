"""Which steps an engine runs before it serves."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.warmup import sizes_up_to, warmup_batches
from kernels.triton.tuning import round_rows


def test_sizes() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(20) == [1, 2, 3, 4, 7, 8, 15, 16, 20]
    for most in (5, 64, 100):
        assert {round_rows(n) for n in range(1, most + 1)} == set(
            map(round_rows, sizes_up_to(most))
        )


@pytest.mark.parametrize("max_model_len", [1, 2, 40, 5000])
@pytest.mark.parametrize("captured", [0, 8, 256])
def test_every_step_is_one_that_the_engine_may_run(max_model_len: int, captured: int) -> None:
    config = EngineConfig(max_num_seqs=30, max_num_batched_tokens=100, block_size=16)
    batches = list(
        warmup_batches(config, max_model_len, [0, 1], compiles=True, most_captured=captured)
    )
    for batch in batches:
        assert 1 <= len(batch.sequences) <= 30
        assert batch.num_tokens <= 100
        assert len({s.request.request_id for s in batch.sequences}) == len(batch.sequences)
        for i, s in enumerate(batch.sequences):
            assert s.samples
            assert s.end == len(s.request.token_ids) < max_model_len
            assert (s.num_tokens == 1) or i >= batch.num_decodes
            for table in s.request.tables.groups:
                assert len(table) * 16 >= s.end
    if max_model_len == 1:
        assert batches == []
        return
    steps = {b.num_tokens for b in batches}
    assert steps >= {n for n in sizes_up_to(100) if n <= 30 * (max_model_len - 1)}
    eager = {len(b.sequences) for b in batches if b.num_decodes and b.sequences[0].end > 1}
    if max_model_len > 2:
        assert eager == {1, 2} | {n for n in sizes_up_to(30) if n > captured}
    chunks = {b.num_tokens for b in batches if b.sequences[0].start and not b.num_decodes}
    assert chunks == {n for n in (16, 100) if n < max_model_len - 1}  # after a long prefix
    longest = max(b.sequences[0].end for b in batches if b.num_decodes == 1)
    assert longest == (min(3, max_model_len - 1) if captured else max_model_len - 1)
    assert {b.sequences[0].request.sampling.top_k for b in batches} == {0, 40}


def test_without_compiling_two_steps_do() -> None:
    batches = list(warmup_batches(EngineConfig(), 100, [0], compiles=False))
    assert [(b.num_tokens, b.num_decodes) for b in batches] == [(2, 0), (1, 1)]
    assert list(warmup_batches(EngineConfig(), 1, [0], compiles=False)) == []
