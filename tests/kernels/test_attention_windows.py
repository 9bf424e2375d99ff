"""Windows and soft caps, in every dtype of the cache: what is seen, and what is never read."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import cpu
from tests.kernels.attention_cases import alone, attend, check, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
SEQUENCES = [(1, 1), (1, 37), (1, 600), (9, 9), (45, 330), (3, 520)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 24])
@pytest.mark.parametrize("window", [1, 5, 16, 100, 257, 4096])
def test_windows_shorter_and_longer_than_pages_and_contexts(
    backend, generator, dtype, block_size, window
):
    check(make_case(dtype, 64, 2, 3, block_size, SEQUENCES, generator, window=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
@pytest.mark.parametrize(
    ("window", "soft_cap", "block_size"), [(0, 0.0, 16), (33, 0.0, 16), (0, 5.0, 24), (300, 2.0, 8)]
)
def test_quantized_caches(backend, generator, dtype, cache_dtype, window, soft_cap, block_size):
    case = make_case(
        dtype, 64, 2, 3, block_size, SEQUENCES, generator, cache_dtype, window, soft_cap
    )
    check(case, allowed=4e-6 if dtype == torch.float32 else None)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *QUANTIZED])
@pytest.mark.parametrize("head_dim", [32, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 8), (2, 1), (1, 20)])
def test_heads_of_every_shape(backend, generator, cache_dtype, head_dim, kv_heads, group):
    sequences = [(1, 20), (1, 300), (7, 60)]
    case = make_case(
        torch.bfloat16, head_dim, kv_heads, group, 16, sequences, generator, cache_dtype, 50, 4.0
    )
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [0.5, 50.0])
def test_soft_caps(backend, generator, dtype, soft_cap):
    case = make_case(dtype, 64, 2, 2, 16, SEQUENCES, generator, soft_cap=soft_cap)
    case.q *= 20  # scores of tens, so that the cap is felt
    check(case, allowed=3e-5 if dtype == torch.float32 else 3e-2)


def test_a_window_of_the_whole_context_is_none(backend, generator):
    case = make_case(torch.bfloat16, 64, 2, 3, 16, SEQUENCES, generator)
    free = attend(case, case.q, case.metadata)
    case.window = 600
    torch.testing.assert_close(attend(case, case.q, case.metadata), free, rtol=2e-2, atol=2e-2)
    case.window = 300
    assert not torch.equal(attend(case, case.q, case.metadata), free)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *QUANTIZED])
def test_entries_before_the_window_may_name_any_page(backend, generator, cache_dtype):
    """The engine frees such pages, and others write to them."""
    sequences = [(1, 400), (20, 410)]
    case = make_case(
        torch.bfloat16, 64, 2, 3, 16, sequences, generator, cache_dtype=cache_dtype, window=70
    )
    before = check(case)
    for i, (new, context) in enumerate(sequences):
        unseen = (context - new - case.window + 1) // 16
        assert unseen > 10
        other = torch.tensor(case.tables[1 - i][:unseen], dtype=torch.int32)
        case.metadata.block_tables[i, :unseen] = other
    assert torch.equal(attend(case, case.q, case.metadata), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, *QUANTIZED])
@pytest.mark.parametrize("window", [0, 60, 300])
def test_a_decode_does_not_depend_on_its_batch(generator, dtype, cache_dtype, window):
    if not cpu.native_status().available:
        pytest.skip("plain PyTorch promises tolerance, not bits")
    lengths = [(1, 31), (1, 700), (1, 256)]
    case = make_case(dtype, 64, 3, 3, 16, lengths, generator, cache_dtype, window, 3.0)
    together = attend(case, case.q, case.metadata)
    for i, context in enumerate(case.metadata.context_lens_list):
        assert torch.equal(alone(case, i, 1, context)[0], together[i])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    new=st.integers(2, 200),
    prefix=st.integers(0, 600),
    cut=st.integers(1, 199),
    block_size=st.sampled_from([8, 16, 24, 32]),
    head_dim=st.sampled_from([32, 64, 96]),
    window=st.sampled_from([0, 1, 7, 32, 50, 256, 400]),
    soft_cap=st.sampled_from([0.0, 3.0]),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from([None, *QUANTIZED]),
    group=st.sampled_from([1, 3, 4, 5, 8, 17]),
)
def test_chunking_does_not_change_a_bit(
    generator, new, prefix, cut, block_size, head_dim, window, soft_cap, dtype, cache_dtype, group
):
    """A token gets the same bits in any chunk, and as a decode."""
    if not cpu.native_status().available:
        pytest.skip("plain PyTorch promises tolerance, not bits")
    sequence = [(new, prefix + new)]
    case = make_case(
        dtype,
        head_dim,
        2,
        group,
        block_size,
        sequence,
        generator,
        cache_dtype,
        window,
        soft_cap,
    )
    whole = attend(case, case.q, case.metadata)
    cut = min(cut, new - 1)
    parts = torch.cat([alone(case, 0, cut, prefix + cut), alone(case, 0, new - cut, prefix + new)])
    assert torch.equal(parts, whole)
    assert torch.equal(alone(case, 0, 1, prefix + new)[0], whole[-1])


def test_pages_beyond_the_context_are_not_read(backend, generator):
    """A table may be wider than its context, with any page in the rest."""
    case = make_case(torch.bfloat16, 64, 1, 2, 16, [(1, 40), (5, 40)], generator, torch.int8, 20)
    before = attend(case, case.q, case.metadata)
    wide = torch.full((2, 9), 1, dtype=torch.int32)
    wide[:, : case.metadata.block_tables.shape[1]] = case.metadata.block_tables
    case.metadata.block_tables = wide
    assert torch.equal(attend(case, case.q, case.metadata), before)
