"""What arrived: how much, how long, how bunched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autotune.profiling.enough import LEAST_REQUESTS, lacking
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.schema import Spread, Traffic
from autotune.workload.rows import mean_rate

# Arrivals that a window of the dispersion holds on average; more windows than these are wanted.
_PER_WINDOW = 5
_LEAST_WINDOWS = 10
_TOP = 0.1


def traffic(evidence: LoadEvidence, duration: float) -> tuple[Traffic, list[str]]:
    """The traffic of a load of `duration` seconds, and what could not be told of it."""
    requests = evidence.requests
    partial: list[str] = []
    arrivals = sorted(r.intended_send for r in requests)
    rate = mean_rate(arrivals)
    outputs = [r.output_tokens if r.completed else r.asked_output_tokens for r in requests]
    inputs = [r.input_tokens for r in requests]
    cv = dispersion = window = top = None
    if len(requests) < LEAST_REQUESTS:
        partial.append(
            lacking("the burstiness of arrivals", "requests", LEAST_REQUESTS, len(requests))
        )
    else:
        cv = gap_variation(arrivals)
        dispersion, window = index_of_dispersion(arrivals)
        top = top_share(outputs)
    outcomes = [r.outcome for r in requests]
    return (
        Traffic(
            requests=len(requests),
            completed=outcomes.count("finished"),
            refused=outcomes.count("refused"),
            failed=outcomes.count("failed"),
            timed_out=outcomes.count("timed_out"),
            duration_s=duration,
            rate=rate if rate is not None and math.isfinite(rate) else None,
            input_tokens=spread(inputs),
            output_tokens=spread(outputs),
            arrival_cv=cv,
            dispersion=dispersion,
            dispersion_window_s=window,
            top_output_share=top,
            prompt_output_ratio=sum(inputs) / sum(outputs) if sum(outputs) else None,
            texts=None if evidence.synthetic_prompts is None else not evidence.synthetic_prompts,
        ),
        partial,
    )


def spread(values: Sequence[float] | npt.NDArray[np.float64]) -> Spread | None:
    """Mean, percentiles and maximum; None of nothing."""
    if not len(values):
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = (float(v) for v in np.percentile(array, (50, 95, 99)))
    return Spread(mean=float(array.mean()), p50=p50, p95=p95, p99=p99, max=float(array.max()))


def gap_variation(arrivals: Sequence[float]) -> float | None:
    """The coefficient of variation of the gaps between sorted arrivals; None if all are at once."""
    gaps = np.diff(np.asarray(arrivals, dtype=np.float64))
    if len(gaps) < 2 or gaps.mean() <= 0:
        return None
    return float(gaps.std(ddof=1) / gaps.mean())


def index_of_dispersion(arrivals: Sequence[float]) -> tuple[float | None, float | None]:
    """Variance over mean of the arrivals in equal windows, and the windows' length in seconds.

    1 for Poisson arrivals at any length, above 1 where they come in bunches (Cox and Lewis 1966).
    """
    times = np.asarray(arrivals, dtype=np.float64)
    span = float(times[-1] - times[0]) if len(times) else 0.0
    if span <= 0:
        return None, None
    count = max(_LEAST_WINDOWS, len(times) // _PER_WINDOW)
    # The last arrival ends the span and belongs to no window; the first begins it, and the gaps
    # between them are what is counted.
    counts, _ = np.histogram(times[1:], bins=count, range=(float(times[0]), float(times[-1])))
    return float(counts.var(ddof=1) / counts.mean()), span / count


def top_share(outputs: Sequence[int]) -> float | None:
    """The part of all output tokens that the longest tenth of the answers has."""
    total = sum(outputs)
    if not total:
        return None
    longest = sorted(outputs, reverse=True)[: math.ceil(_TOP * len(outputs))]
    return sum(longest) / total
