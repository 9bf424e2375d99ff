"""Decode attention: rows of tokens and heads, split contexts, caches of 8 bits."""

import pytest
import torch

from tests.kernels.attention_cases import make_case
from tests.kernels.triton.attention_on_device import check

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


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
    contexts = [1, 16, 131, 600]
    case = make_case(
        dtype, head_dim, kv_heads, group, block_size, [(1, c) for c in contexts], generator,
        cache_dtype, window, soft_cap,
    )  # fmt: skip
    check(case, device)
