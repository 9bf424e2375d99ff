"""Int8 by channel: sums exact, scales and outliers against the reference, every path alike."""

import pytest
import torch

from kernels import ops, plain_linear, reference
from kernels.triton import int8_linear, tuning
from kernels.triton.runtime import INTERPRETED
from kernels.triton.scaled_matmul import scaled_matmul
from kernels.triton.tuning import Choice

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SMALL = {"block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 2}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def weight_of(n: int, k: int, device: torch.device, bias: bool, dtype: torch.dtype, **more: float):
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scales = torch.rand(n, device=device) * 0.1 + 0.01
    added = torch.randn(n, dtype=dtype, device=device) if bias else None
    return ops.pack_int8(q, scales, added, **more)


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("splits", [1, 3])
def test_sums_are_the_integers_exactly(device: torch.device, swap: int, splits: int) -> None:
    m, n, k = 19, 40, 208
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    ones = torch.ones(max(m, n), device=device)
    tile = {**SMALL, "swap": swap, "splits": splits, "block_m": 16}
    out = scaled_matmul(x, ones[:m], w, ones[:n], None, torch.float32, tile)
    assert torch.equal(out.long().cpu(), x.cpu().long() @ w.cpu().long().t())


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "bias"),
    [
        (1, 72, 528, torch.bfloat16, True),
        (70, 130, 128, torch.float16, False),
        (5, 64, 144, torch.float32, True),
    ],
)
def test_linear(device, m, n, k, dtype, bias) -> None:
    weight = weight_of(n, k, device, bias, dtype)
    assert weight.layout == "triton"
    x = torch.randn(m, k + 16, device=device).to(dtype)[:, :k]
    x[m // 2] = 0
    added = None if weight.bias is None else weight.bias.cpu().double()
    expected = reference.int8_linear(x.cpu().double(), ops.dequantize(weight).cpu().double())
    expected = expected if added is None else expected + added
    assert error(ops.linear(x, weight), expected) < TOLERANCE[dtype]
    assert ops.linear(x[:0], weight).shape == (0, n)


def test_the_vendors_product_is_the_same(device: torch.device) -> None:
    weight = weight_of(48, 160, device, True, torch.float32)
    x = torch.randn(7, 160, device=device)
    with tuning.recording() as asked:
        mine = ops.linear(x, weight)
    (problem,) = asked
    assert Choice("int_mm") in int8_linear.choices(problem, INTERPRETED)
    with tuning.forced({problem: Choice("int_mm")}):
        theirs = ops.linear(x, weight)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("m", "splits", "swap"), [(3, 1, 1), (20, 2, 0)])
def test_outliers_stay_in_floating_point(device, m: int, splits: int, swap: int) -> None:
    """Elements at or above the threshold, in some chunks of K only, on the edge and at the end."""
    n, k, threshold = 40, 1600, 4.0
    weight = weight_of(n, k, device, True, torch.float16, outlier_threshold=threshold)
    x = torch.rand(m, k, device=device).mul_(2).sub_(1)
    x[0, 3], x[-1, -1], x[m // 2, 600], x[0, 4] = 50.0, -70.0, threshold, 3.9
    x = x.half()
    q, _, words = int8_linear.split_outliers(x, threshold)
    plain = plain_linear.split_outliers(x, threshold)
    assert plain is not None
    assert torch.equal(q, plain_linear.quantize_rows(plain[0])[0])
    held = (x.cpu().abs() >= threshold).nonzero().tolist()
    expected_words = [0] * m
    for row, column in held:
        expected_words[row] |= 1 << (column // 512)
    assert words.tolist() == expected_words
    tile = {**SMALL, "swap": swap, "splits": splits, "block_m": 16}
    with tuning.recording() as asked:
        ops.linear(x, weight)
    (problem,) = asked
    with tuning.forced({problem: Choice("triton", tile)}):
        out = ops.linear(x, weight)
    exact = reference.int8_linear(
        x.cpu().double(), ops.dequantize(weight).cpu().double(), threshold
    )
    assert weight.bias is not None
    assert error(out, exact + weight.bias.cpu().double()) < TOLERANCE[torch.float16]


def test_odd_columns_stay_plain(device: torch.device) -> None:
    assert weight_of(8, 40, device, False, torch.float32).layout == "plain"
