"""What is timed comes from memory and not from the cache; on a GPU, against what a GPU can do."""

import pytest
import torch

from kernels.triton import cuda_timer
from kernels.triton.cuda_timer import CudaTimer, Plan, plan
from kernels.triton.measure import Operation

MIB = 1 << 20


def operation(runs, nbytes):
    return Operation("sample", [lambda: torch.zeros(1)] * runs, nbytes)


@pytest.mark.parametrize(
    ("runs", "nbytes", "once", "expected"),
    [
        # Larger than the cache: alone, nothing to flush.
        (32, 200 * MIB, 1e-3, Plan(1, 30, False)),
        # Layers that are together larger: as many as that takes, or as fill a graph.
        (32, 30 * MIB, 2e-3, Plan(10, cuda_timer.LEAST_REPEATS, False)),
        (32, 30 * MIB, 1e-4, Plan(32, 9, False)),
        # All of it would stay in the cache.
        (4, 30 * MIB, 1e-4, Plan(1, cuda_timer.MOST_REPEATS, True)),
        (1, 0, 1e-5, Plan(1, cuda_timer.MOST_REPEATS, True)),
    ],
)
def test_operands_are_rotated_or_the_cache_is_flushed(runs, nbytes, once, expected):
    assert plan(operation(runs, nbytes), once, 0.03, 150 * MIB) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 16])
def test_a_copy_moves_no_faster_than_memory(count):
    device = torch.device("cuda")
    sources = [torch.randn(4 * MIB, device=device) for _ in range(count)]
    copies = Operation("copy", [source.clone for source in sources], 32 * MIB)
    timing = CudaTimer(device)(copies)()
    assert timing.low <= timing.median <= timing.high
    assert 1e10 < 32 * MIB / timing.median < 1e13


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_cannot_be_captured_is_timed_all_the_same():
    x = torch.ones(1024, device="cuda")

    def waits():
        return x * float(x.sum())

    assert CudaTimer(x.device)(Operation("waits", [waits], 4096))().median > 0
