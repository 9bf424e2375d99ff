"""Which traffic a user asks for; told without a framework, so that the command line is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from autotune.errors import BadInput
from autotune.workload.presets import PRESETS

# Where the offered rate is found by measurement, its share of what the default config sustains:
# above 1, so that the default falls short and a better configuration can show it.
DEFAULT_LOAD_FACTOR = 1.15
# Context, in tokens, that the presets' lengths were drawn up for.
PRESET_CONTEXT = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficOptions:
    """Which workload, and how it is scaled; times in seconds, rates in requests per second.

    Args:
        source: path of a workload file, or the name of a preset.
        format: name of the file's format; None recognises it.
        rate: mean rate of the load; None keeps a file's own; `inf` offers all requests at once.
            Left None with a preset, the rate is found by measurement (`load_factor`).
        load_factor: offered rate as a share of what the default config sustains when saturated;
            used where `rate` is to be found by measurement. None with a file keeps its own rate.
        length_factor: multiplies prompt and output lengths. None keeps a file's; a preset's are
            scaled to the model's context if that is shorter than `PRESET_CONTEXT`.
        duration_s: length of a window; None lets the caller choose.
        start_s: skip so much of the workload, in its own time, before scaling.
        requests: most requests in a window.
        keep_grid: replay arrivals that a trace recorded on a coarse grid (Mooncake's of 3 s) as the
            bursts that they would be; otherwise they are spread over the grid's step.
        burstiness: shape of a preset's Gamma arrivals; 1 is Poisson, less is burstier.
    """

    source: str = "chat"
    format: str | None = None
    rate: float | None = None
    load_factor: float | None = None
    length_factor: float | None = None
    duration_s: float | None = None
    start_s: float = 0.0
    requests: int | None = None
    burstiness: float = 1.0
    keep_grid: bool = False

    def __post_init__(self) -> None:
        for flag, value, low in (
            ("--rate", self.rate, 0.0),
            ("--load", self.load_factor, 0.0),
            ("--scale-lengths", self.length_factor, 0.0),
            ("--duration", self.duration_s, 0.0),
            ("--burstiness", self.burstiness, 0.0),
        ):
            if value is not None and not value > low:
                raise BadInput(f"{flag} must be above {low:g}, got {value:g}")
            if value == math.inf and flag != "--rate":
                raise BadInput(f"{flag} must be finite")
        if self.start_s < 0:
            raise BadInput(f"--start must be at least 0, got {self.start_s:g}")
        if self.requests is not None and self.requests < 1:
            raise BadInput(f"--requests must be at least 1, got {self.requests}")
        if self.rate is not None and self.load_factor is not None:
            raise BadInput("--rate and --load contradict each other: give one of them")

    @property
    def is_preset(self) -> bool:
        """Whether the source is a preset and not a file."""
        return self.source in PRESETS and not Path(self.source).exists()

    @property
    def rate_is_measured(self) -> bool:
        """Whether the offered rate follows from a calibration on the default config."""
        return self.rate is None and (self.load_factor is not None or self.is_preset)
