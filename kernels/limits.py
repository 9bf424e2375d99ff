"""Measured ceilings of a device: memory bandwidth, matmul rate per dtype, cost of one call.

What `doctor` prints and what a roofline divides by. Each figure is the best of several runs: a
ceiling is what the hardware can do, and everything that disturbs a run makes it slower. Operands
are random, as a GPU multiplies zeros and ones faster than it will any model's weights. Whether the
compiled kernels run, on which the rates depend, is told by `native_status` and `triton_status`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from kernels.cpu import NativeStatus, native_status
from kernels.triton.runtime import TritonStatus
from kernels.triton.runtime import status as triton_status

__all__ = [
    "Limits",
    "NativeStatus",
    "TritonStatus",
    "best_seconds",
    "call_cost",
    "launch_cost",
    "matmul_rate",
    "measure_limits",
    "memory_bandwidth",
    "native_status",
    "triton_status",
]

LARGEST_MATMUL = 4096
CPU_BUFFER_BYTES = 256 << 20
CUDA_BUFFER_BYTES = 2 << 30
# Least compute capability with matrix units for e4m3.
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device was seen to do.

    memory_bandwidth: bytes per second, reading on a CPU, reading plus writing on a GPU.
    matmul_rate: operations per second (a multiply-add is two) by dtype name; a dtype that the
    device cannot multiply is absent.
    call_cost: seconds of host time for one small PyTorch operation (a kernel launch on a GPU).
    launch_cost: seconds of the GPU's time from one tiny kernel to the next, launched one by one;
    graph_launch_cost: replayed from a CUDA graph. Both None on a CPU.
    """

    device: str
    threads: int
    memory_bandwidth: float
    matmul_rate: dict[str, float]
    call_cost: float
    launch_cost: float | None = None
    graph_launch_cost: float | None = None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """The fastest of at least three runs, and of as many as fit ``budget`` seconds.

    By the host's clock on a CPU, by events on a GPU, where the host's share does not count.
    """
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            return best_seconds(run, device, budget)
    run()  # warm up: first touches, compilation, library start
    _synchronize(device)
    timed = _event_seconds if device.type == "cuda" else _host_seconds
    best, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - begin < budget:
        best = min(best, timed(run))
        runs += 1
    return best


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _event_seconds(run: Callable[[], object]) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def memory_bandwidth(device: torch.device, budget: float = 0.5, nbytes: int | None = None) -> float:
    """Bytes per second of streaming through a buffer, by default one that no cache should hold.

    With `nbytes` it is of about that size, at least 1 MiB, and the bandwidth that of wherever the
    device keeps so much: weights that a cache holds are read at the cache's speed.
    """
    if device.type == "cpu":
        size = CPU_BUFFER_BYTES if nbytes is None else max(1 << 20, min(nbytes, 1 << 30))
        source = torch.ones(size // 4)
        return (size // 4 * 4) / best_seconds(source.sum, device, budget)
    free = torch.cuda.mem_get_info(device)[0]
    # A copy has two buffers.
    wanted = CUDA_BUFFER_BYTES if nbytes is None else max(1 << 20, nbytes // 2)
    size = min(CUDA_BUFFER_BYTES, wanted, free // 4)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, budget)


def _random(size: int, device: torch.device) -> Tensor:
    """float32 [size, size]: some rows, repeated, as drawing all would take a CPU too long."""
    count = min(64, size)
    return torch.randn(count, size, device=device).repeat(size // count, 1)


def _matmul(dtype: torch.dtype, size: int, device: torch.device) -> Callable[[], object]:
    if dtype == torch.int8:
        rows = _random(size, device)
        q = (rows * 40).clamp(-127, 127).to(torch.int8)
        weight = ops.pack_int8(q, torch.full((size,), 0.01, device=device))
        rows = rows.to(torch.bfloat16)
        return lambda: ops.linear(rows, weight)
    # Small enough that no float16 sum overflows.
    x = (_random(size, device) / 8).to(dtype)
    if dtype == torch.float8_e4m3fn:
        scale = torch.ones((), device=device)
        return lambda: torch._scaled_mm(
            x, x.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    if device.type == "cpu":
        dense = ops.pack_dense(x)
        return lambda: ops.linear(x, dense)
    return lambda: F.linear(x, x)


def matmul_rate(dtype: torch.dtype, device: torch.device, budget: float = 0.5) -> float | None:
    """Operations per second of a square linear layer in ``dtype``; None if there is no such kernel.

    The size doubles until a run is long enough to hide its start, so that a slow dtype does not
    take minutes. int8 is the whole W8A8 layer, quantization of the activations included. e4m3 is
    the matrix product alone and only on a GPU that has units for it.
    """
    if dtype == torch.float8_e4m3fn and not _multiplies_fp8(device):
        return None
    size, rate = 1024, 0.0
    long_enough = 0.1 if device.type == "cpu" else 0.005
    while size <= (LARGEST_MATMUL if device.type == "cpu" else 2 * LARGEST_MATMUL):
        try:
            seconds = best_seconds(_matmul(dtype, size, device), device, budget / 4)
        except RuntimeError:
            return None
        rate = max(rate, 2 * size**3 / seconds)
        if seconds > long_enough:
            break
        size *= 2
    return rate


def _multiplies_fp8(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def call_cost(device: torch.device, calls: int = 200) -> float:
    """Host seconds for one small operation, which a GPU need not have finished."""
    x = torch.zeros(16, device=device)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        best = min(best, (time.perf_counter() - start) / calls)
    _synchronize(device)
    return best


def launch_cost(device: torch.device, *, graph: bool, launches: int = 200) -> float | None:
    """Seconds of a GPU's time from one tiny kernel to the next; None on a CPU.

    Launched by PyTorch one by one, where the host is what takes the time, or from a ``graph``,
    where the device's own start of a kernel is.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        x = torch.zeros(16, device=device)

        def many() -> None:
            for _ in range(launches):
                x.add_(1)

        if not graph:
            return best_seconds(many, device, 0.05) / launches
        captured = torch.cuda.CUDAGraph()
        many()
        with torch.cuda.graph(captured):
            many()
        return best_seconds(captured.replay, device, 0.05) / launches


def measure_limits(device: torch.device | str = "cpu", budget: float = 2.0) -> Limits:
    """Measure everything in about ``budget`` seconds."""
    device = torch.device(device)
    names = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.int8,
        "float8_e4m3fn": torch.float8_e4m3fn,
    }
    share = budget / (len(names) + 1)
    rates = {name: matmul_rate(dtype, device, share) for name, dtype in names.items()}
    return Limits(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        memory_bandwidth=memory_bandwidth(device, share),
        matmul_rate={name: rate for name, rate in rates.items() if rate is not None},
        call_cost=call_cost(device),
        launch_cost=launch_cost(device, graph=False),
        graph_launch_cost=launch_cost(device, graph=True),
    )
