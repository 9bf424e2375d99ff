"""The repaired interpreter: without exact conversions no kernel's test would mean anything."""

import pytest
import torch
import triton
import triton.language as tl

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@triton.jit
def _copy_kernel(source, target, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(target + i, tl.load(source + i).to(target.dtype.element_ty))


@triton.jit
def _product_kernel(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + i, tl.dot(tl.load(a + i), tl.load(b + i), input_precision="ieee"))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_conversions_round_to_nearest_even(device, source, target):
    x = (torch.randn(1024) * torch.exp2(torch.randint(-6, 7, (1024,)))).to(source).to(device)
    out = torch.empty(1024, dtype=target, device=device)
    _copy_kernel[(1,)](x, out, 1024)
    assert torch.equal(out.float(), x.float().clamp(-448, 448).to(target).float()) or torch.equal(
        out.float(), x.to(target).float()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_products(device, dtype):
    a, b = (torch.randn(32, 32).mul(9).to(dtype).to(device) for _ in range(2))
    wide = torch.int32 if dtype == torch.int8 else torch.float32
    out = torch.empty(32, 32, dtype=wide, device=device)
    _product_kernel[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-3)
