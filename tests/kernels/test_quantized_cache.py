"""Writing quantized caches: the definition, the bits of every backend, zeros and extremes."""

import pytest
import torch

from kernels import ops, reference
from kernels.layer_cache import LayerCache, quantize_heads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def nearest(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from each float64 to the nearest of all values of an 8-bit dtype."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite()].sort().values
    right = torch.searchsorted(values, scaled.contiguous()).clamp(1, len(values) - 1)
    return torch.minimum((values[right] - scaled).abs(), (scaled - values[right - 1]).abs())


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_quantize_heads_rounds_to_the_nearest_multiple_of_the_scale(generator, dtype, x_dtype):
    x = (torch.randn(50, 3, 80, generator=generator) * 3).to(x_dtype)
    data, scales = quantize_heads(x, dtype)
    assert data.shape == x.shape
    assert data.dtype == dtype
    assert scales.shape == x.shape[:2]
    assert scales.dtype == torch.float32
    wide = x.double()
    most = wide.abs().amax(-1)
    torch.testing.assert_close(scales.double(), most / MOST[dtype], rtol=1e-6, atol=0)
    scaled = wide * (MOST[dtype] / most)[..., None]
    error = (data.double() - scaled).abs()
    assert bool((error <= nearest(scaled, dtype) + 1e-4).all())
    assert bool((data.double().abs().amax(-1) == MOST[dtype]).all())


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_and_what_vanishes_have_scale_zero(dtype):
    x = torch.zeros(3, 2, 16)
    x[1] = 1e-44
    x[2] = 1e30
    data, scales = quantize_heads(x, dtype)
    assert bool((scales[:2] == 0).all())
    assert bool((data[:2].float() == 0).all())
    torch.testing.assert_close(data[2].float() * scales[2, :, None], x[2])


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (40, 8), (128, 24)])
def test_write_kv_writes_the_bits_of_the_definition(
    backend, generator, dtype, x_dtype, head_dim, block_size
):
    tokens, kv_heads, blocks = 67, 3, 12
    fused = torch.randn(tokens, 2 * kv_heads, head_dim, generator=generator)
    spread = torch.randint(-12, 12, (tokens, 2 * kv_heads, 1), generator=generator)
    fused = (fused * 2.0**spread).to(x_dtype)
    fused[5] = 0
    fused[6, :, : head_dim // 2] *= 1e-3  # subnormal beside the maximum
    k, v = fused.narrow(1, 0, kv_heads), fused.narrow(1, kv_heads, kv_heads)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    shape = (blocks, kv_heads, block_size, head_dim)
    caches = [LayerCache.allocate(shape, dtype) for _ in range(2)]
    reference.write_kv(k, v, caches[0], slots)
    ops.write_kv(k, v, caches[1], slots)
    expected, actual = caches
    for name in ("keys", "values"):
        assert torch.equal(getattr(actual, name).float(), getattr(expected, name).float())
    assert actual.key_scales is not None
    assert torch.equal(actual.key_scales, expected.key_scales)
    assert torch.equal(actual.value_scales, expected.value_scales)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_every_element_survives_being_written_again(backend, dtype):
    """All values of the format, their maximum among them, come back as they were."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite() & (every.abs() <= MOST[dtype])]
    rows = torch.nn.functional.pad(every, (0, 256 - len(every))).view(1, 1, 256)
    cache = LayerCache.allocate((1, 1, 8, 256), dtype)
    ops.write_kv(rows, -rows, cache, torch.tensor([3]))
    assert cache.key_scales is not None
    assert float(cache.key_scales[0, 0, 3]) == 1.0
    assert torch.equal(cache.keys[0, 0, 3].float(), rows[0, 0])
    assert torch.equal(cache.values[0, 0, 3].float(), -rows[0, 0])


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_token_that_is_not_a_number_stays_one(backend, dtype):
    k = torch.ones(2, 1, 32)
    k[1, 0, 7] = float("nan")
    cache = LayerCache.allocate((1, 1, 8, 32), dtype)
    ops.write_kv(k, k, cache, torch.tensor([0, 1]))
    assert cache.key_scales is not None
    assert cache.key_scales[0, 0, :2].isnan().tolist() == [False, True]


def test_halving_the_bytes():
    shape = (4, 2, 16, 64)
    half = LayerCache.allocate(shape, torch.bfloat16)
    for dtype in QUANTIZED:
        cache = LayerCache.allocate(shape, dtype)
        assert cache.is_quantized
        assert cache.nbytes == half.nbytes // 2 + 2 * 4 * 2 * 16 * 4
