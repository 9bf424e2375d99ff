"""Prefill attention: chunks over prefixes, alone and mixed with decodes."""

import pytest
import torch

from tests.kernels.attention_cases import make_case
from tests.kernels.triton.attention_on_device import check

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
    sequences = [(1, 70), (1, 1), (2, 2), (45, 45), (19, 150), (3, 131)]
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
