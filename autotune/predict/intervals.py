"""How far a predicted gain may lie from the one that two finite trials measure.

The gain is a ratio, so that errors are told and added as those of its logarithm.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autotune.metrics import latencies
from autotune.records import RequestRecord
from autotune.slo import statistic_of

# Standard normal quantile of 0.95: 90% lie within.
Z90 = 1.6448536269514722
_RESAMPLES = 200
# Of fewer requests a resample says nothing.
_ENOUGH = 8


def bounds(
    value: float, ranges: Sequence[Sequence[float]], noise: float = 0.0
) -> tuple[float, float]:
    """Bounds of a gain whose sources of error are independent.

    Args:
        value: the gain.
        ranges: for each uncertain quantity the gains at the ends of its 90% range.
        noise: standard deviation of the logarithm of what else differs between two measurements.
    """
    down = up = Z90 * noise
    for ends in ranges:
        logs = [math.log(end / value) for end in ends if end > 0]
        down, up = math.hypot(down, min(0.0, *logs, 0.0)), math.hypot(up, max(0.0, *logs, 0.0))
    return value * math.exp(-down), value * math.exp(up)


def misfit(median_error: float) -> float:
    """Standard deviation of the logarithm of what steps of one kind take beside another's.

    Half of `median_error`, that of single steps to which costs were not fitted: as much of it is
    taken to be chance, which many steps even out.
    """
    return median_error / 2.0


def single_trials_spread(first: Sequence[float], second: Sequence[float]) -> float:
    """Standard deviation of the log ratio of two single trials, about the mean of several of each.

    Each side adds the variance of one trial, and of the mean that it is held against. The changed
    side, of which there are few, is taken to spread at least as the other.

    Args:
        first: logarithms of a latency in replays of one trial with different chances.
        second: those of the other trial.
    """
    spread = statistics.pstdev(first) if len(first) > 1 else 0.0
    other = max(spread, statistics.stdev(second) if len(second) > 1 else 0.0)
    return math.sqrt(spread**2 * (1 + 1 / len(first)) + other**2 * (1 + 1 / len(second)))


def trial_noise(
    measured: Sequence[RequestRecord],
    replayed: Sequence[RequestRecord],
    metric: str,
    statistic: str,
    seed: int,
) -> float | None:
    """Standard deviation of the log ratio of a latency statistic between two trials alike.

    The replay of a trial differs from it as another trial would, request by request: what is
    systematic cancels in a ratio, the rest is noise. Requests are drawn with replacement, in both
    at once (paired bootstrap). Both trials of a ratio are noisy, the replay is not: hence the
    square root of two. None with too few requests.
    """
    pairs = _pairs(measured, replayed, metric)
    if len(pairs) < _ENOUGH:
        return None
    rng = np.random.default_rng(seed)
    logs = []
    for _ in range(_RESAMPLES):
        drawn = pairs[rng.integers(len(pairs), size=len(pairs))]
        real, played = (statistic_of(drawn[:, column], statistic) for column in (0, 1))
        if real and played:
            logs.append(math.log(real / played))
    return math.sqrt(2) * float(np.std(logs)) if len(logs) > 1 else None


def _pairs(
    measured: Sequence[RequestRecord], replayed: Sequence[RequestRecord], metric: str
) -> npt.NDArray[np.float64]:
    """The latency of each request that both finished, measured and replayed."""
    known: list[dict[str, float]] = []
    for records in (measured, replayed):
        finished = [record for record in records if record.completed]
        values, owners = latencies(metric, finished)
        known.append(
            {finished[int(o)].request_id: float(v) for v, o in zip(values, owners, strict=True)}
        )
    shared = [request_id for request_id in known[0] if request_id in known[1]]
    return np.array([[known[0][i], known[1][i]] for i in shared], dtype=np.float64).reshape(-1, 2)
