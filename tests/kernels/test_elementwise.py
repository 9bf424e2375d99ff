"""Norms, rotary embedding, activation and cache writes against the float64 reference."""

import pytest
import torch

from kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding step of each dtype, times the few roundings that an operation makes.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}


def close(actual: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> None:
    tolerance = max(TOLERANCE[actual.dtype], least)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 33), (70, 640)])
def test_a_float32_weight_multiplies_before_the_one_rounding(
    backend, generator, dtype, rows, width
):
    x = (torch.randn(rows, width, generator=generator) * 3).to(dtype)
    residual = torch.randn(rows, width, generator=generator).to(dtype)
    weight = 1 + torch.randn(width, generator=generator) * 0.01
    half_step = torch.finfo(dtype).eps / 2
    expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
    actual = ops.rms_norm(x, weight, 1e-6)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=half_step * 1.01, atol=1e-6)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-6)
    expected = reference.rms_norm(total.double(), weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=half_step * 1.01, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_weight", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 128), (13, 40), (90, 64)])
def test_head_rms_norm_in_a_view_of_a_fused_projection(
    backend, generator, dtype, wide_weight, tokens, head_dim
):
    heads, others = 5, 3
    fused = torch.randn(tokens, (heads + others) * head_dim, generator=generator).to(dtype)
    untouched = fused[:, heads * head_dim :].clone()
    x = fused.view(tokens, -1, head_dim).narrow(1, 0, heads)
    weight = torch.randn(head_dim, generator=generator).to(torch.float32 if wide_weight else dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-6)
    actual = ops.head_rms_norm(x, weight, 1e-6)
    assert actual.data_ptr() == fused.data_ptr()
    close(actual, expected)
    assert torch.equal(fused[:, heads * head_dim :], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "turning"), [(128, 96), (64, 16), (80, 20), (32, 2)])
def test_a_narrow_table_turns_the_first_dimensions_only(
    backend, generator, dtype, head_dim, turning
):
    tokens, heads, kv_heads = 9, 4, 2
    fused = torch.randn(tokens, heads + kv_heads, head_dim, generator=generator).to(dtype)
    before = fused.clone()
    q, k = fused.narrow(1, 0, heads), fused.narrow(1, heads, kv_heads)
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    angles = torch.rand(50, turning // 2, generator=generator).double() * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    expected = reference.rotary_embedding(q.double(), k.double(), positions, table.double())
    ops.rotary_embedding(q, k, positions, table)
    close(q, expected[0])
    close(k, expected[1])
    assert torch.equal(fused[..., turning:], before[..., turning:])
    assert not torch.equal(fused[..., :turning], before[..., :turning])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (5, 37), (64, 700)])
def test_gelu_and_mul(backend, generator, dtype, approximate, rows, width):
    x = (torch.randn(rows, 2 * width, generator=generator) * 3).to(dtype)
    expected = reference.gelu_and_mul(x.double(), approximate)
    # PyTorch's vectorized erf has an absolute error of 1e-6, and `up` multiplies it.
    close(ops.gelu_and_mul(x, approximate), expected, least=2e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_saturates_without_nan(backend, approximate):
    x = torch.tensor([[-1000.0] * 20 + [1000.0] * 20 + [2.0] * 40])
    expected = torch.tensor([[0.0] * 20 + [2000.0] * 20]).double()
    actual = ops.gelu_and_mul(x, approximate).double()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(generator, dtype):
    x = (torch.randn(4, 300, generator=generator) * 60).to(dtype)
    capped = ops.soft_cap(x, 30.0)
    close(capped / 30, reference.soft_cap(x.double(), 30.0) / 30)
    assert float(capped.abs().max()) <= 30


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (5, 5)])
def test_route(generator, normalize, experts, top_k):
    logits = torch.randn(21, experts, generator=generator) * 4
    weights, chosen = ops.route(logits, top_k, normalize)
    expected_weights, expected_chosen = reference.route(logits.double(), top_k, normalize)
    assert torch.equal(chosen, expected_chosen)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected_weights, rtol=3e-6, atol=1e-7)


def test_normalized_routing_is_the_softmax_over_the_chosen(generator):
    logits = torch.randn(9, 16, generator=generator).bfloat16()
    weights, chosen = ops.route(logits, 4, normalize=True)
    over_chosen = torch.softmax(logits.double().gather(1, chosen), -1)
    torch.testing.assert_close(weights.double(), over_chosen, rtol=3e-6, atol=1e-7)
