"""Keys and values moved between slots by the Triton kernels."""

import pytest
import torch

from kernels import reference
from kernels.triton.move_kv import move_kv
from tests.kernels.move_cases import copy_of, overlapping_moves, random_cache, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "head_dim"), [(2, 16, 64), (9, 8, 40), (1, 32, 128)]
)
def test_overlapping_moves(device, generator, dtype, kv_heads, block_size, head_dim):
    before = random_cache(dtype, (3, kv_heads, block_size, head_dim), generator)
    sources, targets = overlapping_moves(3 * block_size, 20, generator)
    expected, actual = copy_of(before), copy_of(before, device)
    reference.move_kv(expected, sources, targets)
    assert move_kv(actual, sources.to(device), targets.to(device))
    assert same_bits(actual, expected)
    assert not same_bits(actual, before)


def test_other_slots_are_declined(device, generator):
    cache = copy_of(random_cache(torch.bfloat16, (2, 1, 8, 16), generator), device)
    slots = torch.arange(3, device=device)
    assert not move_kv(cache, slots.int(), slots)
    assert not move_kv(cache, slots, slots[:2])
