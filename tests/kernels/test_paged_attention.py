"""Paged attention against the float64 reference: every mixture of decodes and prefill chunks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import cpu, ops
from tests.kernels.attention_cases import alone, attend, check, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_not_left_out(backend, generator, dtype):
    """The last position seen is alone in its part of the context."""
    case = make_case(dtype, 64, 2, 3, 16, [(1, 257), (1, 100), (3, 513)], generator)
    for sequence, context in ((0, 257), (2, 513)):
        page = case.tables[sequence][(context - 1) // 16]
        case.cache.keys[page, :, (context - 1) % 16] = float("nan")
    out = attend(case, case.q, case.metadata)
    assert out[[0, 4]].isnan().all()
    assert not out[[1, 2, 3]].isnan().any()


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
    new=st.integers(2, 200),
    prefix=st.integers(0, 600),
    cut=st.integers(1, 199),
    block_size=st.sampled_from([8, 16, 32]),
    head_dim=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from(DTYPES),
)
def test_chunking_does_not_change_a_bit(generator, new, prefix, cut, block_size, head_dim, dtype):
    """A token gets the same bits in any chunk, and as a decode."""
    if not cpu.native_status().available:
        pytest.skip("plain PyTorch promises tolerance, not bits")
    case = make_case(dtype, head_dim, 2, 3, block_size, [(new, prefix + new)], generator)
    whole = attend(case, case.q, case.metadata)
    cut = min(cut, new - 1)
    parts = torch.cat([alone(case, 0, cut, prefix + cut), alone(case, 0, new - cut, prefix + new)])
    assert torch.equal(parts, whole)
    assert torch.equal(alone(case, 0, 1, prefix + new)[0], whole[-1])


def test_metadata_refuses_impossible_lengths():
    with pytest.raises(ValueError, match="sequence 0: 3 new tokens"):
        ops.build_attention_metadata([[0]], [3], [2], 16)
    with pytest.raises(ValueError, match="sequence 1: 1 blocks of 16"):
        ops.build_attention_metadata([[0], [1]], [1, 1], [4, 17], 16)
