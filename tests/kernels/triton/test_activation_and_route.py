"""Gated activations and the routing to experts."""

import pytest
import torch

from kernels import ops, reference
from kernels.triton import backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {FP32: 3e-6, BF16: 2**-7, FP16: 2**-10}  # two roundings


@pytest.mark.parametrize(
    ("dtype", "kind", "rows", "width"),
    [
        (FP32, "silu", 3, 37),
        (BF16, "silu", 2, 1536),
        (FP16, "none", 2, 700),
        (FP32, "none", 1, 96),
        (BF16, "tanh", 3, 80),
        (FP32, "tanh", 1, 600),
    ],
)
def test_gated_activations_of_strided_rows(device, generator, dtype, kind, rows, width):
    wide = (torch.randn(rows, 2 * width + 16, generator=generator) * 4).to(dtype)
    x = wide.to(device)[:, 16:]
    if kind == "silu":
        out = backend.silu_and_mul(x)
        expected = reference.silu_and_mul(wide[:, 16:].double())
    else:
        out = backend.gelu_and_mul(x, kind)
        expected = reference.gelu_and_mul(wide[:, 16:].double(), kind)
    assert out.dtype == dtype
    assert out.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["silu", "none", "tanh"])
def test_activations_saturate_without_nan(device, kind):
    x = torch.tensor([[-1e4] * 20 + [1000.0] * 20 + [2.0] * 40], device=device)
    out = backend.silu_and_mul(x) if kind == "silu" else backend.gelu_and_mul(x, kind)
    expected = torch.tensor([[0.0] * 20 + [2000.0] * 20])
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "experts", "top_k", "normalize"),
    [(FP32, 8, 2, True), (BF16, 60, 4, False), (FP16, 5, 5, True), (FP32, 1, 1, False)],
)
def test_route(device, generator, dtype, experts, top_k, normalize):
    # Every logit its own, so that there is one right choice.
    logits = torch.stack([torch.randperm(experts, generator=generator) for _ in range(5)])
    logits = (logits / 8 - 2).to(dtype)
    held = torch.cat([logits, logits], 1).to(device)[:, :experts]
    weights, chosen = ops.route(held, top_k, normalize)
    expected_weights, expected = reference.route(logits.double(), top_k, normalize)
    assert torch.equal(chosen.cpu(), expected)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.cpu().double(), expected_weights, rtol=3e-6, atol=1e-7)


def test_no_token_takes_an_expert_twice_or_one_that_is_not_there(device):
    """Whatever the logits are: an expert out of range would be read out of bounds."""
    inf, nan = float("inf"), float("nan")
    rows = [[-inf] * 6, [nan] * 6, [1.0] * 6, [0.0, -inf, 3.0, -inf, -inf, -inf], [-nan] * 6]
    _, chosen = backend.route(torch.tensor(rows, device=device), 4, True)
    for row in chosen.tolist():
        assert len(set(row)) == 4
        assert all(0 <= expert < 6 for expert in row)
    assert chosen[2].tolist() == [0, 1, 2, 3]
    assert chosen[3, :2].tolist() == [2, 0]
