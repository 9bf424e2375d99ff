"""How long a device worked on a step."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """Started and stopped around work that is handed to a device."""

    def start(self) -> None:
        """The device begins when it comes to here."""
        ...

    def stop(self) -> None:
        """The device has finished when it comes to here."""
        ...

    def seconds(self) -> float:
        """Wait for the end; seconds between the two on the device."""
        ...


class HostStopwatch:
    """For a device that has done its work when it is handed back."""

    def __init__(self) -> None:
        self._start = self._stop = 0.0

    def start(self) -> None:
        """Now."""
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Now."""
        self._stop = time.perf_counter()

    def seconds(self) -> float:
        """Seconds between the two."""
        return self._stop - self._start


class CudaStopwatch:
    """By events on the current stream: marking costs the host microseconds and no wait."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Mark the place in the stream."""
        self._start.record()

    def stop(self) -> None:
        """Mark the place in the stream."""
        self._stop.record()

    def seconds(self) -> float:
        """Wait for the second mark; seconds between the two, to half a microsecond."""
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    """A stopwatch for one step on a device."""
    return CudaStopwatch() if device.type == "cuda" else HostStopwatch()
