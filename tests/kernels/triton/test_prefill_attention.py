"""Prefill attention: chunks over prefixes, alone and mixed with decodes."""

from dataclasses import replace

import pytest
import torch

from kernels import ops
from kernels.triton import prefill_attention as prefill
from kernels.triton import prefill_tiles, tuning
from tests.kernels.attention_cases import RELATIVE_ERROR, expected_of, make_case
from tests.kernels.triton.attention_on_device import attend, check, moved

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "head_dim", "kv_heads", "group", "block_size", "window", "soft_cap"),
    [
        (BF16, None, 128, 1, 4, 16, 0, 0.0),
        (FP16, None, 64, 2, 7, 8, 37, 0.0),
        (FP32, None, 80, 1, 1, 32, 0, 5.0),
        (BF16, INT8, 256, 1, 8, 128, 0, 0.0),
        (FP16, E4M3, 128, 1, 16, 16, 90, 0.0),
        (BF16, E4M3, 80, 2, 1, 32, 50, 20.0),
        (FP16, INT8, 96, 1, 4, 8, 0, 30.0),
    ],
)
def test_chunks_and_decodes(
    device, generator, dtype, cache_dtype, head_dim, kv_heads, group, block_size, window, soft_cap
):
    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    chunks = [draw(2, 40) for _ in range(3)]
    sequences = [(1, draw(1, 90)), (1, 1), (2, 2), (45, 45)]
    sequences += [(new, new + draw(0, 110)) for new in chunks]
    case = make_case(
        dtype,
        head_dim,
        kv_heads,
        group,
        block_size,
        sequences,
        generator,
        cache_dtype,
        window,
        soft_cap,
    )
    check(case, device)


@pytest.mark.parametrize(
    "tiles",
    [
        {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, "overlapped": 0},
        {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 2, "overlapped": 1},
    ],
)
def test_tiles_change_nothing(device, generator, tiles):
    """Many sequences of many tiles, with and without overlapping, pages longer than a tile."""
    sequences = [(5, 60), (33, 33), (1, 1), (8, 80), (2, 47)]
    for block_size, window in ((8, 20), (64, 0)):
        case = make_case(BF16, 64, 1, 3, block_size, sequences, generator, None, window)
        here = moved(case, device)
        problem = prefill_tiles.problem_of(here.q, here.cache, here.metadata)
        with tuning.forced({problem: tuning.Choice("triton", tiles)}):
            check(case, device)


def test_a_prompt_alone_computes_what_it_computes_among_others(device, generator):
    case = moved(make_case(BF16, 64, 1, 2, 16, [(40, 40), (30, 90)], generator), device)
    together = attend(case)
    metadata = ops.build_attention_metadata(case.tables[1:], [30], [90], 16, device)
    alone = replace(case, q=case.q[40:], metadata=metadata)
    assert torch.equal(attend(alone), together[40:])
    through_ops = ops.paged_attention(case.q, case.cache, case.metadata, case.scale)
    assert torch.equal(through_ops, together)


@pytest.mark.parametrize(
    ("splits", "dtype", "cache_dtype", "head_dim", "group", "block_size", "window", "soft_cap"),
    [
        (1, BF16, None, 64, 4, 16, 0, 0.0),
        (2, FP16, INT8, 128, 8, 8, 0, 0.0),
        (3, FP32, None, 80, 1, 32, 110, 5.0),
        (4, BF16, E4M3, 128, 3, 128, 75, 0.0),
        (5, BF16, None, 80, 2, 16, 0, 20.0),
        (5, BF16, None, 64, 4, 8, 150, 0.0),
    ],
)
def test_the_number_of_stretches_changes_nothing(
    device, generator, monkeypatch, splits, dtype, cache_dtype, head_dim, group, block_size,
    window, soft_cap,
):  # fmt: skip
    """Long and short contexts, stretches that some or all rows of a tile see nothing of."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    sequences = [(1, 70), (3, draw(400, 560)), (draw(20, 40), draw(200, 300)), (2, 2)]
    case = make_case(
        dtype, head_dim, 1, group, block_size, sequences, generator, cache_dtype, window, soft_cap
    )
    expected = expected_of(case)[1:]
    case = moved(case, device)
    monkeypatch.setattr(prefill, "LEAST_STRETCH", 32)
    out = torch.full_like(case.q, float("nan"))
    scale = case.scale
    prefill.prefill_attention(
        case.q, case.cache, case.metadata, scale, window, soft_cap, out, splits
    )
    assert out[0].isnan().all()  # of the decode
    error = (out[1:].cpu().double() - expected).norm() / expected.norm()
    assert error < RELATIVE_ERROR[dtype]
