"""Linear layers in every weight format against float64 matmuls of the dequantized weights."""

import pytest
import torch

from kernels import cpu, ops, plain_linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 15, 16, 17, 33, 100]
SHAPES = [(576, 576), (33, 96), (100, 352)]
RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def random_int4(n, k, group_size, generator):
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.int32)
    scales = torch.rand(n, k // group_size, generator=generator) * 0.1 + 0.01
    zeros = torch.randint(0, 16, (n, k // group_size), generator=generator).float()
    groups = (q.view(n, -1, group_size) - zeros[..., None]) * scales[..., None]
    return q, scales, zeros, groups.view(n, k)


def random_int8(n, k, generator):
    q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    return q, torch.rand(n, generator=generator) * 0.1 + 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (50, 77)])
def test_dense(backend, generator, dtype, n, k):
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    packed = ops.pack_dense(weight, bias)
    assert packed.shape == (n, k)
    assert packed.dtype == dtype
    assert torch.equal(ops.dequantize(packed), weight)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator).to(dtype)
        expected = reference.linear(x.double(), weight.double(), bias.double())
        actual = ops.linear(x, packed)
        assert actual.dtype == dtype
        assert error(actual, expected) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_quantizes_each_row_by_itself(backend, generator, dtype, n, k):
    q, scales = random_int8(n, k, generator)
    bias = torch.randn(n, generator=generator).to(dtype)
    packed = ops.pack_int8(q, scales, bias)
    exact = q.double() * scales.double()[:, None]
    torch.testing.assert_close(ops.dequantize(packed).double(), exact, rtol=1e-6, atol=0)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
        x = x.to(dtype)
        quantized, row_scales = reference.quantize_rows(x)
        expected = reference.linear(quantized.double() * row_scales.double(), exact, bias.double())
        # Row by row, because the rows differ by orders of magnitude.
        actual = ops.linear(x, packed).double()
        errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(errors.max()) < RELATIVE_ERROR[dtype] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [16, 32, 64, 96])
def test_int4(backend, generator, dtype, group_size):
    n, k = 100, 576
    q, scales, zeros, exact = random_int4(n, k, group_size, generator)
    bias = torch.randn(n, generator=generator).to(dtype)
    packed = ops.pack_int4(q, scales, zeros, group_size, bias)
    used = ops.dequantize(packed)
    # Widened weights may be rounded to bf16, no further.
    torch.testing.assert_close(used.float(), exact, rtol=2**-8, atol=1e-6)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator).to(dtype)
        expected = reference.linear(x.double(), exact.double(), bias.double())
        assert error(ops.linear(x, packed), expected) < 6e-3
        expected = reference.linear(x.double(), used.double(), bias.double())
        allowed = max(RELATIVE_ERROR[dtype], 1e-5 if packed.layout == "amx" else 0)
        assert error(ops.linear(x, packed), expected) < allowed


@pytest.mark.parametrize("bias", [False, True])
def test_every_number_of_few_rows(backend, generator, bias):
    """As many as drafted tokens are: without tiles each number has a loop of its own."""
    n, k = 70, 192
    q, scales, zeros, _ = random_int4(n, k, 32, generator)
    added = torch.randn(n, generator=generator) if bias else None
    packed = ops.pack_int4(q, scales, zeros, 32, added)
    used = ops.dequantize(packed).double()
    for rows in range(1, 10):
        x = torch.randn(rows, k, generator=generator)
        expected = reference.linear(x.double(), used, None if added is None else added.double())
        assert error(ops.linear(x, packed), expected) < RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
def test_a_row_does_not_depend_on_the_other_rows(generator, kind):
    """Bit for bit, from one row to several blocks of rows: what batching invariance rests on."""
    if not cpu.has_amx():
        pytest.skip("needs AMX")
    n, k = 200, 576
    if kind == "dense":
        weight = ops.pack_dense(torch.randn(n, k, generator=generator).bfloat16())
    elif kind == "int8":
        weight = ops.pack_int8(*random_int8(n, k, generator))
    else:
        q, scales, zeros, _ = random_int4(n, k, 64, generator)
        weight = ops.pack_int4(q, scales, zeros, 64)
    x = torch.randn(1500, k, generator=generator).bfloat16()
    together = ops.linear(x, weight)
    for rows in [1, 2, 5, 16, 17, 31, 32, 33, 64, 1000]:
        assert torch.equal(ops.linear(x[:rows], weight), together[:rows])
    assert torch.equal(ops.linear(x[700:701], weight), together[700:701])


