"""The likeliest tokens and their shares against a softmax in double precision."""

from __future__ import annotations

import pytest
import torch

from kernels import cpu, sampling


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 4096), (5, 1003), (3, 7), (40, 2049)])
def test_random_rows(native: bool, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    logits = (torch.randn(rows, vocabulary) * 6).to(dtype)
    if native:
        tokens, shares = sampling.likeliest_shares(logits)
    else:
        with cpu.without_native():
            tokens, shares = sampling.likeliest_shares(logits)
    assert tokens.dtype == torch.int64
    assert shares.dtype == torch.float32
    wide = logits.double()
    assert torch.equal(tokens, wide.argmax(dim=1))  # the first of equals: 16-bit rows have some
    expected = wide.softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(shares.double(), expected, rtol=1e-5, atol=1e-12)


def test_rows_that_are_mostly_forbidden() -> None:
    logits = torch.full((2, 100), -torch.inf)
    logits[0, 17] = -3.0
    logits[1, [98, 99]] = 2.0
    tokens, shares = sampling.likeliest_shares(logits)
    assert tokens.tolist() == [17, 98]
    assert shares.tolist() == [1.0, 0.5]
    nothing, _ = sampling.likeliest_shares(torch.full((1, 100), torch.nan))
    assert 0 <= int(nothing) < 100
