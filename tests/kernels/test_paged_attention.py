"""Paged attention against the float64 reference: every mixture of decodes and prefill chunks."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import cpu, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@dataclass
class Case:
    q: torch.Tensor
    cache: ops.LayerCache
    tables: list[list[int]]
    metadata: ops.AttentionMetadata
    scale: float


def make_case(
    dtype: torch.dtype,
    head_dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    sequences: list[tuple[int, int]],
    generator: torch.Generator,
) -> Case:
    """Sequences are (new tokens, context). Slots outside every context are NaN."""
    counts = [-(-context // block_size) for _, context in sequences]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables: list[list[int]] = []
    for count in counts:
        tables.append(order[:count])
        order = order[count:]
    shape = (sum(counts) + 3, kv_heads, block_size, head_dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    for table, (_, context) in zip(tables, sequences, strict=True):
        for i, block in enumerate(table):
            used = min(block_size, context - i * block_size)
            for cache in caches:
                rows = torch.randn(kv_heads, used, head_dim, generator=generator)
                cache[block, :, :used] = rows.to(dtype)
    queries = [new for new, _ in sequences]
    metadata = ops.build_attention_metadata(tables, queries, [c for _, c in sequences], block_size)
    q = torch.randn(sum(queries), kv_heads * group, head_dim, generator=generator).to(dtype)
    return Case(q, ops.LayerCache(*caches), tables, metadata, head_dim**-0.5)


def check(case: Case, allowed: float | None = None) -> torch.Tensor:
    actual = ops.paged_attention(case.q, case.cache, case.metadata, case.scale)
    expected = reference.paged_attention(
        case.q.double(),
        ops.LayerCache(case.cache.keys.double(), case.cache.values.double()),
        case.metadata,
        case.scale,
    )
    assert actual.shape == case.q.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (allowed or RELATIVE_ERROR[case.q.dtype]), float(error)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(3, 3), (1, 8), (2, 1)])
def test_decodes_of_odd_lengths(backend, generator, dtype, head_dim, kv_heads, group):
    sequences = [(1, 1), (1, 17), (1, 256), (1, 300)]
    check(make_case(dtype, head_dim, kv_heads, group, 16, sequences, generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 128])
def test_decodes_mixed_with_prefill_chunks(backend, generator, dtype, block_size):
    sequences = [(1, 5), (1, 130), (7, 7), (33, 100), (2, 290), (40, 40)]
    check(make_case(dtype, 64, 2, 3, block_size, sequences, generator))


@pytest.mark.parametrize("group", [5, 16, 20])
def test_groups_wider_than_a_register_block(backend, generator, group):
    check(make_case(torch.bfloat16, 64, 1, group, 16, [(1, 40), (9, 50)], generator))


def test_a_long_context_is_split_and_merged(backend, generator):
    check(make_case(torch.bfloat16, 64, 1, 3, 16, [(1, 1500), (20, 1100)], generator))
    check(make_case(torch.float32, 64, 1, 3, 16, [(1, 1500)], generator))


def test_queries_in_a_view_of_a_fused_projection(backend, generator):
    case = make_case(torch.bfloat16, 64, 2, 2, 16, [(1, 20), (6, 30)], generator)
    fused = torch.randn(case.q.shape[0], 4 * 64 + 100, generator=generator).bfloat16()
    fused[:, : 4 * 64] = case.q.view(-1, 4 * 64)
    case.q = fused[:, : 4 * 64].view(-1, 4, 64)
    check(case)


def test_large_scores_do_not_overflow(backend, generator):
    case = make_case(torch.float32, 64, 1, 2, 16, [(1, 70), (12, 40)], generator)
    case.q *= 300
    check(case, allowed=1e-4)  # scores of hundreds carry float32 errors of 1e-5 into exp


def alone(case: Case, sequence: int, new: int, context: int) -> torch.Tensor:
    """The last ``new`` of ``context`` tokens of one sequence, with nobody else in the step."""
    metadata = ops.build_attention_metadata(
        [case.tables[sequence]], [new], [context], case.cache.block_size
    )
    before = case.metadata.context_lens_list[sequence] - context
    end = sum(case.metadata.query_lens[: sequence + 1]) - before
    return ops.paged_attention(case.q[end - new : end], case.cache, metadata, case.scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decode_does_not_depend_on_its_batch(generator, dtype):
    if not cpu.native_status().available:
        pytest.skip("plain PyTorch promises tolerance, not bits")
    case = make_case(dtype, 64, 3, 3, 16, [(1, 31), (1, 700), (1, 256)], generator)
    together = check(case)
    for i, context in enumerate(case.metadata.context_lens_list):
        assert torch.equal(alone(case, i, 1, context)[0], together[i])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    new=st.integers(2, 60),
    prefix=st.integers(0, 600),
    cut=st.integers(1, 59),
    block_size=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from([32, 64, 96]),
)
def test_chunking_does_not_change_a_bit(generator, new, prefix, cut, block_size, head_dim):
    """On AMX a token gets the same bits in any chunk, and as a decode."""
    if not cpu.has_amx():
        pytest.skip("needs AMX")
    case = make_case(torch.bfloat16, head_dim, 2, 3, block_size, [(new, prefix + new)], generator)
    whole = ops.paged_attention(case.q, case.cache, case.metadata, case.scale)
    cut = min(cut, new - 1)
    parts = torch.cat([alone(case, 0, cut, prefix + cut), alone(case, 0, new - cut, prefix + new)])
    assert torch.equal(parts, whole)
    assert torch.equal(alone(case, 0, 1, prefix + new)[0], whole[-1])


def test_metadata_refuses_impossible_lengths():
    with pytest.raises(ValueError, match="sequence 0: 3 new tokens"):
        ops.build_attention_metadata([[0]], [3], [2], 16)
    with pytest.raises(ValueError, match="sequence 1: 1 blocks of 16"):
        ops.build_attention_metadata([[0], [1]], [1, 1], [4, 17], 16)
