"""Measured ceilings of a device: memory bandwidth, matmul rate per dtype, cost of one call.

What `doctor` prints and what a roofline divides by. Each figure is the best of several runs: a
ceiling is what the hardware can do, and everything that disturbs a run makes it slower. Whether the
native CPU kernels run, on which the rates depend, is told by `native_status`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import ops
from kernels.cpu import NativeStatus, native_status

__all__ = [
    "Limits",
    "NativeStatus",
    "best_seconds",
    "call_cost",
    "matmul_rate",
    "measure_limits",
    "memory_bandwidth",
    "native_status",
]

LARGEST_MATMUL = 4096
CPU_BUFFER_BYTES = 256 << 20
CUDA_BUFFER_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device was seen to do.

    memory_bandwidth: bytes per second, reading on a CPU, reading plus writing on a GPU.
    matmul_rate: operations per second (a multiply-add is two) by dtype name; a dtype that the
    device cannot multiply is absent.
    call_cost: seconds of host time for one small PyTorch operation (a kernel launch on a GPU).
    """

    device: str
    threads: int
    memory_bandwidth: float
    matmul_rate: dict[str, float]
    call_cost: float


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """The fastest of at least three runs, and of as many as fit ``budget`` seconds."""
    run()  # warm up: first touches, compilation, library start
    _synchronize(device)
    best, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def memory_bandwidth(device: torch.device, budget: float = 0.5) -> float:
    """Bytes per second of streaming through a buffer that no cache should hold."""
    if device.type == "cpu":
        source = torch.ones(CPU_BUFFER_BYTES // 4)
        return CPU_BUFFER_BYTES / best_seconds(source.sum, device, budget)
    free = torch.cuda.mem_get_info(device)[0]
    size = min(CUDA_BUFFER_BYTES, free // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, budget)


def _matmul(dtype: torch.dtype, size: int, device: torch.device) -> Callable[[], object]:
    if dtype == torch.int8:
        q = torch.ones(size, size, dtype=torch.int8, device=device)
        weight = ops.pack_int8(q, torch.ones(size, device=device))
        rows = torch.ones(size, size, dtype=torch.bfloat16, device=device)
        return lambda: ops.linear(rows, weight)
    x = torch.ones(size, size, dtype=dtype, device=device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        dense = ops.pack_dense(x)
        return lambda: ops.linear(x, dense)
    return lambda: F.linear(x, x)


def matmul_rate(dtype: torch.dtype, device: torch.device, budget: float = 0.5) -> float | None:
    """Operations per second of a square linear layer in ``dtype``; None if there is no such kernel.

    The size doubles until a run is long enough to hide its start, so that a slow dtype does not
    take minutes. int8 is the whole W8A8 layer, quantization of the activations included.
    """
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


def call_cost(device: torch.device, calls: int = 200) -> float:
    """Host seconds for one small operation."""
    x = torch.zeros(16, device=device)

    def many() -> None:
        for _ in range(calls):
            x.add_(1)

    return best_seconds(many, device, 0.05) / calls


def measure_limits(device: torch.device | str = "cpu", budget: float = 2.0) -> Limits:
    """Measure everything in about ``budget`` seconds."""
    device = torch.device(device)
    names = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.int8,
    }
    share = budget / (len(names) + 1)
    rates = {name: matmul_rate(dtype, device, share) for name, dtype in names.items()}
    return Limits(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        memory_bandwidth=memory_bandwidth(device, share),
        matmul_rate={name: rate for name, rate in rates.items() if rate is not None},
        call_cost=call_cost(device),
    )
