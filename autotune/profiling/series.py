"""The engine over time, thinned out for pictures."""

from __future__ import annotations

import numpy as np

from autotune.profiling.schema import SeriesPoint
from autotune.profiling.step_columns import Floats, StepColumns

POINTS = 300


def series(steps: StepColumns, points: int = POINTS) -> list[SeriesPoint]:
    """Means over equal stretches of the load, weighted by the steps' time; idle ones are left out.

    A step counts where it began; a load of fewer steps than points has one for each step.
    """
    if not len(steps):
        return []
    if len(steps) <= points:
        place = np.arange(len(steps))
    else:
        first, last = float(steps.start[0]), float(steps.end[-1])
        width = (last - first) / points or 1.0
        place = np.minimum(((steps.start - first) / width).astype(np.int64), points - 1)
    # Steps of no length count a little, so that no stretch is without weight.
    weight = np.maximum(steps.seconds, 1e-12)
    total = np.bincount(place, weight)
    there = np.flatnonzero(total)

    def mean(values: Floats) -> Floats:
        summed = np.bincount(place, weight * values)
        return np.asarray(summed[there] / total[there], dtype=np.float64)

    blocks = np.where(steps.blocks_total > 0, steps.blocks_total, np.nan)
    at, queue, running = mean(steps.start), mean(steps.queue), mean(steps.running)
    occupancy = mean(steps.blocks_used / blocks)
    return [
        SeriesPoint(
            at_s=float(at[i]),
            queue=float(queue[i]),
            running=float(running[i]),
            occupancy=None if np.isnan(occupancy[i]) else float(occupancy[i]),
        )
        for i in range(len(there))
    ]
