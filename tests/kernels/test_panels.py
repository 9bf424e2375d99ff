"""Dense weights in panels without tiles, and numbers that are multiplied in float32: on any CPU."""

import pytest
import torch

from kernels import cpu, ops, plain_linear, reference, slow_dtypes
from kernels.cpu.matmul import in_panels
from kernels.cpu.recording import record

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

native = pytest.mark.skipif(not cpu.native_status().available, reason="needs a compiler")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (64, 64),
        (33, 96),  # a panel of one column
        (50, 77),  # odd: a line that is half empty
        (16, 1),
        (40, 1100),  # several stretches of K, the last a short one
    ],
)
def test_products(generator, dtype, with_bias, n, k):
    weight = torch.randn(n, k, generator=generator).bfloat16()
    bias = torch.randn(n, generator=generator).bfloat16() if with_bias else None
    packed = in_panels(weight, bias, "panels")
    assert torch.equal(ops.dequantize(packed), weight)
    for rows in [*range(1, 15), 96, 97, 100, 200]:
        x = torch.randn(rows, k + 3, generator=generator).to(dtype)[:, :k]
        wide = None if bias is None else bias.double()
        expected = reference.linear(x.double(), weight.double(), wide)
        actual = ops.linear(x, packed)
        assert actual.dtype == dtype
        assert error(actual, expected) < RELATIVE_ERROR[dtype]
    assert ops.linear(x[:0], packed).shape == (0, n)


@native
@pytest.mark.parametrize("k", [96, 1500])
def test_a_row_does_not_depend_on_the_other_rows_or_on_threads(generator, k):
    packed = in_panels(torch.randn(200, k, generator=generator).bfloat16(), None, "panels")
    x = torch.randn(300, k, generator=generator).bfloat16()
    together = ops.linear(x, packed)
    for rows in [1, 2, 3, 4, 5, 6, 7, 13, 96, 97]:
        assert torch.equal(ops.linear(x[:rows], packed), together[:rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.linear(x, packed), together)
    finally:
        torch.set_num_threads(threads)


@native
def test_infinities_and_what_is_no_number_stay(generator):
    weight = torch.randn(40, 64, generator=generator).bfloat16()
    weight[3, 5], weight[4, 6] = torch.inf, torch.nan
    x = torch.randn(7, 64, generator=generator).bfloat16()
    got = ops.linear(x, in_panels(weight, None, "panels"))
    expected = x.float() @ weight.float().t()
    assert torch.equal(got.isinf(), expected.isinf())
    assert torch.equal(got.isnan(), expected.isnan())


@native
def test_rows_of_a_table_and_a_recording(generator):
    table = torch.randn(70, 96, generator=generator).bfloat16()
    packed = in_panels(table, None, "panels")
    ids = torch.tensor([0, 69, 31, 32])
    assert torch.equal(ops.embedding(ids, packed), table[ids])
    recording = record(lambda: ops.linear(ops.embedding(ids, packed), packed))
    ids.copy_(ids.flip(0))
    assert torch.equal(recording.replay(), ops.linear(table[ids], packed))


def test_a_panel_wants_the_native_library(generator):
    packed = in_panels(torch.randn(32, 32, generator=generator).bfloat16(), None, "panels")
    with cpu.without_native(), pytest.raises(RuntimeError, match="switched off"):
        ops.linear(torch.zeros(1, 32), packed)


@pytest.fixture
def all_slow(monkeypatch):
    """As on a CPU that has products of float32 alone."""
    slow = frozenset({torch.bfloat16, torch.float16, torch.int8})
    monkeypatch.setattr(slow_dtypes, "_slow_on_cpu", lambda: slow)


@native
def test_what_is_slow_is_packed_in_panels_and_what_is_not_is_left(generator, monkeypatch):
    weight = torch.randn(32, 32, generator=generator).bfloat16()
    with cpu.without_amx():
        for slow, layout in ((frozenset({torch.bfloat16}), "panels"), (frozenset(), "plain")):
            monkeypatch.setattr(slow_dtypes, "_slow_on_cpu", lambda slow=slow: slow)
            assert ops.pack_dense(weight).layout == layout
            assert ops.pack_dense(weight.half()).layout == "plain"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_slow_floats_are_multiplied_in_float32(all_slow, generator, dtype, rows):
    weight = torch.randn(48, 80, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 80, generator=generator).to(dtype)
    with cpu.without_native():
        actual = ops.linear(x, ops.pack_dense(weight, bias))
    assert actual.dtype == dtype
    expected = reference.linear(x.double(), weight.double(), bias.double())
    assert error(actual, expected) < RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("backend_native", [True, False])
def test_slow_int4_and_fp8_are_multiplied_in_float32(all_slow, generator, backend_native):
    q = torch.randint(0, 16, (48, 64), generator=generator, dtype=torch.int32)
    scales, zeros = torch.rand(48, 2, generator=generator) + 0.1, torch.full((48, 2), 8.0)
    x = torch.randn(20, 64, generator=generator).bfloat16()
    with cpu.without_amx() if backend_native else cpu.without_native():
        for packed in (
            ops.pack_int4(q, scales, zeros, 32),
            ops.pack_int8_groups(q.to(torch.int8), scales, zeros, 32),
            ops.pack_fp8(
                torch.randn(48, 64, generator=generator).to(torch.float8_e4m3fn),
                scales[:, 0],
                activations="none",
            ),
        ):
            used = ops.dequantize(packed).double()
            expected = reference.linear(x.double(), used, None)
            assert error(ops.linear(x, packed), expected) < 5e-3


@pytest.mark.parametrize("k", [3, 1024, 1025, 4096])
def test_sums_of_int8_are_exact_in_float32(all_slow, generator, k):
    a = torch.randint(-128, 128, (7, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (9, k), generator=generator, dtype=torch.int8)
    a[0] = b[0] = -128  # the largest sum
    a[1] = 127
    exact = (a.long() @ b.long().t()).to(torch.int32)
    assert torch.equal(plain_linear.int8_matmul(a, b), exact)
