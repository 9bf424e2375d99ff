"""FP8 by channel and by blocks, activations rounded by rows, by blocks and by a given scale."""

import pytest
import torch

from kernels import ops, plain_linear, reference
from kernels.triton import fp8_linear, scaled_tiles, tuning
from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import Choice, Problem

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
OLD = DeviceFacts("old", (8, 0), 8, 166_912)
NEW = DeviceFacts("new", (9, 0), 132, 232_448)
SMALL = {"block_m": 16, "block_n": 32, "block_k": 64, "num_warps": 4, "num_stages": 2}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def weight_of(n, k, device, activations="dynamic", block=None, bias=None):
    data = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    shape = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
    scales = torch.rand(shape, device=device) + 0.1
    static = torch.full((1,), 2.0**-8, device=device) if activations == "static" else None
    added = None if bias is None else torch.randn(n, dtype=bias, device=device)
    return ops.pack_fp8(data, scales, added, block, activations, static)


def exact(x: torch.Tensor, weight: ops.Fp8Weight) -> torch.Tensor:
    """In float64, of the activations' codes."""
    wide, block = x.cpu().double(), weight.block_shape
    if weight.activations == "static":
        rounded = reference.round_e4m3(wide * 2**8) / 2**8
    else:
        rounded = reference.fp8_rows(wide, 0 if block is None else block[1])
    bias = None if weight.bias is None else weight.bias.cpu().double()
    return reference.linear(rounded, ops.dequantize(weight).cpu().double(), bias)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "activations", "block"),
    [
        (1, 72, 528, torch.bfloat16, "dynamic", None),
        (70, 130, 144, torch.float32, "static", None),
        (5, 64, 128, torch.float16, "static", (32, 64)),
        (3, 150, 208, torch.float32, "dynamic", (128, 128)),
        (66, 48, 96, torch.bfloat16, "dynamic", (16, 32)),
    ],
)
def test_linear(device, monkeypatch, old, m, n, k, dtype, activations, block) -> None:
    """With e4m3 of the device's own, and widened as on devices that have none."""
    if old:
        if device.type == "cuda":
            pytest.skip("the GPU is what it is")
        monkeypatch.setattr(fp8_linear, "facts_of", lambda _: OLD)
    weight = weight_of(n, k, device, activations, block, dtype)
    assert weight.layout == "triton"
    x = torch.randn(m, k + 16, device=device).to(dtype)[:, :k]
    x[m // 2] = 0
    out = ops.linear(x, weight)
    assert out.dtype == dtype
    assert error(out, exact(x, weight)) < TOLERANCE[dtype]
    assert ops.linear(x[:0], weight).shape == (0, n)


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("block", [None, (64, 64)])
def test_tiles_change_nothing(device, block, splits: int, swap: int) -> None:
    weight = weight_of(40, 208, device, "dynamic", block, torch.float32)
    x = torch.randn(19, 208, device=device)
    with tuning.recording() as asked:
        ops.linear(x, weight)
    (problem,) = asked
    tile = {**SMALL, "swap": swap, "splits": splits}
    with tuning.forced({problem: Choice("triton", tile)}):
        assert error(ops.linear(x, weight), exact(x, weight)) < 2e-6


def test_static_rounding_saturates_and_is_each_experts(device) -> None:
    x = torch.randn(3, 200, device=device).mul_(30).half()
    x[0, 0], x[1, 1] = 6e4, float("nan")
    scales = torch.tensor([0.03, 0.5], device=device)
    chosen = torch.tensor([[1, 0], [0, 1], [0, 0]], device=device)
    rounded = fp8_linear.round_by_scale(x, scales, chosen).float().view(3, 2, 200)
    one = fp8_linear.round_by_scale(x, scales[:1]).float()
    for token, taken in enumerate(chosen.tolist()):
        for choice, expert in enumerate(taken):
            expected = plain_linear._round_e4m3(x[token].float() / scales[expert])
            torch.testing.assert_close(
                rounded[token, choice], expected, rtol=0, atol=0, equal_nan=True
            )
    assert torch.equal(one[2], rounded[2, 0])
    assert rounded[0, 1, 0] == 448


def test_the_vendors_product_is_offered_where_it_takes_the_operands() -> None:
    def offered(n: int, k: int, facts: DeviceFacts, *kinds: str) -> bool:
        sizes = (128, n, k, 128, 128) if "blocks" in kinds else (128, n, k)
        problem = Problem("fp8_linear", sizes, kinds)
        listed = fp8_linear.choices(problem, facts)
        default = fp8_linear.default_choice(problem, facts)
        assert len(listed) <= 12
        assert default in listed
        return Choice("scaled_mm") in listed

    assert offered(64, 128, NEW, "torch.bfloat16")
    assert not offered(64, 128, NEW, "torch.float16")
    assert not offered(72, 128, NEW, "torch.bfloat16")
    assert not offered(64, 128, OLD, "torch.bfloat16")
    assert not offered(64, 128, NEW, "torch.bfloat16", "blocks")


def test_the_vendors_product_gets_what_it_wants(device, monkeypatch) -> None:
    """Where there is no GPU its operands are checked against its rules, and multiplied here."""
    if device.type == "cuda":
        pytest.skip("the product itself is measured there")
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None):
        meta = [t.to("meta") for t in (a, b.t(), scale_a, scale_b)]
        torch.ops.aten._scaled_mm(meta[0], meta[1].t(), *meta[2:], out_dtype=out_dtype)
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert out_dtype == torch.bfloat16
        calls.append(a.shape)
        out = (a.float() @ b.float()) * scale_a * scale_b
        return (out if bias is None else out + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for activations in ("dynamic", "static"):
        weight = weight_of(48, 128, device, activations, None, torch.bfloat16)
        x = torch.randn(33, 128, device=device).bfloat16()
        with tuning.recording() as asked:
            ops.linear(x, weight)
        (problem,) = asked
        with tuning.forced({problem: Choice("scaled_mm")}):
            out = ops.linear(x, weight)
        assert error(out, exact(x, weight)) < TOLERANCE[torch.bfloat16]
    assert len(calls) == 2


def test_candidates_fit_every_device() -> None:
    for memory in (101_376, 166_912, 232_448):
        facts = DeviceFacts("some", (8, 9), 100, memory)
        for m in (1, 32, 64, 128, 4096):
            problem = Problem("int8_linear", (m, 4096, 4096), ("torch.bfloat16",))
            found = scaled_tiles.triton_choices(problem, facts)
            assert 1 < len(found) <= 12
            assert scaled_tiles.default_choice(problem, facts) == found[0]


def test_other_formats_stay_plain(device) -> None:
    assert weight_of(8, 40, device).layout == "plain"
    assert weight_of(16, 96, device, "dynamic", (16, 48)).layout == "plain"
