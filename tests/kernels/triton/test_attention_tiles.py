"""How attention's tiles and the splitting of contexts are chosen."""

import pytest

from kernels.metadata import build_attention_metadata
from kernels.triton import decode_tiles, prefill_tiles
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Problem, candidates


def test_stretches_fill_waves():
    assert decode_tiles.splits_of(programs=512, longest=64, slots=264) == 1
    assert decode_tiles.splits_of(programs=264, longest=1 << 17, slots=264) == 1
    assert decode_tiles.splits_of(programs=8, longest=1 << 17, slots=264) == 32
    assert decode_tiles.splits_of(programs=8, longest=2048, slots=264) <= 8


def splits_for(sequences, kv_heads, window=0, before=()):
    """How a model of groups of 4 splits prefills of (new tokens, context) on 132 processors."""
    facts = DeviceFacts("", (9, 0), 132, 232_448)
    lengths = [[length[i] for length in (*before, *sequences)] for i in (0, 1)]
    tables = [[0] * -(-context // 128) for context in lengths[1]]
    metadata = build_attention_metadata(tables, *lengths, 128)
    sizes = (128, 4, 128, min(1024, max(new for new, _ in sequences)))
    problem = Problem("prefill_attention", sizes, ("torch.bfloat16", "torch.bfloat16"))
    tiles = prefill_tiles.default_choice(problem, facts).tiles
    return prefill_tiles.splits_for(problem, tiles, metadata, 4 * kv_heads, kv_heads, window, facts)


def test_prefills_are_split_where_their_tiles_leave_a_device_underfilled(monkeypatch):
    assert splits_for([(64, 32_768)], kv_heads=8) == 8  # 16 programs without
    assert splits_for([(64, 32_768)], kv_heads=8, before=[(1, 90_000)] * 40) == 8
    assert splits_for([(8, 65_536)], kv_heads=1) == 61  # of 64: fewer waste as little
    assert splits_for([(64, 1600)], kv_heads=8) == 3
    assert splits_for([(64, 32_768)], kv_heads=8, window=1024) == 2
    # Full, short, and more to merge than there may be.
    assert splits_for([(4096, 4096)], kv_heads=8) == 1
    assert splits_for([(64, 32_768)] * 9, kv_heads=8) == 1
    assert splits_for([(64, 900), (20, 1000)], kv_heads=2) == 1
    monkeypatch.setattr(prefill_tiles, "MOST_SCRATCH", 64 * 32 * (128 + 1) * 4 * 5)
    assert splits_for([(64, 32_768)], kv_heads=8) == 5


@pytest.mark.parametrize("shared_memory", [101_376, 232_448])
@pytest.mark.parametrize("tiles", [decode_tiles, prefill_tiles])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8", "float32"])
def test_candidates_start_with_the_default_and_fit(shared_memory, tiles, cache_dtype):
    facts = DeviceFacts("", (8, 9) if shared_memory < 150_000 else (9, 0), 132, shared_memory)
    decodes = tiles is decode_tiles
    kernel = "decode_attention" if decodes else "prefill_attention"
    sizes = (256, 16, 16, 512, 8192) if decodes else (256, 8, 16, 1024)
    problem = Problem(kernel, sizes, ("torch.bfloat16", f"torch.{cache_dtype}"))
    found = candidates(problem, facts)
    assert found[0] == tiles.default_choice(problem, facts)
    assert 1 <= len(found) <= 12
    assert len({tuple(c.tiles.items()) for c in found}) == len(found)
    # Two stages of keys and of values are the least that is in shared memory at a time.
    row = 256 * {"int8": 1, "bfloat16": 2, "float32": 4}[cache_dtype]
    assert all(2 * c.tiles["block_n"] * row <= facts.shared_memory for c in found)


@pytest.mark.parametrize(("head_dim", "rows"), [(256, 64), (128, 128), (64, 128), (256, 16)])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_decodes_of_many_rows_fit_the_least_shared_memory(head_dim, rows, cache_dtype):
    facts = DeviceFacts("", (8, 9), 142, 101_376)
    sizes = (head_dim, rows, 16, 512, 8192)
    problem = Problem("decode_attention", sizes, ("torch.bfloat16", f"torch.{cache_dtype}"))
    tiles = decode_tiles.default_choice(problem, facts).tiles
    # Keys and values of all stages but one, the queries, and the weights.
    row = head_dim * (1 if cache_dtype == "int8" else 2)
    cached = 2 * tiles["block_n"] * row * (tiles["num_stages"] - 1)
    assert cached + rows * (row + 4 * tiles["block_n"]) <= facts.shared_memory
