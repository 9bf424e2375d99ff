"""What a comparison of a few runs proves: exact chances, and intervals by resampling runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import beta

RESAMPLES = 4000


def rank_sum_p(better: Sequence[float], worse: Sequence[float]) -> float:
    """Chance that `better` would rank so high or higher, were both drawn alike; one-sided.

    The rank-sum test of Wilcoxon, Mann and Whitney over all ways to deal out the pooled values,
    ties sharing their mean rank, so that it is exact with ties and for any number of runs.
    """
    pooled = np.array([*better, *worse], dtype=np.float64)
    # Twice the mean rank is whole.
    ranks = [int(2 * (pooled < v).sum() + (pooled == v).sum() + 1) for v in pooled]
    observed = sum(ranks[: len(better)])
    # ways[k][s]: in how many ways k of the values have ranks that add up to s.
    ways = [[0] * (sum(ranks) + 1) for _ in range(len(better) + 1)]
    ways[0][0] = 1
    for rank in ranks:
        for count in range(len(better), 0, -1):
            fewer, row = ways[count - 1], ways[count]
            for total in range(len(row) - 1, rank - 1, -1):
                row[total] += fewer[total - rank]
    last = ways[-1]
    return sum(last[observed:]) / sum(last)


def resampled(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = lambda v: float(np.mean(v)),
    *,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of runs and its percentile-bootstrap interval."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = [statistic(data[rng.integers(0, len(data), len(data))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return statistic(data), float(low), float(high)


def proportion_interval(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a share by Clopper and Pearson: of each outcome, no chance is too low to give it.

    Exact for independent trials.
    """
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(1 - tail, count + 1, total - count))
    return low, high
