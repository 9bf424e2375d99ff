"""Norms, rotary embedding, activation and cache writes against the float64 reference."""

import pytest
import torch

from kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding step of each dtype, times the few roundings that an operation makes.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 33), (70, 640), (2, 7)])
def test_rms_norm(backend, generator, dtype, rows, width):
    x = (torch.randn(rows, width, generator=generator) * 3).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))


def test_rms_norm_of_a_strided_view(backend, generator):
    wide = torch.randn(5, 100, generator=generator)
    weight = torch.randn(64, generator=generator)
    expected = reference.rms_norm(wide[:, 20:84].double(), weight.double(), 1e-6)
    close(ops.rms_norm(wide[:, 20:84], weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (9, 45), (80, 512)])
def test_add_rms_norm_adds_in_place_and_norms_the_sum(backend, generator, dtype, rows, width):
    x = torch.randn(rows, width, generator=generator).to(dtype)
    residual = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    kept = x.clone()
    normed, total = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    actual, updated = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(actual, normed)
    close(updated, total)
    assert updated.data_ptr() == residual.data_ptr()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_rotary_embedding_in_views_of_a_fused_projection(backend, generator, dtype, head_dim):
    tokens, heads, kv_heads = 11, 6, 2
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    untouched = fused[:, (heads + kv_heads) * head_dim :].clone()
    q = fused[:, : heads * head_dim].view(tokens, heads, head_dim)
    k = fused[:, heads * head_dim : (heads + kv_heads) * head_dim].view(tokens, kv_heads, head_dim)
    positions = torch.randint(0, 500, (tokens,), generator=generator)
    angles = torch.outer(
        torch.arange(500).double(), 1e4 ** -(torch.arange(head_dim // 2).double() * 2 / head_dim)
    )
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    expected = reference.rotary_embedding(q.double(), k.double(), positions, cache.double())
    actual = ops.rotary_embedding(q, k, positions, cache)
    close(actual[0], expected[0])
    close(actual[1], expected[1])
    assert actual[0].data_ptr() == fused.data_ptr()
    assert torch.equal(fused[:, (heads + kv_heads) * head_dim :], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (5, 37), (64, 700)])
def test_silu_and_mul(backend, generator, dtype, rows, width):
    x = (torch.randn(rows, 2 * width, generator=generator) * 4).to(dtype)
    close(ops.silu_and_mul(x), reference.silu_and_mul(x.double()))


def test_silu_saturates_without_nan(backend):
    x = torch.tensor([[-1000.0] * 20 + [1000.0] * 20 + [2.0] * 40])
    expected = torch.tensor([[0.0] * 20 + [2000.0] * 20]).double()
    torch.testing.assert_close(ops.silu_and_mul(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 24, 128])
def test_write_kv_touches_its_slots_only(backend, generator, dtype, block_size):
    tokens, kv_heads, head_dim, blocks = 37, 3, 40, 12
    fused = torch.randn(tokens, 2 * kv_heads * head_dim, generator=generator).to(dtype)
    k = fused[:, : kv_heads * head_dim].view(tokens, kv_heads, head_dim)
    v = fused[:, kv_heads * head_dim :].view(tokens, kv_heads, head_dim)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    shape = (blocks, kv_heads, block_size, head_dim)
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    reference.write_kv(k, v, ops.LayerCache(*expected), slots)
    ops.write_kv(k, v, ops.LayerCache(*caches), slots)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_results_do_not_depend_on_the_number_of_rows(backend, generator):
    x = torch.randn(200, 576, generator=generator).bfloat16()
    weight = torch.randn(576, generator=generator).bfloat16()
    together = ops.rms_norm(x, weight, 1e-5)
    for row in (0, 57, 199):
        assert torch.equal(ops.rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])
