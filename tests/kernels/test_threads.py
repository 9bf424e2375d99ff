"""Threads share the work of a native kernel without changing a bit of its result."""

from collections.abc import Callable, Iterator

import pytest
import torch

from kernels import ops
from tests.kernels.attention_cases import attend, make_case

# How plain PyTorch divides its work is its own affair.
pytestmark = pytest.mark.parametrize("backend", ["amx", "native"], indirect=True)


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """More threads than one, set while the test asks for them."""
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


def same_with(threads: int, run: Callable[[], torch.Tensor]) -> None:
    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(threads)
    assert torch.equal(run(), alone)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "fp8"])
def test_linears(backend, generator, threads, kind, rows):
    n, k = 200, 256
    w = torch.randn(n, k, generator=generator)
    if kind == "dense":
        weight: ops.LinearWeight = ops.pack_dense(w.bfloat16())
    elif kind == "int8":
        q = (w * 20).round().clamp(-127, 127).to(torch.int8)
        weight = ops.pack_int8(q, torch.rand(n, generator=generator))
    elif kind == "fp8":
        weight = ops.pack_fp8(w.to(torch.float8_e4m3fn), torch.rand(n, generator=generator))
    else:
        q = torch.randint(0, 16, (n, k), generator=generator).to(torch.uint8)
        scales = torch.rand(n, 4, generator=generator)
        weight = ops.pack_int4(q, scales, torch.full((n, 4), 8.0), 64)
    if weight.layout in ("plain", "onednn", "aten"):
        pytest.skip("not a native kernel")
    x = torch.randn(rows, k, generator=generator).bfloat16()
    same_with(threads, lambda: ops.linear(x, weight))


def test_attention(backend, generator, threads):
    sequences = [(1, 30), (1, 1500), (1, 7), (40, 90), (120, 900)]
    case = make_case(torch.bfloat16, 64, 2, 3, 16, sequences, generator)
    same_with(threads, lambda: attend(case, case.q, case.metadata))


def test_rows(backend, generator, threads):
    x = torch.randn(50, 192, generator=generator).bfloat16()
    weight = torch.rand(192, generator=generator).bfloat16()
    same_with(threads, lambda: ops.rms_norm(x, weight, 1e-5))
    same_with(threads, lambda: ops.silu_and_mul(x))
    same_with(threads, lambda: ops.gelu_and_mul(x, "tanh"))
