"""Rotary embedding and cache writes: bit for bit what plain PyTorch stores."""

from functools import partial

import pytest
import torch

from kernels import ops, plain, reference
from kernels.triton import backend, cache_write, runtime

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn


def heads_of(generator, dtype, tokens, heads, kv_heads, head_dim):
    """Views of a fused projection, at sizes from tiny to large, some heads all zero."""
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator)
    sizes = torch.tensor([0.0, 1e-6, 1.0, 30.0, 2.0**-126])
    chosen = torch.randint(0, 5, fused.shape[:2], generator=generator)
    fused = (fused * sizes[chosen][..., None]).to(dtype)
    return fused.view(tokens, -1)


def views(fused, heads, kv_heads, head_dim):
    split = fused.view(fused.shape[0], -1, head_dim)
    return split.split([heads, kv_heads, kv_heads], dim=1)


def table_of(generator, positions, turning):
    angles = torch.rand(positions, turning // 2, generator=generator).double() * 6
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def some_cache(generator, shape, dtype, device="cpu"):
    """A cache filled with anything, so that what should not be written shows."""
    filled = torch.randint(0, 100, (2, *shape), generator=generator)
    tensors = [part.to(dtype) for part in filled]
    if dtype in (INT8, E4M3):
        tensors += [torch.rand(shape[:3], generator=generator) for _ in range(2)]
    return ops.LayerCache(*tensors), ops.LayerCache(*(t.to(device, copy=True) for t in tensors))


def bits(x):
    return x.cpu().contiguous().view(torch.uint8)


def assert_same_cache(actual, expected):
    for name in ("keys", "values", "key_scales", "value_scales"):
        if getattr(expected, name) is not None:
            assert torch.equal(bits(getattr(actual, name)), bits(getattr(expected, name))), name


SHAPES = [
    # dtype, heads, kv_heads, head_dim, turning
    (BF16, 6, 2, 64, 64),
    (FP32, 2, 1, 80, 20),
    (FP16, 9, 9, 96, 96),
    (BF16, 4, 1, 128, 96),
]


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_dim", "turning"), SHAPES)
def test_rotary_embedding(device, generator, dtype, heads, kv_heads, head_dim, turning):
    fused = torch.randn(3, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    held = fused.to(device, copy=True)
    table = table_of(generator, 50, turning)
    positions = torch.randint(0, 50, (3,), generator=generator)
    q, k, _ = views(fused, heads, kv_heads, head_dim)
    wide = reference.rotary_embedding(q.double(), k.double(), positions, table.double())
    plain.rotary_embedding(q, k, positions, table)
    held_q, held_k, _ = views(held, heads, kv_heads, head_dim)
    assert backend.rotary_embedding(held_q, held_k, positions.to(device), table.to(device))
    assert torch.equal(held.cpu(), fused)
    tolerance = torch.finfo(dtype).eps * 2
    for actual, expected in zip((held_q, held_k), wide, strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "cached", "page"),
    [
        (SHAPES[0], None, 8),
        (SHAPES[0], INT8, 16),
        (SHAPES[1], E4M3, 32),
        (SHAPES[1], None, 24),
        (SHAPES[2], E4M3, 16),
        (SHAPES[3], INT8, 8),
    ],
)
def test_rotary_and_write(device, generator, shape, cached, page):
    dtype, heads, kv_heads, head_dim, turning = shape
    fused = heads_of(generator, dtype, 5, heads, kv_heads, head_dim)
    held = fused.to(device, copy=True)
    table = table_of(generator, 50, turning)
    positions = torch.randint(0, 50, (5,), generator=generator)
    slots = torch.randperm(3 * page, generator=generator)[:5]
    slots[1] = -1
    sizes = (3, kv_heads, page, head_dim)
    expected, cache = some_cache(generator, sizes, cached or dtype, device)

    q, k, v = views(held, heads, kv_heads, head_dim)
    operands = positions.to(device), table.to(device), cache, slots.to(device)
    assert backend.rotary_and_write_kv(q, k, v, *operands)

    q, k, v = views(fused, heads, kv_heads, head_dim)
    plain.rotary_embedding(q, k, positions, table)
    there = slots >= 0
    plain.write_kv(k[there], v[there], expected, slots[there])
    assert_same_cache(cache, expected)
    assert torch.equal(bits(held[:, : heads * head_dim]), bits(fused[:, : heads * head_dim]))
    first_value = (heads + kv_heads) * head_dim
    assert torch.equal(bits(held[:, first_value:]), bits(fused[:, first_value:]))


@pytest.mark.parametrize(
    ("shape", "norm_dtype", "cached"),
    [
        (SHAPES[0], BF16, None),
        (SHAPES[1], FP32, INT8),
        (SHAPES[2], FP32, None),
        (SHAPES[3], BF16, E4M3),
    ],
)
def test_norms_rotary_and_write(device, generator, shape, norm_dtype, cached):
    dtype, heads, kv_heads, head_dim, turning = shape
    fused = torch.randn(3, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    held = fused.to(device, copy=True)
    norms = [(1 + torch.randn(head_dim, generator=generator) / 4).to(norm_dtype) for _ in range(2)]
    table = table_of(generator, 50, turning)
    positions = torch.randint(0, 50, (3,), generator=generator)
    slots = torch.tensor([3, 7, 0])
    _, cache = some_cache(generator, (1, kv_heads, 8, head_dim), cached or dtype, device)
    operands = positions.to(device), table.to(device), cache, slots.to(device)
    on_device = ops.HeadNorms(*(norm.to(device) for norm in norms), 1e-6)
    held_heads = views(held, heads, kv_heads, head_dim)
    assert backend.rotary_and_write_kv(*held_heads, *operands, on_device)

    q, k, v = (x.double() for x in views(fused, heads, kv_heads, head_dim))
    q = reference.rms_norm(q, norms[0].double(), 1e-6)
    k = reference.rms_norm(k, norms[1].double(), 1e-6)
    q, k = reference.rotary_embedding(q, k, positions, table.double())
    # Up to three roundings, and a turn mixes those of two elements.
    tolerance = 4 * torch.finfo(dtype).eps
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(held_heads[0].cpu().double(), q)
    keys, values = cache.keys.double(), cache.values.double()
    if cached:
        keys, values = keys * cache.key_scales[..., None], values * cache.value_scales[..., None]
        # Half a step of int8, or e4m3's three bits of fraction.
        close = partial(torch.testing.assert_close, rtol=0.07, atol=0.02)
    close(keys[0][:, slots].transpose(0, 1).cpu(), k)
    close(values[0][:, slots].transpose(0, 1).cpu(), v)


@pytest.mark.parametrize(
    ("dtype", "cached", "head_dim", "page"),
    [(BF16, INT8, 80, 16), (FP16, E4M3, 64, 8), (FP32, None, 40, 24), (FP32, E4M3, 96, 16)],
)
def test_write_alone(device, generator, dtype, cached, head_dim, page):
    fused = heads_of(generator, dtype, 4, 0, 9, head_dim)
    slots = torch.tensor([5, -1, 3 * page - 1, 0])
    expected, cache = some_cache(generator, (3, 9, page, head_dim), cached or dtype, device)
    _, k, v = views(fused.to(device), 0, 9, head_dim)
    assert backend.write_kv(k, v, cache, slots.to(device))
    _, k, v = views(fused, 0, 9, head_dim)
    there = slots >= 0
    reference.write_kv(k[there], v[there], expected, slots[there])
    assert_same_cache(cache, expected)


def test_devices_without_an_e4m3_conversion_store_the_same_bits(device, generator, monkeypatch):
    fused = heads_of(generator, BF16, 6, 0, 4, 64)
    slots = torch.randperm(16, generator=generator)[:6]
    expected, cache = some_cache(generator, (1, 4, 16, 64), E4M3, device)
    old = runtime.INTERPRETED._replace(capability=(8, 0))
    monkeypatch.setattr(cache_write, "facts_of", lambda _: old)
    _, k, v = views(fused.to(device), 0, 4, 64)
    assert backend.write_kv(k, v, cache, slots.to(device))
    _, k, v = views(fused, 0, 4, 64)
    plain.write_kv(k, v, expected, slots)
    assert_same_cache(cache, expected)


def test_what_the_kernels_do_not_take_is_declined_untouched(device, generator):
    k = torch.randn(2, 3, 32, generator=generator).to(device)
    slots = torch.tensor([0, 1], device=device)
    before, cache = some_cache(generator, (1, 3, 8, 32), FP32, device)
    assert not backend.write_kv(k, k.half(), cache, slots)
    assert not backend.write_kv(k.half(), k.half(), cache, slots)
    assert not backend.write_kv(k, k, cache, slots.int())
    assert not backend.write_kv(k[:, :2], k[:, :2], cache, slots)
    table = torch.ones(4, 34, device=device)
    kept = k.clone()
    assert not backend.rotary_and_write_kv(k, k, k, slots, table, cache, slots)
    assert not backend.rotary_embedding(k, k, slots.int(), table[:, :32])
    assert_same_cache(cache, before)
    assert torch.equal(k, kept)
