"""What a calibration keeps of a load: some of its steps, and what lay between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from autotune.predict.fit_lines import FitLines, columns_of
from autotune.predict.load_times import idle_waits, step_gaps
from autotune.predict.robust_fit import Floats
from autotune.predict.step_cost import StepCost, StepWork
from autotune.profiling.evidence import LoadEvidence
from autotune.records import RequestRecord
from engine.config import EngineConfig
from engine.step_record import StepRecord

Kind = Literal["sweep", "load"]
Method = tuple[str, str]
"""The values of `quantization` and `kv_cache_dtype`: what the cost of a given step hangs on."""

T = TypeVar("T")

# More steps, gaps and waits of one load tell nothing more.
MOST_STEPS = 1500
MOST_GAPS = 1000
_QUARTERS = 4
# A step that follows another at once does so within it.
_PAUSE_S = 0.01


@dataclass(frozen=True, slots=True)
class CalibrationLoad:
    """A load to calibrate by: `sweep` is one laid out for it, `load` is a workload's own."""

    config: EngineConfig
    steps: Sequence[StepRecord]
    requests: Sequence[RequestRecord] = ()
    kind: Kind = "load"


@dataclass(frozen=True, slots=True)
class LoadSample:
    """Steps taken evenly from a load, `every` so many; times are seconds since it began.

    `device` is without collectives, which are `communication`, `host` without drafting. `gaps` are
    (sequences, seconds) after steps that another followed at once, `waits` those of requests that
    met an idle engine.
    """

    config: EngineConfig
    kind: Kind
    every: float
    works: tuple[StepWork, ...]
    starts: Floats
    device: Floats
    host: Floats
    communication: Floats
    gaps: tuple[tuple[int, float], ...]
    waits: tuple[float, ...]
    blocks_total: int
    _lines: dict[Method, FitLines] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, load: CalibrationLoad) -> LoadSample:
        """What to keep of a load.

        Raises:
            ValueError: it has no step.
        """
        if not load.steps:
            raise ValueError("a load without a step tells nothing of their cost")
        steps = _evenly(load.steps, MOST_STEPS)
        communication = np.array([step.communication_seconds or 0.0 for step in steps])
        evidence = LoadEvidence(load.requests, load.steps)
        return cls(
            config=load.config,
            kind=load.kind,
            every=len(load.steps) / len(steps),
            works=tuple(StepWork.of(step) for step in steps),
            starts=np.array([step.start for step in steps]),
            device=np.array([step.device_seconds for step in steps]) - communication,
            host=np.array([step.host_seconds - step.draft_seconds for step in steps]),
            communication=communication,
            gaps=tuple(_evenly(step_gaps(load.steps), MOST_GAPS)),
            waits=tuple(_evenly(list(idle_waits(evidence)), MOST_GAPS)),
            blocks_total=load.steps[0].blocks_total,
        )

    @property
    def method(self) -> Method:
        """What its steps' cost hangs on."""
        return self.config.quantization, self.config.kv_cache_dtype

    def lines(self, probed: StepCost) -> FitLines:
        """The steps as lines of a fit; `probed` is what the probes say of the method."""
        known = self._lines.get(self.method)
        if known is None:
            columns = columns_of(probed, self.works)
            known = FitLines(columns, self.device, self.host, self.communication)
            self._lines[self.method] = known
        return known

    def stretches(self) -> NDArray[np.intp]:
        """Which stretch of time each step belongs to: the parts of a sweep, quarters of a load."""
        count = len(self.works)
        if self.kind == "load":
            return np.asarray(_QUARTERS * np.arange(count) // count, dtype=np.intp)
        # Between the parts of a sweep the engine idles, or the clock begins anew.
        between = np.diff(self.starts) - self.seconds[:-1]
        breaks = (between > _PAUSE_S) | (between < 0)
        return np.concatenate([[0], np.cumsum(breaks)]).astype(np.intp)

    @property
    def seconds(self) -> Floats:
        """Of each step in all."""
        return np.asarray(self.device + self.communication + self.host, dtype=float)


def _evenly(items: Sequence[T], most: int) -> list[T]:
    if len(items) <= most:
        return list(items)
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in places]
