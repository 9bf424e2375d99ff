"""Int8 in groups, FP8, tables of 16, outliers and permutations against float64 references."""

import math

import pytest
import torch

from kernels import cpu, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [0, 1, 5, 17, 33]
# Odd numbers of rows, and columns that are whole groups but not whole tiles of any format.
SHAPES = [(96, 256), (51, 160), (33, 96)]
# Rounding of the output, and of the input and the widened weight to bf16, 2.4e-3 together; that of
# few outputs scatters.
TOLERANCE = {torch.float32: 4.5e-3, torch.bfloat16: 7e-3, torch.float16: 4.5e-3}
BF16_STEP = 2**-8


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def spread(values: torch.Tensor, group_size: int) -> torch.Tensor:
    return values.double().repeat_interleave(group_size, 1)


def int8_groups(n, k, group, generator, integer_zeros=False):
    q = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, k // group, generator=generator) * 0.01 + 0.001
    zeros = torch.rand(n, k // group, generator=generator) * 40 - 20
    zeros = zeros.round() if integer_zeros else zeros
    return q, scales, zeros, (q.double() - spread(zeros, group)) * spread(scales, group)


def int4(n, k, group, generator):
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator) * 0.1 + 0.01
    zeros = torch.rand(n, k // group, generator=generator) * 15
    return q, scales, zeros, (q.double() - spread(zeros, group)) * spread(scales, group)


def table4(n, k, group, generator):
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator) * 0.1 + 0.01
    table = torch.randn(16, generator=generator)
    return q, scales, table, table.double()[q.long()] * spread(scales, group)


def fp8(n, k, generator, block=None):
    data = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    if block is None:
        scales = torch.rand(n, generator=generator) + 0.1
        return data, scales, data.double() * scales.double()[:, None]
    scales = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) + 0.1
    wide = scales.double().repeat_interleave(block[0], 0)[:n]
    return data, scales, data.double() * wide.repeat_interleave(block[1], 1)[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["int8_groups", "int4", "table4"])
def test_weight_only_groups(backend, generator, kind, n, k, dtype):
    group = 32 if k % 64 else 64
    bias = torch.randn(n, generator=generator).to(dtype)
    if kind == "int8_groups":
        q, scales, zeros, exact = int8_groups(n, k, group, generator)
        packed = ops.pack_int8_groups(q, scales, zeros, group, bias)
    elif kind == "int4":
        q, scales, zeros, exact = int4(n, k, group, generator)
        packed = ops.pack_int4(q, scales, zeros, group, bias)
    else:
        q, scales, table, exact = table4(n, k, group, generator)
        packed = ops.pack_table4(q, scales, table, group, bias)
    assert packed.shape == (n, k)
    used = ops.dequantize(packed)
    assert used.dtype == torch.float32
    torch.testing.assert_close(used.double(), exact, rtol=BF16_STEP, atol=1e-5)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator).to(dtype)
        actual = ops.linear(x, packed)
        assert actual.dtype == dtype
        assert actual.shape == (rows, n)
        expected = reference.linear(x.double(), exact, bias.double())
        assert error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [8, 48])
def test_groups_that_no_fast_path_takes(backend, generator, group):
    q, scales, zeros, exact = int8_groups(20, 96, group, generator)
    packed = ops.pack_int8_groups(q, scales, zeros, group)
    indices, factors, table, looked_up = table4(20, 96, group, generator)
    x = torch.randn(3, 96, generator=generator)
    assert packed.layout == "plain"
    assert error(ops.linear(x, packed), x.double() @ exact.t()) < 1e-5
    packed = ops.pack_table4(indices, factors, table, group)
    assert error(ops.linear(x, packed), x.double() @ looked_up.t()) < 1e-5


