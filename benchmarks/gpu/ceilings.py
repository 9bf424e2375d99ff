"""What the device can do at best, measured in the same run: copies and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.timing import Bench


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`copy_bandwidth` in bytes/s, read plus written; `matmul` in operations/s by dtype name."""

    copy_bandwidth: float
    matmul: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "copy_bandwidth_bytes_per_s": self.copy_bandwidth,
            "matmul_operations_per_s": self.matmul,
        }


def measure(bench: Bench) -> Ceilings:
    """A copy of gigabytes, and square products on random data (zeros run faster)."""
    size = 1 << 16 if bench.rehearsal else 4 << 30
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    copies: list[Callable[[], object]] = [partial(target.copy_, source)]
    bandwidth = 2 * size / bench.time(copies).low
    del source, target, copies  # gigabytes
    n = 64 if bench.rehearsal else 8192
    x, w = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    rates = {"bfloat16": 2 * n**3 / bench.time([lambda: F.linear(x, w)]).low}
    for name, product in _narrow_products(x, w).items():
        try:
            rates[name] = 2 * n**3 / bench.time([product]).low
        except RuntimeError:
            continue  # this device does not multiply in that type
    return Ceilings(bandwidth, rates)


def _narrow_products(x: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
    a8, b8 = (torch.randint_like(t, -127, 128).to(torch.int8) for t in (x, w))
    products: dict[str, Any] = {"int8": lambda: torch._int_mm(a8, b8.t())}
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 9):
        af, bf = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        one = torch.ones((), device=x.device)
        products["float8_e4m3fn"] = lambda: torch._scaled_mm(
            af, bf.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return products
