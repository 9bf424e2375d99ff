"""How attention's tiles and the splitting of contexts are chosen."""

import pytest

from kernels.triton import decode_tiles, prefill_tiles
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Problem, candidates


def test_stretches_fill_waves():
    assert decode_tiles.splits_of(programs=512, longest=64, slots=264) == 1
    assert decode_tiles.splits_of(programs=264, longest=1 << 17, slots=264) == 1
    assert decode_tiles.splits_of(programs=8, longest=1 << 17, slots=264) == 32
    assert decode_tiles.splits_of(programs=8, longest=2048, slots=264) <= 8


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
