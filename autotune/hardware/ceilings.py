"""How fast this machine moves and multiplies numbers, as measured a moment ago."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The types that the engine computes in.
MATMUL_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
ROUNDS = 3
# On a busy machine a round may take ten times as long as asked; then fewer must do.
LONGEST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate over several rounds: their median, least and greatest.

    Rounds that differ much say that something else uses the machine.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: list[float]) -> Rate:
        """Summarise the rounds, of which there is at least one."""
        return cls(statistics.median(rounds), min(rounds), max(rounds))


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Memory bandwidth in bytes/s, and matmul rates in operations/s by dtype.

    A multiply-add is two operations. A dtype in which the device cannot multiply is left out.
    `launch_cost` and `graph_launch_cost` are seconds from one tiny kernel to the next on a GPU,
    launched one by one and replayed from a graph; None on a CPU.
    """

    device: str
    bandwidth: Rate
    matmul: dict[str, Rate]
    launch_cost: float | None = None
    graph_launch_cost: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "device": self.device,
            "memory_bandwidth_bytes_per_s": dataclasses.asdict(self.bandwidth),
            "matmul_operations_per_s": {k: dataclasses.asdict(v) for k, v in self.matmul.items()},
            "launch_cost_s": self.launch_cost,
            "graph_launch_cost_s": self.graph_launch_cost,
        }


def measure_ceilings(device: str, seconds: float, step: Callable[[str], None]) -> Ceilings:
    """Measure the device's memory bandwidth and its matmul rate in each dtype, in rounds.

    Arguments:
        device: `cpu` or `cuda`.
        seconds: about how long each rate is measured, all rounds together.
        step: told which round begins.
    """
    import torch

    from kernels.limits import launch_cost, matmul_rate, memory_bandwidth

    where = torch.device(device)
    bandwidth: list[float] = []
    matmul: dict[str, list[float]] = {}
    # In rounds, so that a disturbance spreads over all rates and shows as a difference in each.
    began = time.perf_counter()
    for number in range(1, ROUNDS + 1):
        if number > 1 and time.perf_counter() - began > LONGEST_SECONDS:
            break
        step(f"Measuring bandwidth and matmul, round {number} of {ROUNDS}")
        bandwidth.append(memory_bandwidth(where, seconds / ROUNDS))
        for name in MATMUL_DTYPES:
            rate = matmul_rate(getattr(torch, name), where, seconds / ROUNDS)
            if rate is not None:
                matmul.setdefault(name, []).append(rate)
    return Ceilings(
        device,
        Rate.of(bandwidth),
        {name: Rate.of(rates) for name, rates in matmul.items()},
        launch_cost(where, graph=False),
        launch_cost(where, graph=True),
    )
