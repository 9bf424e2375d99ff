"""Measured ceilings of a device: how fast it reads memory, and how fast it multiplies matrices.

No kernel can be faster than these; how near one comes says what is left to gain. They are measured
with PyTorch's own operations and hold for what the machine gives this process at that moment.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Larger than the caches of today's processors, which would otherwise be measured instead.
_READ_BYTES = 512 << 20
# Smaller ones measure how soon the threads meet, on a machine that others use too.
_LEAST_MATMUL_SIZE = 1024
_MAX_MATMUL_SIZE = {"cpu": 4096, "cuda": 8192}
_SHORTEST_SAMPLE = 5e-3


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate per second: the median of several samples, and their quartiles `low` and `high`."""

    median: float
    low: float
    high: float
    samples: int


def measure_bandwidth(seconds: float = 1.0, device: torch.device | str = "cpu") -> Rate:
    """Bytes per second read from memory, by a matrix-vector product, as decoding does.

    Arguments:
        seconds: about how long to measure, after one warm-up.
        device: the device whose memory is read.
    """
    device = torch.device(device)
    columns = 16384
    matrix = torch.zeros((_READ_BYTES // 4 // columns, columns), device=device)
    vector = torch.zeros(columns, device=device)

    def read() -> torch.Tensor:
        return torch.mv(matrix, vector)

    return _sample(read, matrix.nbytes, _least_time(read, device), seconds, device)


def measure_matmul(
    dtype: torch.dtype, seconds: float = 1.0, device: torch.device | str = "cpu"
) -> Rate:
    """Multiply-and-add operations per second, counted as two each, of square matrices.

    The matrices are made as large as the time allows, up to where the rate no longer grows.

    Arguments:
        dtype: of both matrices; int8 accumulates in int32.
        seconds: about how long to measure, besides finding the size.
        device: the device that multiplies.

    Raises:
        RuntimeError: the device does not multiply this dtype.
    """
    device = torch.device(device)
    size = _LEAST_MATMUL_SIZE
    while True:
        multiply = _multiplication(size, dtype, device)
        took = _least_time(multiply, device)
        # Doubling the size takes eight times as long; some samples must fit the time.
        if size >= _MAX_MATMUL_SIZE.get(device.type, 4096) or took * 8 > seconds / 4:
            return _sample(multiply, 2 * size**3, took, seconds, device)
        size *= 2


def _multiplication(
    size: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    if dtype == torch.int8:
        whole = torch.ones((size, size), dtype=dtype, device=device)
        return lambda: torch._int_mm(whole, whole)
    # Random values: hardware saves power, and so gains speed, where all bits are equal.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


def _sample(
    work: Callable[[], torch.Tensor],
    amount: float,
    took: float,
    seconds: float,
    device: torch.device,
) -> Rate:
    """The rate of calls that do `amount` units of work each; at least three samples.

    `took` is about what a call takes: on a GPU it may be less than telling the time takes, and
    then several calls make a sample.
    """
    repeats = max(1, round(_SHORTEST_SAMPLE / max(took, 1e-6)))
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        rates.append(amount * repeats / _time(work, repeats, device))
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return Rate(median, low, high, len(rates))


def _least_time(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """What a call takes when nothing disturbs it; the first calls warm up."""
    return min(_time(work, 1, device) for _ in range(3))


def _time(work: Callable[[], torch.Tensor], repeats: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
