"""Comparing counts of what was drawn with what should have been."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def chi_squared(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """The p-value of the counts of all outcomes; those expected fewer than 10 times are pooled.

    An outcome that cannot be, but was counted, gives 0.
    """
    counts, probabilities = counts.ravel(), probabilities.ravel()
    if counts[probabilities == 0].sum():
        return 0.0
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 10:  # nothing rare, or too little of it
        wanted[-2] += wanted[-1]
        observed[-2] += observed[-1]
        wanted, observed = wanted[:-1], observed[:-1]
    return float(stats.chisquare(observed, wanted).pvalue)
