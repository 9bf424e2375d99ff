"""Rows of measurements, the targets that they are held against, and their table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import Timing


@dataclass(slots=True)
class Row:
    """One operation at one shape.

    `floor` is the least time that the measured ceilings allow: `num_bytes` over the copy bandwidth
    or `operations` over the matmul rate, whichever is longer. `peers` are PyTorch's own ways.
    `error` is against float64, relative; `allowed` what rounding explains.
    """

    name: str
    shape: dict[str, Any]
    timing: Timing
    num_bytes: float = 0.0
    operations: float = 0.0
    rate: str = "bfloat16"
    error: float | None = None
    allowed: float | None = None
    peers: dict[str, Timing | str] = field(default_factory=dict)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds below which the device cannot do it."""
        rate = ceilings.matmul.get(self.rate)
        return max(
            self.num_bytes / ceilings.copy_bandwidth,
            self.operations / rate if rate and self.operations else 0.0,
        )

    def best_peer(self) -> float | None:
        """Seconds of the fastest peer that ran."""
        times = [peer.median for peer in self.peers.values() if isinstance(peer, Timing)]
        return min(times, default=None)

    @property
    def is_right(self) -> bool:
        """Whether the error is within what rounding explains; NaN is not."""
        return self.error is None or self.allowed is None or self.error <= self.allowed

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        """Plain values, with what follows from them."""
        floor, peer = self.floor(ceilings), self.best_peer()
        return {
            "name": self.name,
            "shape": self.shape,
            "seconds": self.timing.to_json(),
            "floor_seconds": floor,
            "share_of_floor": floor / self.timing.median,
            "bytes": self.num_bytes,
            "operations": self.operations,
            "error": self.error,
            "allowed_error": self.allowed,
            "peers": {
                name: timing.to_json() if isinstance(timing, Timing) else timing
                for name, timing in self.peers.items()
            },
            "times_faster_than_best_peer": None if peer is None else peer / self.timing.median,
        }

    def line(self, ceilings: Ceilings) -> str:
        """For reading along."""
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        peer = self.best_peer()
        against = "" if peer is None else f"  {peer / self.timing.median:5.2f}x best peer"
        error = "" if self.error is None else f"  error {self.error:.1e}"
        wrong = "" if self.is_right else "  WRONG"
        share = 100 * self.floor(ceilings) / self.timing.median
        return (
            f"{self.name:36s} {shape:32s} {self.timing.median * 1e6:9.1f} us "
            f"{share:5.1f}% of floor{against}{error}{wrong}"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that was asked for; `measured` is None where it could not be taken."""

    what: str
    asked: float
    measured: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it was reached."""
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.at_most else self.measured >= self.asked

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "what": self.what,
            "asked": f"{'<=' if self.at_most else '>='} {self.asked}",
            "measured": self.measured,
            "met": self.met,
        }

    def line(self) -> str:
        """For reading along."""
        verdict = {True: "met", False: "NOT met", None: "not measured"}[self.met]
        shown = "-" if self.measured is None else f"{self.measured:.2f}"
        bound = f"{'<=' if self.at_most else '>='} {self.asked}"
        return f"{self.what:64s} {bound:>9s} {shown:>8s}  {verdict}"