def test_int8_rows_are_independent_without_native_kernels(backend, generator):
    weight = ops.pack_int8(*random_int8(64, 96, generator))
    x = torch.randn(40, 96, generator=generator)
    together = ops.linear(x, weight)
    for row in (0, 13, 39):
        assert torch.equal(ops.linear(x[row : row + 1], weight)[0], together[row])


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
def test_leading_dimensions_strides_and_empty_batches(backend, generator, kind):
    n, k = 48, 64
    if kind == "dense":
        weight = ops.pack_dense(torch.randn(n, k, generator=generator).bfloat16())
    elif kind == "int8":
        weight = ops.pack_int8(*random_int8(n, k, generator))
    else:
        weight = ops.pack_int4(*random_int4(n, k, 32, generator)[:3], 32)
    wide = torch.randn(2, 5, k + 9, generator=generator).bfloat16()
    view = wide[..., 3 : 3 + k]
    actual = ops.linear(view, weight)
    assert actual.shape == (2, 5, n)
    for i in range(2):
        alone = ops.linear(view[i].contiguous(), weight)
        assert error(actual[i], alone.double()) < 8e-3
    assert ops.linear(view[:0], weight).shape == (0, 5, n)


def test_zero_rows_stay_zero(backend, generator):
    weight = ops.pack_int8(*random_int8(40, 64, generator))
    assert torch.equal(ops.linear(torch.zeros(3, 64), weight), torch.zeros(3, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_reads_rows_of_a_packed_weight(backend, generator, dtype):
    table = torch.randn(103, 72, generator=generator).to(dtype)
    ids = torch.randint(0, 103, (3, 7), generator=generator)
    assert torch.equal(ops.embedding(ids, ops.pack_dense(table)), table[ids])


def test_embedding_of_odd_widths_and_of_ids_outside_the_table(backend, generator):
    table = torch.randn(40, 77, generator=generator).bfloat16()
    packed = ops.pack_dense(table)
    ids = torch.randint(0, 40, (50,), generator=generator)
    assert torch.equal(ops.embedding(ids, packed), table[ids])
    assert ops.embedding(ids[:0], packed).shape == (0, 77)
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            ops.embedding(torch.tensor([3, wrong]), packed)


def test_packed_weights_take_no_more_memory_than_their_format(backend, generator):
    n, k, group = 512, 1024, 128
    assert ops.pack_dense(torch.zeros(n, k, dtype=torch.bfloat16)).nbytes == n * k * 2
    assert ops.pack_int8(*random_int8(n, k, generator)).nbytes == n * k + n * 4
    int4 = ops.pack_int4(*random_int4(n, k, group, generator)[:3], group)
    assert int4.nbytes <= n * k // 2 + 8 * n * k // group


def test_each_backend_has_its_own_layout(backend, generator):
    """So that these tests are known to run what they mean to run."""
    int8 = ops.pack_int8(*random_int8(64, 64, generator))
    int4 = ops.pack_int4(*random_int4(64, 64, 32, generator)[:3], 32)
    expected = {"amx": "amx", "native": "native", "plain": "aten"}
    assert int4.layout == expected[backend]
    assert int8.layout == "amx" if backend == "amx" else int8.layout in ("onednn", "plain")


def test_bad_weights_are_refused_with_a_reason():
    q8 = torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="must be int8"):
        ops.pack_int8(q8.float(), torch.ones(4))
    with pytest.raises(ValueError, match="4 rows but 3 scales"):
        ops.pack_int8(q8, torch.ones(3))
    q4, ones = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    with pytest.raises(ValueError, match="does not divide"):
        ops.pack_int4(q4, ones, ones, 48)
    with pytest.raises(ValueError, match="needs scales and zeros"):
        ops.pack_int4(q4, ones, torch.ones(4, 1), 32)
    with pytest.raises(ValueError, match=r"outside 0\.\.15"):
        ops.pack_int4(q4 + 16, ones, ones, 32)


def test_a_row_too_small_for_its_scale_counts_as_zeros():
    """127 / 1e-40 is infinite, and infinity times a zero beside it would be NaN."""
    data, scales = plain_linear.quantize_rows(torch.tensor([[1e-40, 0.0], [2.0, -1.0]]))
    assert data.tolist() == [[0, 0], [127, -64]]
    assert scales.flatten().tolist() == pytest.approx([0.0, 2 / 127])
