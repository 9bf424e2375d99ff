"""Attention of drafted trees: masks against the float64 reference, chains, and sequences alone."""

from dataclasses import replace

import pytest
import torch

from kernels import ops
from tests.kernels.attention_cases import attend, check, make_case
from tests.kernels.tree_cases import make_tree_case, masks_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
# Trees at the start, across a page, across a chunk of 256, of all 64 bits; chains; a long prompt.
SEQUENCES = [
    (1, 40, False),
    (1, 1, False),
    (5, 5, True),
    (9, 21, True),
    (16, 262, True),
    (64, 300, True),
    (33, 520, True),
    (2, 2, True),
    (7, 90, False),
    (100, 130, False),
]


def test_masks_see_paths():
    assert masks_of([-1, -1, 0, 1]) == [0b1, 0b11, 0b101, 0b1011, 0b10101]
    assert masks_of(list(range(-1, 62)))[-1] == -1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize(
    ("kv_heads", "group", "block_size", "soft_cap"), [(2, 3, 16, 0.0), (1, 1, 24, 3.0)]
)
def test_trees_beside_decodes_chains_and_prompts(
    backend, generator, dtype, cache_dtype, kv_heads, group, block_size, soft_cap
):
    case = make_tree_case(
        dtype, 64, kv_heads, group, block_size, SEQUENCES, generator, cache_dtype, soft_cap
    )
    check(case, allowed=6e-6 if dtype == torch.float32 else None)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("head_dim", "group"), [(32, 8), (80, 2), (128, 5), (256, 17)])
def test_heads_of_every_shape(backend, generator, cache_dtype, head_dim, group):
    sequences = [(1, 30, False), (6, 40, True), (12, 258, True), (3, 50, False)]
    check(
        make_tree_case(
            torch.bfloat16, head_dim, 1, group, 16, sequences, generator, cache_dtype, 20.0
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_felt(backend, generator, dtype):
    """With a tree's masks the result is another than with none, but for what sees all."""
    case = make_tree_case(dtype, 64, 2, 3, 16, [(1, 20, False), (9, 30, True)], generator)
    trees = case.metadata.trees
    assert trees is not None
    trees[1:] = torch.tensor(masks_of([-1, -1, -1, 0, 0, 1, 2, 2]))
    masked = attend(case, case.q, case.metadata)
    free = attend(case, case.q, replace(case.metadata, trees=None))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(masked[:3], free[:3], rtol=tolerance, atol=tolerance)
    differs = (masked.float() - free.float()).abs().amax((1, 2)) > 2e-2
    assert differs.tolist() == [False] * 3 + [True] * 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_a_mask_that_hides_nothing_changes_nothing(backend, generator, dtype, cache_dtype):
    sequences = [(1, 300), (5, 270), (70, 90), (16, 16)]
    case = make_case(dtype, 64, 2, 3, 16, sequences, generator, cache_dtype)
    free = attend(case, case.q, case.metadata)
    trees = torch.full((case.metadata.num_tokens,), -1)
    masked = attend(case, case.q, replace(case.metadata, trees=trees))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(masked, free, rtol=tolerance, atol=tolerance)


def test_a_window_beside_trees_is_refused(backend, generator):
    case = make_tree_case(torch.float32, 64, 1, 1, 16, [(3, 20, True)], generator)
    with pytest.raises(ValueError, match="trees has no window"):
        ops.paged_attention(case.q, case.cache, case.metadata, case.scale, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize(("group", "window"), [(3, 0), (4, 90), (17, 300)])
def test_a_drafted_token_gets_the_bits_of_a_decode(
    backend, generator, dtype, cache_dtype, group, window
):
    """What is verified is what would have been computed without a draft."""
    if backend == "plain":
        pytest.skip("plain PyTorch promises tolerance, not bits")
    lengths = [(1, 70), (5, 600), (34, 270), (2, 257), (9, 1100)]
    case = make_case(dtype, 64, 2, group, 16, lengths, generator, cache_dtype, window)
    together = check(case, allowed=6e-6 if dtype == torch.float32 else None)
    token = 0
    for i, (new, context) in enumerate(lengths):
        for nth in range(new):
            end = context - new + nth + 1
            metadata = ops.build_attention_metadata([case.tables[i]], [1], [end], 16)
            assert torch.equal(
                attend(case, case.q[token : token + 1], metadata)[0], together[token]
            )
            token += 1


def test_long_contexts_of_short_trees_are_split_and_merged(backend, generator):
    sequences = [(1, 1300, False), (6, 1500, True), (21, 1029, True), (22, 1029, True)]
    for dtype in (torch.bfloat16, torch.float32):
        check(make_tree_case(dtype, 64, 1, 3, 16, sequences, generator), allowed=None)