def test_zeros_keep_their_precision(backend, generator):
    """Zeros between integers, as GGUF's Q4_K has them, cost no more than rounding to bf16 does."""
    q, scales, zeros, exact = int4(64, 128, 32, generator)
    # Where q is next to its zero, an error of the zero would stand out.
    q = zeros.round().clamp(0, 15).to(torch.uint8).repeat_interleave(32, 1)
    exact = (q.double() - spread(zeros, 32)) * spread(scales, 32)
    used = ops.dequantize(ops.pack_int4(q, scales, zeros, 32)).double()
    assert float(((used - exact).abs() / exact.abs().clamp(min=1e-3)).max()) < BF16_STEP


@pytest.mark.parametrize("kind", ["int4", "int8_groups"])
def test_permuted_columns(backend, generator, kind):
    n, k, group = 40, 128, 32
    make, pack = {
        "int4": (int4, ops.pack_int4),
        "int8_groups": (int8_groups, ops.pack_int8_groups),
    }[kind]
    q, scales, zeros, permuted = make(n, k, group, generator)
    permutation = torch.randperm(k, generator=generator)
    exact = torch.empty_like(permuted)
    exact[:, permutation] = permuted
    packed = pack(q, scales, zeros, group, None, permutation)
    torch.testing.assert_close(ops.dequantize(packed).double(), exact, rtol=BF16_STEP, atol=1e-5)
    x = torch.randn(2, 4, k, generator=generator)
    assert error(ops.linear(x, packed), x.double() @ exact.t()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (40, 77)])
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_fp8_by_channel(backend, generator, activations, n, k, dtype):
    data, scales, exact = fp8(n, k, generator)
    bias = torch.randn(n, generator=generator).to(dtype)
    input_scale = torch.tensor([2**-8]) if activations == "static" else None
    packed = ops.pack_fp8(data, scales, bias, None, activations, input_scale)
    torch.testing.assert_close(ops.dequantize(packed).double(), exact, rtol=1e-6, atol=0)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator).to(dtype)
        rounded = x.double()
        if activations == "dynamic":
            rounded = reference.fp8_rows(rounded)
        elif activations == "static":
            rounded = reference.round_e4m3(rounded * 2**8) / 2**8
        expected = reference.linear(rounded, exact, bias.double())
        assert error(ops.linear(x, packed), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("block", [(32, 32), (128, 128), (16, 64)])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_fp8_by_blocks_cut_off_at_the_edges(backend, generator, activations, block):
    n, k = 150, 200
    data, scales, exact = fp8(n, k, generator, block)
    packed = ops.pack_fp8(data, scales, None, block, activations)
    torch.testing.assert_close(ops.dequantize(packed).double(), exact, rtol=BF16_STEP, atol=1e-6)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator) * torch.logspace(-2, 1, k)
        rounded = x.double()
        if activations == "dynamic":
            rounded = reference.fp8_rows(rounded, block[1])
        # Both operands may be rounded to bf16 after their scales, and few columns dominate.
        assert error(ops.linear(x, packed), rounded @ exact.t()) < 5e-3


def test_fp8_with_one_scale_for_the_tensor(backend, generator):
    data, _, _ = fp8(40, 64, generator)
    packed = ops.pack_fp8(data, torch.tensor([0.5]), activations="none")
    assert torch.equal(ops.dequantize(packed), data.float() * 0.5)


