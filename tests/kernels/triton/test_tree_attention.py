"""Attention of drafted trees by the Triton kernels, as decodes and as chunks."""

import pytest
import torch

from kernels.triton import decode_attention as decode
from kernels.triton import prefill_attention as prefill
from tests.kernels.attention_cases import RELATIVE_ERROR, expected_of
from tests.kernels.tree_cases import make_tree_case
from tests.kernels.triton.attention_on_device import attend, check, moved

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "head_dim", "group", "block_size", "soft_cap"),
    [
        (BF16, None, 64, 3, 16, 0.0),
        (FP32, None, 80, 1, 32, 5.0),
        (BF16, INT8, 128, 4, 8, 0.0),
        (FP16, E4M3, 64, 2, 16, 20.0),
    ],
)
@pytest.mark.parametrize("decode_query_len", [1, 8])
def test_trees_beside_decodes_chains_and_prompts(
    device, generator, dtype, cache_dtype, head_dim, group, block_size, soft_cap, decode_query_len
):
    sequences = [
        *((1, 40, False), (5, 5, True), (8, 137, True), (3, 30, False)),
        *((64, 90, True), (33, 100, True), (70, 75, False)),
    ]
    case = make_tree_case(
        dtype, head_dim, 1, group, block_size, sequences, generator, cache_dtype, soft_cap,
        decode_query_len,
    )  # fmt: skip
    assert case.metadata.num_decodes == (4 if decode_query_len == 8 else 1)
    check(case, device)


def test_bits_of_the_upper_half_are_read(device, generator):
    """The last of 64 tokens hides one that only its upper word tells of."""
    for query_len in (1, 64):
        case = make_tree_case(
            BF16, 64, 1, 1, 16, [(64, 70, True)], generator, decode_query_len=query_len
        )
        trees = case.metadata.trees
        assert trees is not None
        trees[:] = -1
        free = attend(moved(case, device)).cpu()
        trees[63] = ~(1 << 40)
        hidden = attend(moved(case, device)).cpu()
        assert torch.equal(hidden[:63], free[:63])
        assert not torch.equal(hidden[63], free[63])
        check(case, device)


@pytest.mark.parametrize("splits", [2, 5])
def test_split_contexts(device, generator, monkeypatch, splits):
    """Stretches of which a tree's row may see nothing, and the one that holds the tree."""
    sequences = [(6, 230, True), (17, 90, True), (12, 12, True)]
    for query_len, run in ((17, decode.decode_attention), (1, prefill.prefill_attention)):
        monkeypatch.setattr(decode, "LEAST_STRETCH", 32)
        monkeypatch.setattr(prefill, "LEAST_STRETCH", 32)
        case = make_tree_case(BF16, 64, 1, 2, 16, sequences, generator, decode_query_len=query_len)
        expected = expected_of(case)
        case = moved(case, device)
        out = torch.full_like(case.q, float("nan"))
        run(case.q, case.cache, case.metadata, case.scale, 0, 0.0, out, splits)
        error = (out.cpu().double() - expected).norm() / expected.norm()
        assert error < RELATIVE_ERROR[BF16]
