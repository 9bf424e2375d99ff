"""What is timed comes from memory and not from the cache; on a GPU, against what a GPU can do."""

import contextlib
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch

from kernels.triton import cuda_timer
from kernels.triton.cuda_timer import CudaTimer, Plan, plan, waits_for_device
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


class PretendedCuda:
    """Stands for `torch.cuda`: its time passes where runs of an operation say so.

    What is done while capturing takes no time; a replay does it again.
    """

    def __init__(self):
        self.now = 0.0
        self.captured = None
        self.pools = []
        self.captures = 0
        self.mode = 0
        self.graphs = weakref.WeakSet()
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def capture_begin(self, pool):
                if pool in cuda.pools and not cuda.graphs:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                cuda.graphs.add(self)
                cuda.pools.append(pool)
                cuda.captured = self.work = []

            def capture_end(self):
                cuda.captured = None
                cuda.captures += 1

            def replay(self):
                for seconds in self.work:
                    cuda.now += seconds

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

            def synchronize(self):
                pass

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream
        self.device = self.stream = lambda _: contextlib.nullcontext()

    def takes(self, seconds):
        if self.captured is None:
            self.now += seconds
        else:
            self.captured.append(seconds)

    def synchronize(self, device=None):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        warnings.warn("a prototype feature", UserWarning, stacklevel=2)  # as PyTorch, once
        self.mode = mode

    def current_stream(self, device=None):
        return self.Stream()

    def graph_pool_handle(self):
        return "the pool"

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50 * MIB)


@pytest.fixture
def cuda(monkeypatch):
    pretended = PretendedCuda()
    monkeypatch.setattr(cuda_timer.torch, "cuda", pretended)
    monkeypatch.setattr(CudaTimer, "_overwrite_cache", lambda self: pretended.takes(1.0))
    return pretended


def test_layers_are_captured_together_and_each_has_its_share(cuda):
    seconds = [1e-4, 3e-4]
    runs = [lambda s=s: cuda.takes(s) for s in seconds]
    timer = CudaTimer("cuda")
    again = timer(Operation("layers", runs, 100 * MIB))
    assert cuda.captures == 1
    assert [again().median for _ in range(2)] == pytest.approx([2e-4, 2e-4])
    timer(Operation("layers", runs, 100 * MIB))
    assert cuda.pools == ["the pool"] * 2


def test_flushing_the_cache_does_not_count(cuda):
    timing = CudaTimer("cuda")(Operation("small", [lambda: cuda.takes(5e-5)], MIB))()
    assert timing.median == pytest.approx(5e-5)
    assert cuda.now > 1.0  # it was flushed


def test_what_waits_for_the_device_is_timed_without_a_graph(cuda):
    def waits():
        cuda.takes(2e-4)
        cuda.synchronize()

    timing = CudaTimer("cuda")(Operation("waits", [waits], 200 * MIB))()
    assert timing.median == pytest.approx(2e-4)
    # Not tried: PyTorch 2.11 captures nothing more after a capture that failed.
    assert cuda.pools == []
    assert cuda.mode == 0


def test_an_operation_is_captured_when_the_graphs_of_the_one_before_are_gone(cuda):
    timer = CudaTimer("cuda")
    for _ in range(3):
        timer(Operation("layer", [lambda: cuda.takes(1e-4)], 200 * MIB))()
        gc.collect()
    assert cuda.captures == 3
    assert len(cuda.graphs) == 1


def test_what_fails_fails(cuda):
    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        waits_for_device(broken)
    assert cuda.mode == 0


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
