"""Seconds of device work, and the run that all measurements share."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.triton.cuda_timer import waits_for_device

REPLAYS = 9
LONG_ENOUGH = 2e-3  # seconds of a graph: much longer than what starting it costs


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, least and greatest over `runs` timed groups of calls."""

    median: float
    low: float
    high: float
    runs: int
    captured: bool

    def to_json(self) -> dict[str, float | int | bool]:
        """Plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Bench:
    """The device, and whether this is a rehearsal.

    A rehearsal runs everything on tiny shapes wherever it is, in Triton's interpreter on a CPU: it
    proves that the scripts run, and its times mean nothing. One that is `compiling` runs each call
    once and times nothing.
    """

    device: torch.device
    rehearsal: bool
    deadline: float
    compiling: bool = False

    @property
    def is_late(self) -> bool:
        """Whether the time for measuring is over."""
        return time.monotonic() > self.deadline

    def copies(self, num_bytes: int) -> int:
        """Operands to rotate among, so that together they are several times any cache."""
        alone = self.rehearsal or self.compiling
        return 1 if alone else max(1, min(64, math.ceil((256 << 20) / max(1, num_bytes))))

    def time(self, calls: Sequence[Callable[[], object]]) -> Timing:
        """Seconds of one call; `calls` are the same work on different operands.

        On a GPU a graph of many calls is replayed, so that no launch is in the figure; what cannot
        be captured is timed launch by launch and says so.
        """
        if self.compiling or self.device.type != "cuda":
            start = time.perf_counter()
            calls[0]()
            seconds = time.perf_counter() - start
            return Timing(seconds, seconds, seconds, 1, False)
        for call in calls[:2]:
            call()  # compile, choose algorithms
        torch.cuda.synchronize()
        once = _seconds(lambda: [call() for call in calls]) / len(calls)
        rounds = max(1, math.ceil(LONG_ENOUGH / max(once * len(calls), 1e-7)))
        rounds = min(rounds, max(1, 2000 // len(calls)))

        def group() -> None:
            for _ in range(rounds):
                for call in calls:
                    call()

        graph = None if waits_for_device(calls[0]) else _captured(group)
        run: Callable[[], object] = group if graph is None else graph.replay
        run()
        torch.cuda.synchronize()
        times = sorted(_seconds(run) / (rounds * len(calls)) for _ in range(REPLAYS))
        return Timing(statistics.median(times), times[0], times[-1], REPLAYS, graph is not None)


def _seconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """A graph of the work, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|`` (Frobenius), in float64; NaN stays NaN."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())
