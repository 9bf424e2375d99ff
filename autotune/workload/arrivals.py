"""When requests arrive: drawn from a distribution, or spread off a clock's coarse grid."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.errors import BadInput
from autotune.workload.rows import Workload

_GRID_SPREAD = 0.01  # Mooncake's grid of 3 s has gaps of 2.999 to 3.001 s
_GRID_ROWS = 20
GRID_NOTE = "arrivals lie on a grid"


def draw_arrivals(
    count: int, rate: float, burstiness: float, rng: np.random.Generator
) -> npt.NDArray[Any]:
    """Arrival times in seconds, the first at 0, of a renewal process with Gamma gaps.

    As `vllm bench serve --burstiness k`: gaps ~ Gamma(shape k, scale 1 / (rate k)), whose
    coefficient of variation is 1/sqrt(k); k = 1 is Poisson, k < 1 is burstier, a large k nearly
    constant. `rate` is in requests per second. The gaps are scaled so that their mean is exactly
    1 / rate: otherwise two seeds would offer two loads.

    Raises:
        BadInput: rate or burstiness is not a positive finite number.
    """
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not 0 < value < np.inf:
            raise BadInput(f"{name} is {value}; it must be above 0 and finite")
    if count < 2:
        return np.zeros(count)
    gaps = rng.gamma(burstiness, 1.0, count - 1)
    total = gaps.sum()
    # A tiny shape can draw nothing but zeros in double precision.
    gaps = gaps * ((count - 1) / (rate * total)) if total > 0 else np.full(count - 1, 1 / rate)
    return np.concatenate([[0.0], np.cumsum(gaps)])


def find_grid(arrivals: list[float]) -> float | None:
    """The step in seconds of the grid on which arrivals were recorded; None if there is none.

    A grid has several requests at one time and gaps between the times that are all multiples of
    the smallest, to within 1%.
    """
    times = np.unique(np.asarray(arrivals, dtype=np.float64))
    if len(arrivals) < _GRID_ROWS or times.size < 3 or len(arrivals) < 1.5 * times.size:
        return None
    gaps = np.diff(times)
    step = float(np.median(gaps[gaps < 1.5 * gaps.min()]))
    off = np.abs(gaps / step - np.round(gaps / step))
    return step if bool(np.all(off <= _GRID_SPREAD * np.maximum(1, gaps / step))) else None


def spread_grid(workload: Workload, seed: int) -> Workload:
    """Move each arrival by a uniform random part of the grid's step; unchanged without a grid.

    A trace recorded on a coarse grid, as Mooncake's on 3 s, would else be replayed as a burst at
    each grid point, which inflates the tail of TTFT.
    """
    step = find_grid([row.arrival_s for row in workload.rows])
    if step is None:
        return workload
    jitter = np.random.default_rng(seed).uniform(0.0, step, len(workload.rows))
    moved = [
        dataclasses.replace(row, arrival_s=row.arrival_s + float(j))
        for row, j in zip(workload.rows, jitter, strict=True)
    ]
    moved.sort(key=lambda row: row.arrival_s)
    first = moved[0].arrival_s
    notes = [note for note in workload.notes if not note.startswith(GRID_NOTE)]
    return dataclasses.replace(
        workload,
        rows=tuple(dataclasses.replace(row, arrival_s=row.arrival_s - first) for row in moved),
        notes=(
            *notes,
            f"arrivals were spread uniformly over their grid of {step:.3g} s (seed {seed})",
        ),
    )
