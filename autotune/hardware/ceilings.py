"""How fast this machine moves and multiplies numbers, as measured a moment ago."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.limits import Rate

# The types that the engine computes in.
MATMUL_DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Memory bandwidth in bytes/s, and matmul rates in FLOP/s by dtype.

    A dtype in which the device cannot multiply is left out.
    """

    device: str
    bandwidth: Rate
    matmul: dict[str, Rate]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "device": self.device,
            "memory_bandwidth_bytes_per_s": dataclasses.asdict(self.bandwidth),
            "matmul_flop_per_s": {k: dataclasses.asdict(v) for k, v in self.matmul.items()},
        }


def measure_ceilings(device: str, seconds: float, step: Callable[[str], None]) -> Ceilings:
    """Measure the device's memory bandwidth, and its matmul rate in each dtype.

    Arguments:
        device: `cpu` or `cuda`.
        seconds: for each of the measurements.
        step: told what is measured, before it is.

    Raises:
        ImportError: torch is missing.
    """
    import torch

    from kernels.limits import measure_bandwidth, measure_matmul

    step(f"Measuring memory bandwidth ({seconds:g} s)")
    bandwidth = measure_bandwidth(seconds, torch.device(device))
    matmul = {}
    for name in MATMUL_DTYPES:
        step(f"Measuring {name} matmul ({seconds:g} s)")
        try:
            matmul[name] = measure_matmul(getattr(torch, name), seconds, torch.device(device))
        except RuntimeError:  # torch's word for a type that the device does not know
            continue
    return Ceilings(device, bandwidth, matmul)
