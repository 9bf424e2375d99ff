"""Decode attention: rows of tokens and heads, split contexts, caches of 8 bits, captured steps."""

from dataclasses import replace

import pytest
import torch

from kernels import ops
from kernels.triton import decode_attention as decode
from kernels.triton.attention import paged_attention
from tests.kernels.attention_cases import RELATIVE_ERROR, expected_of, make_case
from tests.kernels.triton.attention_on_device import attend, check, moved

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


def with_query_len(case, query_len):
    """The case with all sequences of at most so many new tokens as decodes."""
    old = case.metadata
    metadata = ops.build_attention_metadata(
        case.tables,
        old.query_lens,
        old.context_lens_list,
        case.cache.block_size,
        decode_query_len=query_len,
    )
    return replace(case, metadata=metadata)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "head_dim", "kv_heads", "group", "block_size", "window", "soft_cap"),
    [
        (BF16, None, 128, 2, 4, 16, 0, 0.0),
        (FP16, None, 64, 2, 7, 8, 37, 0.0),
        (FP32, None, 80, 1, 1, 32, 0, 5.0),
        (BF16, INT8, 256, 1, 8, 128, 0, 0.0),
        (FP16, E4M3, 128, 1, 16, 16, 0, 0.0),
        (BF16, E4M3, 80, 2, 1, 32, 50, 0.0),
        (FP16, INT8, 96, 1, 4, 8, 0, 30.0),
    ],
)
def test_decodes(
    device, generator, dtype, cache_dtype, head_dim, kv_heads, group, block_size, window, soft_cap
):
    contexts = [1, 16, int(torch.randint(100, 160, (), generator=generator)), 530]
    sequences = [(1, context) for context in contexts]
    case = make_case(
        dtype, head_dim, kv_heads, group, block_size, sequences, generator,
        cache_dtype, window, soft_cap,
    )  # fmt: skip
    check(case, device)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "group", "block_size", "window"),
    [
        (BF16, None, 4, 16, 0),
        (FP16, None, 7, 8, 21),
        (BF16, INT8, 1, 32, 0),
        (FP16, E4M3, 8, 128, 9),
    ],
)
def test_several_tokens_of_a_sequence(
    device, generator, dtype, cache_dtype, group, block_size, window
):
    sequences = [(3, 3), (1, 40), (4, 290), (2, 129), (4, 4), (17, 30)]
    case = make_case(dtype, 64, 1, group, block_size, sequences, generator, cache_dtype, window)
    case = with_query_len(case, 4)
    assert case.metadata.num_decodes == 5
    check(case, device)


@pytest.mark.parametrize(("cache_dtype", "window"), [(None, 0), (E4M3, 300)])
def test_the_number_of_stretches_changes_nothing(device, generator, cache_dtype, window):
    sequences = [(1, 700), (1, 3), (1, 257)]
    case = make_case(BF16, 64, 1, 4, 16, sequences, generator, cache_dtype, window)
    expected = expected_of(case)
    case = moved(case, device)
    outputs = []
    for splits in (1, 2, 5):
        out = torch.full_like(case.q, float("nan"))
        decode.decode_attention(
            case.q, case.cache, case.metadata, case.scale, case.window, 0.0, out, splits
        )
        error = (out.cpu().double() - expected).norm() / expected.norm()
        assert error < RELATIVE_ERROR[BF16]
        outputs.append(out.float())
    for out in outputs[1:]:
        assert (out - outputs[0]).norm() / outputs[0].norm() < RELATIVE_ERROR[BF16]


@pytest.mark.parametrize("query_len", [1, 3])
def test_captured_steps(device, generator, query_len):
    """Padding gets zeros, and the host's lists are those of the step that was captured."""
    sequences = [(query_len, 41), (1, 300)]
    case = make_case(BF16, 64, 2, 4, 16, sequences, generator)
    expected = expected_of(case)
    real = len(expected)
    step = with_query_len(case, query_len).metadata
    padding = 2
    tokens = (len(sequences) + padding) * query_len
    last = int(step.query_start[-1])
    starts = [min(last + i + 1, tokens) for i in range(padding)]
    page = next(i for i in range(case.cache.num_blocks) if not any(i in t for t in case.tables))
    unused = torch.full((padding, step.block_tables.shape[1]), page, dtype=torch.int32)
    metadata = replace(
        step,
        block_tables=torch.cat([step.block_tables, unused]),
        context_lens=torch.cat([step.context_lens, step.context_lens.new_zeros(padding)]),
        query_start=torch.cat([step.query_start, torch.tensor(starts, dtype=torch.int32)]),
        slots=torch.cat([step.slots, torch.full((tokens - real,), -1)]),
        query_lens=[query_len] * (len(sequences) + padding),
        context_lens_list=[query_len] * (len(sequences) + padding),
        num_decodes=len(sequences) + padding,
    )
    q = torch.cat([case.q, torch.full((tokens - real, *case.q.shape[1:]), float("nan"))])
    out = attend(moved(replace(case, q=q.to(BF16), metadata=metadata), device)).cpu()
    assert torch.equal(out[real:], torch.zeros_like(out[real:]))
    error = (out[:real].double() - expected).norm() / expected.norm()
    assert error < RELATIVE_ERROR[BF16]


@pytest.mark.parametrize(
    ("head_dim", "block_size", "q_dtype"), [(72, 16, BF16), (64, 12, BF16), (64, 16, FP16)]
)
def test_what_has_no_kernel_is_declined(device, generator, head_dim, block_size, q_dtype):
    case = moved(make_case(BF16, head_dim, 1, 2, block_size, [(1, 9)], generator), device)
    assert paged_attention(case.q.to(q_dtype), case.cache, case.metadata, 1.0, 0, 0.0) is None
