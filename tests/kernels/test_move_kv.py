"""Keys and values moved between slots: the reference's bits, though moves overlap."""

import pytest
import torch

from kernels import ops, reference
from tests.kernels.move_cases import copy_of, overlapping_moves, random_cache, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "head_dim"), [(2, 16, 64), (3, 8, 40), (1, 24, 5)]
)
def test_overlapping_moves(backend, generator, dtype, kv_heads, block_size, head_dim):
    before = random_cache(dtype, (4, kv_heads, block_size, head_dim), generator)
    sources, targets = overlapping_moves(4 * block_size, 25, generator)
    expected, actual = copy_of(before), copy_of(before)
    reference.move_kv(expected, sources, targets)
    ops.move_kv(actual, sources, targets)
    assert same_bits(actual, expected)
    assert not same_bits(actual, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_rotation_and_what_is_moved_nowhere(backend, generator, dtype):
    cache = random_cache(dtype, (2, 2, 8, 16), generator)
    before = copy_of(cache)
    ops.move_kv(cache, torch.tensor([1, 2, 9, -1, 5]), torch.tensor([2, 9, 1, 4, -1]))
    for source, target in ((1, 2), (2, 9), (9, 1), (4, 4), (5, 5), (0, 0), (15, 15)):
        a = cache.keys[target // 8, :, target % 8]
        assert torch.equal(a, before.keys[source // 8, :, source % 8])
    ops.move_kv(cache, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def test_a_token_moved_is_the_token_written_there(backend, generator):
    """What attention reads of an accepted token is what it would have read without drafts."""
    k, v = (torch.randn(1, 2, 32, generator=generator).bfloat16() for _ in range(2))
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        moved, written = (ops.LayerCache.allocate((2, 2, 8, 32), dtype) for _ in range(2))
        ops.write_kv(k, v, moved, torch.tensor([13]))
        ops.move_kv(moved, torch.tensor([13]), torch.tensor([7]))
        ops.write_kv(k, v, written, torch.tensor([7]))
        ops.write_kv(k, v, written, torch.tensor([13]))
        assert same_bits(moved, written)
