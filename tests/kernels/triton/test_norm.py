"""RMS norms against the float64 reference, and where they are rounded against plain PyTorch."""

import pytest
import torch

from kernels import ops, plain, reference
from kernels.triton import backend, norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A weight in x's dtype makes two roundings of half a step each, of which the product may take both.
TOLERANCE = {FP32: 3e-6, BF16: 2**-7, FP16: 2**-10}


def close(actual, expected, tolerance=None):
    tolerance = tolerance or TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance / 8)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "rows", "width"),
    [(FP32, FP32, 3, 80), (BF16, BF16, 2, 576), (BF16, FP32, 3, 33), (FP16, FP16, 1, 5120)],
)
def test_rms_norm_of_strided_rows(device, generator, dtype, weight_dtype, rows, width):
    wide = (torch.randn(rows, width + 24, generator=generator) * 3).to(dtype)
    weight = torch.randn(width, generator=generator).to(weight_dtype)
    x = wide.to(device)[:, 8 : width + 8]
    out = backend.rms_norm(x, None, weight.to(device), 1e-5)
    assert out.dtype == dtype
    once = torch.finfo(dtype).eps / 2 * 1.01 + 1e-6
    close(
        out,
        reference.rms_norm(wide[:, 8 : width + 8].double(), weight.double(), 1e-5),
        None if weight_dtype == dtype else once,
    )


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 640), (FP16, 96), (FP32, 45)])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_add_rms_norm_norms_the_rounded_sum(device, generator, dtype, width, wide_weight):
    x, residual = (torch.randn(3, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(FP32 if wide_weight else dtype)
    given, updated = x.to(device, copy=True), residual.to(device, copy=True)
    normed, returned = ops.add_rms_norm(given, updated, weight.to(device), 1e-6)
    total = residual + x
    assert returned is updated
    assert torch.equal(updated.cpu(), total)
    assert torch.equal(given.cpu(), x)
    expected = reference.rms_norm(total.double(), weight.double(), 1e-6)
    once = torch.finfo(dtype).eps / 2 * 1.01 + 1e-6
    close(normed, expected, once if wide_weight else None)


def test_a_weight_of_the_same_dtype_multiplies_what_was_rounded(device, generator):
    """Powers of two have exact norms, so both backends must round to the same bits."""
    signs = torch.randint(0, 2, (4, 64), generator=generator) * 2 - 1
    x = (signs * 2.0).bfloat16()
    weight = torch.randn(64, generator=generator).bfloat16()
    # 2 / sqrt(4 + 5) = 2/3 is no bfloat16: rounding before or after the product tells.
    out = backend.rms_norm(x.to(device), None, weight.to(device), 5.0).cpu()
    assert torch.equal(out, plain.rms_norm(x, weight, 5.0))
    assert not torch.equal(out, plain.rms_norm(x, weight.float(), 5.0))
    wide = backend.rms_norm(x.to(device), None, weight.float().to(device), 5.0).cpu()
    assert torch.equal(wide, plain.rms_norm(x, weight.float(), 5.0))


@pytest.mark.parametrize(
    ("dtype", "wide_weight", "tokens", "heads", "head_dim"),
    [
        (BF16, False, 3, 5, 128),
        (FP16, True, 4, 3, 80),
        (FP32, False, 2, 7, 96),
        (BF16, True, 1, 9, 256),
    ],
)
def test_head_rms_norm_in_a_view_of_a_fused_projection(
    device, generator, dtype, wide_weight, tokens, heads, head_dim
):
    fused = torch.randn(tokens, (heads + 3) * head_dim, generator=generator).to(dtype)
    weight = torch.randn(head_dim, generator=generator).to(FP32 if wide_weight else dtype)
    held = fused.to(device, copy=True)
    x = held.view(tokens, -1, head_dim).narrow(1, 1, heads)
    assert backend.head_rms_norm(x, weight.to(device), 1e-6)
    before = fused.view(tokens, -1, head_dim)
    expected = reference.rms_norm(before.narrow(1, 1, heads).double(), weight.double(), 1e-6)
    close(x, expected)
    after = held.cpu().view(tokens, -1, head_dim)
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, heads + 1 :], before[:, heads + 1 :])


def test_what_the_kernels_do_not_take_is_declined_untouched(device, generator):
    x = torch.randn(2, 8, 6, generator=generator).to(device)
    weight = torch.ones(6, device=device)
    kept = x.clone()
    assert not backend.head_rms_norm(x.transpose(1, 2), torch.ones(8, device=device), 1e-6)
    assert not backend.head_rms_norm(x.double(), weight.double(), 1e-6)
    assert backend.rms_norm(x[0].t(), None, torch.ones(8, device=device), 1e-6) is None
    assert backend.rms_norm(x[0], x[1].half(), weight, 1e-6) is None
    too_wide = torch.ones(1, norm.WIDEST_ROW + 1, device=device)
    assert backend.rms_norm(too_wide, None, too_wide[0], 1e-6) is None
    assert torch.equal(x, kept)
    assert ops.rms_norm(x[0].t(), torch.ones(8, device=device), 1e-6).shape == (6, 8)


def test_no_rows(device):
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    assert backend.rms_norm(x, None, weight, 1e-6).shape == (0, 64)
    assert backend.head_rms_norm(x.view(0, 2, 32), weight[:32], 1e-6)
