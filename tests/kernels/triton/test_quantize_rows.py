"""Rows rounded to int8 and e4m3: the bits of plain PyTorch, the values of the reference."""

import pytest
import torch

from kernels import plain_linear, reference, weights
from kernels.triton import quantize_rows as module
from kernels.triton import runtime
from kernels.triton.quantize_rows import quantize_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
OLD = runtime.INTERPRETED._replace(capability=(8, 0))  # converts e4m3 by bits


def rows_of(generator, dtype, rows, width):
    """Rows of many sizes, among them one of zeros and one that is tiny."""
    x = torch.randn(rows, width, generator=generator)
    sizes = torch.exp2(torch.randint(-12, 9, (rows, 1), generator=generator).float())
    sizes[0] = 0.0
    sizes[1] = 2.0**-128
    return (x * sizes).to(dtype)


def fp8_weight(x, block):
    """A weight that asks for its activations by blocks."""
    width = x.shape[1]
    shape = (1, block) if block else None
    scales = torch.ones(1, -(-width // block)) if block else torch.ones(1)
    data = torch.zeros(1, width).to(E4M3)
    return weights.Fp8Weight(data, scales, None, (1, width), block_shape=shape)


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 576), (FP16, 33), (FP32, 80), (BF16, 5000)])
def test_int8_rows(device, generator, dtype, width):
    x = rows_of(generator, dtype, 4, width)
    data, scales = quantize_rows(x.to(device), INT8)
    expected, expected_scales = plain_linear.quantize_rows(x)
    assert torch.equal(data.cpu(), expected)
    assert torch.equal(scales.cpu(), expected_scales)
    restored = data.cpu().double() * scales.cpu().double()
    half_step = expected_scales.double() / 2 * (1 + 1e-5)
    assert ((restored - x.double()).abs() <= half_step + 2.0**-119).all()


@pytest.mark.parametrize(
    ("dtype", "width", "block", "native"),
    [
        (BF16, 576, 0, True),
        (FP32, 33, 0, False),
        (BF16, 256, 128, True),
        (FP16, 200, 64, False),
        (FP32, 96, 128, True),
        (FP16, 90, 48, True),
    ],
)
def test_e4m3_rows(device, generator, monkeypatch, dtype, width, block, native):
    if not native:
        monkeypatch.setattr(module, "facts_of", lambda _: OLD)
    x = rows_of(generator, dtype, 5, width)
    data, scales = quantize_rows(x.to(device), E4M3, block)
    assert data.dtype == E4M3
    assert scales.shape == (5, -(-width // block) if block else 1)
    spread = scales.cpu().repeat_interleave(block or width, 1)[:, :width]
    restored = data.cpu().float() * spread
    assert torch.equal(restored, plain_linear.round_fp8(x, fp8_weight(x, block)))
    torch.testing.assert_close(restored, reference.fp8_rows(x.float(), block), rtol=1e-6, atol=0)


def test_strided_rows(device, generator):
    x = rows_of(generator, BF16, 3, 96).to(device)
    for part in (x[:, 32:], x[::2]):
        data, scales = quantize_rows(part, INT8)
        expected, expected_scales = plain_linear.quantize_rows(part.cpu())
        assert torch.equal(data.cpu(), expected)
        assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize("dtype", [INT8, E4M3])
def test_rows_too_wide_for_registers(device, generator, monkeypatch, dtype):
    x = rows_of(generator, BF16, 3, 700).to(device)
    expected = quantize_rows(x, dtype)
    monkeypatch.setattr(module, "WIDEST_BLOCK", 512)
    monkeypatch.setattr(module, "CHUNK", 256)
    actual = quantize_rows(x, dtype)
    assert torch.equal(actual[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(actual[1], expected[1])


def test_many_short_blocks_in_a_program(device, generator, monkeypatch):
    x = rows_of(generator, FP16, 9, 1024)
    few = module.facts_of(x.to(device))._replace(multiprocessors=1)
    expected = quantize_rows(x.to(device), E4M3, 16)
    monkeypatch.setattr(module, "facts_of", lambda _: few)
    actual = quantize_rows(x.to(device), E4M3, 16)
    assert torch.equal(actual[0].float(), expected[0].float())
    assert torch.equal(actual[1], expected[1])


def test_a_row_with_nan_has_scale_nan(device):
    x = torch.ones(2, 40, device=device)
    x[1, 7] = float("nan")
    for dtype in (INT8, E4M3):
        scales = quantize_rows(x, dtype)[1].isnan().flatten()
        assert scales.tolist() == [False, True]


def test_every_e4m3_code_and_every_tie_between_two(device, monkeypatch):
    """By bits as by conversion: codes, ties, and their neighbours in float32."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, ties])
    values = torch.cat([values, values.nextafter(values * 0), values.nextafter(values + 500)])
    x = torch.cat([values, -values]).clamp(-448, 448)[None]
    for facts in (module.facts_of(x.to(device)), OLD):
        monkeypatch.setattr(module, "facts_of", lambda _, facts=facts: facts)
        data, scales = quantize_rows(x.to(device), E4M3)
        assert float(scales) == 1.0
        assert torch.equal(data.cpu().view(torch.uint8), x.to(E4M3).view(torch.uint8))


def test_no_rows_and_refused_ones(device):
    data, scales = quantize_rows(torch.empty(0, 64, device=device), E4M3, 32)
    assert data.shape == (0, 64)
    assert scales.shape == (0, 2)
    with pytest.raises(ValueError, match="cannot be quantized"):
        quantize_rows(torch.ones(4, 8, device=device).t(), INT8)