@pytest.mark.parametrize("blocks", [False, True])
def test_every_fp8_code_is_exact(backend, blocks):
    """Subnormals, both zeros and NaN included; columns are told apart by rows of an identity."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 32)
    block, scales = ((32, 32), torch.full((1, 1), 2.0)) if blocks else (None, torch.full((8,), 2.0))
    packed = ops.pack_fp8(codes, scales, None, block, "none")
    values = codes.float() * 2
    finite = ~values.isnan()
    for row in range(32):
        x = torch.zeros(1, 32)
        x[0, row] = 1
        if not finite[:, row].all():
            assert ops.linear(x, packed)[0][~finite[:, row]].isnan().all()
    clean = torch.where(finite, codes.float(), 0).to(torch.float8_e4m3fn)
    packed = ops.pack_fp8(clean, scales, None, block, "none")
    assert torch.equal(ops.linear(torch.eye(32), packed), torch.where(finite, values, 0).t())


def test_fp8_activations_round_to_the_nearest_code(backend):
    """Ties, subnormals and values beyond the largest, seen through an identity weight."""
    values = torch.tensor(reference.E4M3_VALUES)
    between = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, between, between * 1.001, between * 0.999, torch.tensor([449.0, 1e6])])
    x = torch.cat([x, -x])
    identity = torch.eye(len(x)).to(torch.float8_e4m3fn)
    packed = ops.pack_fp8(identity, torch.ones(1), None, None, "static", torch.ones(1))
    assert torch.equal(ops.linear(x[None], packed)[0], reference.round_e4m3(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_outliers_are_multiplied_in_floating_point(backend, generator, share, dtype):
    n, k = 51, 160
    q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, generator=generator) * 0.1 + 0.01
    bias = torch.randn(n, generator=generator).to(dtype)
    exact = q.double() * scales.double()[:, None]
    packed = ops.pack_int8(q, scales, bias, outlier_threshold=6.0)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=generator).clamp(-4, 4)
        x = torch.where(torch.rand(rows, k, generator=generator) < share, x.sign() * 60, x)
        x = x.to(dtype)
        expected = reference.int8_linear(x.double(), exact, 6.0) + bias.double()
        assert error(ops.linear(x, packed), expected) < TOLERANCE[dtype]
    assert torch.equal(ops.dequantize(packed), ops.dequantize(ops.pack_int8(q, scales, bias)))


def test_outliers_at_the_threshold_and_rows_without_any(backend, generator):
    q = torch.randint(-127, 128, (33, 70), generator=generator, dtype=torch.int8)
    packed = ops.pack_int8(q, torch.ones(33), None, 6.0)
    plain = ops.pack_int8(q, torch.ones(33))
    x = torch.randn(4, 70, generator=generator).clamp(-5, 5)
    assert torch.equal(ops.linear(x, packed), ops.linear(x, plain))
    only = torch.zeros(1, 70)
    only[0, 69] = -6.0
    assert torch.equal(ops.linear(only, packed)[0], -6.0 * q[:, 69].float())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_what_is_not_finite_does_not_vanish(generator, value, threshold):
    if not cpu.has_amx():
        pytest.skip("needs AMX")
    q = torch.randint(1, 128, (33, 70), generator=generator, dtype=torch.int8)
    x = torch.ones(2, 70)
    x[1, 3] = value
    out = ops.linear(x, ops.pack_int8(q, torch.ones(33), None, threshold))
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


def every_format(n, k, generator):
    q8 = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    q, scales, zeros, _ = int4(n, k, 32, generator)
    indices, factors, table, _ = table4(n, k, 64, generator)
    data, channel, _ = fp8(n, k, generator)
    _, blocks, _ = fp8(n, k, generator, (32, 64))
    one = torch.tensor([0.01])
    permutation = torch.randperm(k, generator=generator)
    return {
        "dense": ops.pack_dense(torch.randn(n, k, generator=generator).bfloat16()),
        "int8": ops.pack_int8(q8, torch.rand(n, generator=generator)),
        "llm_int8": ops.pack_int8(q8, torch.rand(n, generator=generator), None, 2.0),
        "int4": ops.pack_int4(q, scales, zeros, 32),
        "permuted": ops.pack_int4(q, scales, zeros, 32, None, permutation),
        "int8_groups": ops.pack_int8_groups(*int8_groups(n, k, 64, generator)[:3], 64),
        "table4": ops.pack_table4(indices, factors, table, 64),
        "fp8": ops.pack_fp8(data, channel),
        "fp8_static": ops.pack_fp8(data, channel, None, None, "static", one),
        "fp8_weight_only": ops.pack_fp8(data, channel, activations="none"),
        "fp8_blocks": ops.pack_fp8(data, blocks, None, (32, 64)),
    }


def test_a_row_does_not_depend_on_the_other_rows(generator):
    """Bit for bit, from one row to several blocks of rows, on AMX."""
    if not cpu.has_amx():
        pytest.skip("needs AMX")
    n, k = 100, 320
    x = torch.randn(1000, k, generator=generator).bfloat16()
    for name, weight in every_format(n, k, generator).items():
        assert weight.layout == "amx", name
        together = ops.linear(x, weight)
        for rows in [1, 2, 5, 16, 17, 31, 32, 33, 64, 600]:
            assert torch.equal(ops.linear(x[:rows], weight), together[:rows]), (name, rows)
        assert torch.equal(ops.linear(x[700:701], weight), together[700:701]), name


def test_parts_of_different_formats_side_by_side(backend, generator):
    parts = list(every_format(40, 128, generator).values())
    joined = ops.concat(parts)
    assert joined.shape == (40 * len(parts), 128)
    assert joined.nbytes == sum(part.nbytes for part in parts)
    assert joined.bias is None
    x = torch.randn(2, 3, 128, generator=generator).bfloat16()
    expected = torch.cat([ops.linear(x, part) for part in parts], dim=-1)
    assert torch.equal(ops.linear(x, joined), expected)
    wide = torch.cat([ops.dequantize(part).float() for part in parts])
    assert torch.equal(ops.dequantize(joined), wide)
    assert ops.concat(parts[:1]) is parts[0]
    with pytest.raises(ValueError, match="one K"):
        ops.concat([parts[0], every_format(40, 64, generator)["dense"]])


def test_bytes_held_are_those_of_the_format(backend, generator):
    n, k = 512, 1024
    kept = n * k // 64
    q, scales, table, _ = table4(n, k, 64, generator)
    assert ops.pack_table4(q, scales, table, 64).nbytes <= n * k // 2 + 4 * kept + 64
    data, channel, _ = fp8(n, k, generator)
    assert ops.pack_fp8(data, channel).nbytes == n * k + 4 * n
    q8, scales, zeros, _ = int8_groups(n, k, 64, generator)
    assert ops.pack_int8_groups(q8, scales, zeros, 64).nbytes <= n * k + 8 * kept
    if backend == "amx":
        # As GPTQ stores symmetric weights: half precision scales and one zero for all.
        nibbles = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        packed = ops.pack_int4(nibbles, scales.half(), torch.full_like(scales, 8.0), 64)
        assert packed.nbytes == n * k // 2 + 2 * kept + 128


def test_wrong_weights_are_refused_with_a_reason():
    q, ones = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2)
    with pytest.raises(ValueError, match="does not divide"):
        ops.pack_int8_groups(q, ones, ones, 48)
    with pytest.raises(ValueError, match="needs scales and zeros"):
        ops.pack_int8_groups(q, ones, torch.ones(4), 32)
    with pytest.raises(ValueError, match="must be int8"):
        ops.pack_int8_groups(q.float(), ones, ones, 32)
    with pytest.raises(ValueError, match="must hold each of"):
        ops.pack_int8_groups(q, ones, ones, 32, None, torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match="16 entries"):
        ops.pack_table4(q, ones, torch.ones(15), 32)
    with pytest.raises(ValueError, match="needs scales of"):
        ops.pack_table4(q, torch.ones(4, 1), torch.ones(16), 32)
    with pytest.raises(ValueError, match=r"outside 0\.\.15"):
        ops.pack_table4(q + 16, ones, torch.ones(16), 32)
    with pytest.raises(ValueError, match="must be 0 or above"):
        ops.pack_int8(q, torch.ones(4), None, -1.0)
    data = q.float().to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="must be float8_e4m3fn"):
        ops.pack_fp8(q, torch.ones(4))
    with pytest.raises(ValueError, match="1 or 4 scales, got 3"):
        ops.pack_fp8(data, torch.ones(3))
    with pytest.raises(ValueError, match="in blocks of"):
        ops.pack_fp8(data, torch.ones(1, 1), None, (4, 32))
    with pytest.raises(ValueError, match="none, dynamic or static"):
        ops.pack_fp8(data, torch.ones(4), None, None, "sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need an input scale"):
        ops.pack_fp8(data, torch.ones(4), None, None, "static")
