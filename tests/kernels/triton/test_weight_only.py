"""Weights that are widened in registers: every format through ops against float64."""

import numpy as np
import pytest
import torch
import triton.language as tl

from kernels import ops
from kernels.triton import runtime, tuning, weight_only
from kernels.triton.tuning import Choice, Problem
from kernels.triton.weight_only_layout import pack_table, units_of
from kernels.triton.weight_only_unpack import (
    FLOATS,
    FP8,
    INT4,
    INT8,
    INTEGERS,
    SYMMETRIC,
    assembly,
    factor,
    table_assembly,
)
from tests.kernels.triton import ptx

# Rounding of the output, and of what is rounded to x's dtype before the product.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}


def spread(values, group):
    return values.double().repeat_interleave(group, 1)


def made(kind, n, k, group, bias=None, permutation=None):
    """A weight of each kind by ops, and what it stands for in float64."""
    groups = k // group if group else 1
    if kind == "fp8":
        data = torch.randn(n, k).to(torch.float8_e4m3fn)
        block = (24, group) if group else None
        shape = (-(-n // 24), -(-k // group)) if group else (n,)
        scales = torch.rand(shape) + 0.1
        weight = ops.pack_fp8(data, scales, bias, block, "none")
        wide = scales.double()[:, None]
        if group:
            wide = scales.double().repeat_interleave(24, 0)[:n].repeat_interleave(group, 1)[:, :k]
        return weight, data.double() * wide
    scales = torch.rand(n, groups) * 0.1 + 0.01
    if "wide" not in kind:
        scales = scales.bfloat16().float()
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    if kind == "table":
        table = torch.randn(16)
        weight = ops.pack_table4(q, scales, table, group, bias)
        return weight, table.double()[q.long()] * spread(scales, group)
    if kind.startswith("int8"):
        q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        zeros = torch.rand(n, groups) * 9 if "floats" in kind else torch.zeros(n, groups)
        pack = ops.pack_int8_groups
    else:
        zeros = torch.full((n, groups), 8.0)
        if "integers" in kind:
            zeros = torch.randint(0, 16, (n, groups)).float()
        elif "floats" in kind:
            zeros = torch.rand(n, groups) * 15
        pack = ops.pack_int4
    weight = pack(q, scales, zeros, group, bias, permutation)
    wide = (q.double() - spread(zeros, group)) * spread(scales, group)
    return weight, wide if permutation is None else wide[:, torch.argsort(permutation)]


# kind, N, K, group size, rows, dtype of x, bias: groups of less than a unit, of several units and
# across units; K that is not whole units; N that is not whole tiles.
CASES = [
    ("int4", 70, 512, 128, 1, torch.bfloat16, True),
    ("int4", 64, 512, 512, 33, torch.float16, False),
    ("int4", 33, 384, 192, 3, torch.bfloat16, False),
    ("int4", 40, 192, 16, 17, torch.float16, True),
    ("int4", 24, 128, 64, 5, torch.float32, True),
    ("int4 wide", 96, 256, 32, 2, torch.bfloat16, False),
    ("int4 integers", 65, 512, 128, 4, torch.float16, True),
    ("int4 integers", 48, 160, 32, 9, torch.bfloat16, False),
    ("int4 integers wide", 16, 256, 64, 2, torch.bfloat16, False),
    ("int4 floats", 66, 256, 32, 3, torch.float16, False),
    ("int4 floats", 32, 256, 256, 16, torch.bfloat16, True),
    ("int8", 67, 256, 32, 4, torch.float16, True),
    ("int8", 20, 96, 48, 40, torch.bfloat16, False),
    ("int8 floats", 35, 256, 64, 2, torch.bfloat16, True),
    ("table", 68, 256, 64, 6, torch.bfloat16, True),
    ("table", 30, 128, 32, 2, torch.float16, False),
    ("fp8", 70, 256, 0, 3, torch.bfloat16, True),
    ("fp8", 50, 320, 128, 20, torch.float16, False),
]


@pytest.mark.parametrize(("kind", "n", "k", "group", "rows", "dtype", "biased"), CASES)
def test_linear_and_dequantize(device, kind, n, k, group, rows, dtype, biased):
    bias = torch.randn(n) if biased else None
    weight, wide = made(kind, n, k, group, bias)
    assert weight.layout == "triton"
    torch.testing.assert_close(ops.dequantize(weight).double(), wide, rtol=1e-6, atol=1e-6)
    x = torch.randn(rows, k + 3).to(dtype)[:, :k]
    expected = x.double() @ wide.t() + (0 if bias is None else bias.double())
    out = ops.linear(x, weight)
    assert out.dtype == dtype
    assert out.shape == (rows, n)
    # Numbers that are rounded to x's dtype before they are scaled have two roundings.
    most = TOLERANCE[dtype] * (2 if "floats" in kind or kind == "table" else 1)
    assert float((out.double() - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("kind", ["int4 integers", "int8"])
def test_permuted_columns(device, kind):
    weight, wide = made(kind, 40, 256, 64, None, torch.randperm(256))
    assert weight.layout == "triton"
    torch.testing.assert_close(ops.dequantize(weight).double(), wide, rtol=1e-6, atol=1e-6)
    x = torch.randn(2, 3, 256).half()
    expected = x.double() @ wide.t()
    error = (ops.linear(x, weight).double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE[torch.float16]


def test_every_choice_multiplies_alike(device):
    weight, wide = made("int4", 66, 256, 64)
    for rows, few in ((3, 3), (65, 3), (512, 2)):
        x = torch.randn(rows, 256).bfloat16()
        expected = x.double() @ wide.t()
        with tuning.recording() as asked:
            ops.linear(x, weight)
        (problem,) = asked
        found = tuning.candidates(problem, runtime.INTERPRETED)
        assert asked[problem] in found, "the default is one of the choices"
        assert 1 < len(found) <= 12
        for choice in found[-few:]:
            with tuning.forced({problem: choice}):
                out = ops.linear(x, weight).double()
            assert float((out - expected).norm() / expected.norm()) < 4e-3, choice


def test_splits_are_added_in_order(device):
    """The same whatever ran first: a row's result depends on the tiles alone."""
    weight, _ = made("int4", 32, 1024, 128)
    x = torch.randn(2, 1024).bfloat16()
    problem = Problem(weight_only.KERNEL, (2, 32, 1024, 128, 0, 0), ("torch.bfloat16",))
    tiles = weight_only.default_choice(problem, runtime.INTERPRETED).tiles
    with tuning.forced({problem: Choice("triton", {**tiles, "splits": 3})}):
        both = ops.linear(x, weight)
        assert torch.equal(both, ops.linear(x, weight))
    with tuning.forced({problem: Choice("triton", {**tiles, "splits": 1})}):
        torch.testing.assert_close(ops.linear(x, weight), both, rtol=1e-2, atol=1e-2)


def test_groups_that_cut_lanes_stay_plain(device):
    weight, wide = made("int4", 8, 96, 24)
    assert weight.layout == "plain"
    x = torch.randn(3, 96)
    torch.testing.assert_close(ops.linear(x, weight), (x.double() @ wide.t()).float())


def test_no_rows(device):
    weight, _ = made("int4", 16, 128, 64)
    assert ops.linear(torch.empty(0, 128).bfloat16(), weight).shape == (0, 16)


def test_bytes_held(device):
    n, k = 64, 1024
    assert made("int4", n, k, 128)[0].nbytes == n * k // 2 + n * k // 128 * 2
    assert made("int4 integers", n, k, 128)[0].nbytes == n * k // 2 + n * k // 128 * 4
    assert made("fp8", n, k, 0)[0].nbytes == n * k + n * 4


def test_units_hold_whole_groups_of_lanes():
    for k in (64, 96, 160, 896, 4096, 11008):
        for lanes in (2, 4):
            for group in (0, 16, 32, 48, 64, 128, 192, k):
                units = units_of(k, lanes, group)
                assert units is not None
                assert units.columns == lanes * units.quarter
                assert group % units.quarter == 0
                assert 0 <= units.columns * units.total - k < units.columns
    assert units_of(4096, 4, 128) == (256, 64, 16)
    assert units_of(4096, 4, 8) is None


def test_splits_fill_the_device():
    assert weight_only.best_splits(400, 16, 400, 16) == 1
    assert weight_only.best_splits(32, 56, 400, 16) > 6
    assert weight_only.best_splits(200, 16, 400, 16) == 2
    assert weight_only.best_splits(200, 16, 400, 128) == 1
    assert weight_only.best_splits(1, 1, 400, 16) == 1


DTYPES = {torch.bfloat16: False, torch.float16: True}
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def containers(codes, bits):
    """Codes [threads, 2, lanes] -> registers of two containers."""
    lanes = codes.shape[-1]
    shifted = sum(codes[..., lane].astype(np.uint32) << (bits * lane) for lane in range(lanes))
    return shifted[:, 0] | shifted[:, 1] << 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [SYMMETRIC, INTEGERS, FLOATS])
def test_assembly_of_nibbles(dtype, zeros):
    random = np.random.default_rng()
    codes = random.integers(0, 16, (512, 2, 4))
    garbage = random.integers(0, 1 << 16, (512, 2), dtype=np.uint32)
    less = np.full((512, 1), 8.0)
    params = []
    if zeros == INTEGERS:
        less = random.integers(0, 16, (512, 1))
        params = [garbage[:, i] | less[:, 0].astype(np.uint32) << 16 for i in (0, 1)]
    elif zeros == FLOATS:
        less = random.random((512, 1), dtype=np.float32) * 15
        params = [less[:, 0].view(np.uint32)] * 2
    for lane in range(4):
        code = assembly(INT4, lane, DTYPES[dtype], zeros)
        (out,) = ptx.run(code, 1, [containers(codes, 4), *params])
        wanted = torch.from_numpy((codes[..., lane] - less).astype(np.float32)).to(dtype)
        found = torch.stack(ptx.halves_of(out, dtype), -1) * factor(
            INT4, zeros, TYPES[dtype], False
        )
        assert torch.equal(found, wanted), (lane, code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [SYMMETRIC, FLOATS])
def test_assembly_of_bytes(dtype, zeros):
    random = np.random.default_rng()
    codes = random.integers(-128, 128, (1024, 2, 2))
    less = random.random((1024, 1), dtype=np.float32) * 300 - 150
    params = [less[:, 0].view(np.uint32)] * 2 if zeros == FLOATS else []
    for lane in range(2):
        code = assembly(INT8, lane, DTYPES[dtype], zeros)
        (out,) = ptx.run(code, 1, [containers(codes & 255, 8), *params])
        wide = codes[..., lane] - (less if zeros == FLOATS else 0)
        wanted = torch.from_numpy(wide.astype(np.float32)).to(dtype)
        found = torch.stack(ptx.halves_of(out, dtype), -1) * factor(
            INT8, zeros, TYPES[dtype], False
        )
        assert torch.equal(found, wanted), (lane, code)


@pytest.mark.parametrize("dtype", DTYPES)
def test_assembly_of_e4m3(dtype):
    codes = np.stack([np.arange(256), np.arange(256)[::-1]], -1)[:, None].repeat(2, 1)
    for lane in range(2):
        code = assembly(FP8, lane, DTYPES[dtype], SYMMETRIC)
        (out,) = ptx.run(code, 1, [containers(codes, 8)])
        bits = torch.from_numpy(codes[..., lane].astype(np.uint8))
        wanted = bits.view(torch.float8_e4m3fn).to(dtype)
        found = torch.stack(ptx.halves_of(out, dtype), -1)
        found, wanted = found[~wanted.isnan()], wanted[~wanted.isnan()]
        assert torch.equal(found, wanted)
        assert torch.equal(found.signbit(), wanted.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_assembly_of_tables(dtype):
    table = torch.randn(16)
    packed = pack_table(table)
    words = packed.view(torch.int32).numpy().view(np.uint32)[16 + 8 * DTYPES[dtype] :][:8]
    codes = np.random.default_rng().integers(0, 16, (512, 2, 4))
    registers = [np.full(512, word, np.uint32) for word in words.repeat(2)]
    found = ptx.run(table_assembly(), 4, [containers(codes, 4), *registers])
    for lane, out in enumerate(found):
        wanted = table.to(dtype)[torch.from_numpy(codes[..., lane])]
        assert torch.equal(torch.stack(ptx.halves_of(out, dtype), -1), wanted)
