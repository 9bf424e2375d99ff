"""Least squares of times: relative, without negative coefficients, deaf to disturbances.

Steps are weighted by their own time, so that errors are relative, and those that something else
delayed lose their weight (by Cauchy's function: Holland and Welsch 1977, "Robust Regression Using
Iteratively Reweighted Least-Squares"). No coefficient is below its bound (Lawson and Hanson 1974,
"Solving Least Squares Problems", ch. 23). A ridge holds each near what is expected of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

# Relative errors up to this are those of an undisturbed step.
QUIET_ERROR = 0.05
ROUNDS = 12
# How far a step lies from its cost at least; on a disturbed machine steps are farther from it, and
# tell less.
STEP_SIGMA = 0.05
# Steps err together, by what the form of the cost leaves out: many tell no more than so many.
INDEPENDENT_STEPS = 20


def overhead_scale(seconds: Floats) -> float:
    """What a step may take at least, as the scale of what nothing is known of."""
    return max(float(np.quantile(seconds, 0.1)), 1e-7)


def robust_fit(
    features: Floats, target: Floats, prior: Floats, spread: Floats, least: Floats | float = 0.0
) -> tuple[Floats, Floats]:
    """Coefficients >= `least` that bring `features @ c` relatively near `target`, c near `prior`.

    `spread` is how far from its prior a coefficient is expected. Returned beside them is a matrix
    that maps standard normal numbers to their errors; those at their bounds have none.
    """
    least = np.broadcast_to(least, prior.shape)
    target = np.maximum(target, 1e-9)
    scaled = features / target[:, None]
    repeated = max(1.0, len(target) / INDEPENDENT_STEPS)
    sigma = STEP_SIGMA
    weights = np.ones(len(target))
    found = prior
    lines = scaled
    for _ in range(ROUNDS):
        ridge = np.diag(sigma / spread) * np.sqrt(repeated)
        lines = np.vstack([scaled * weights[:, None], ridge])
        wanted = np.concatenate([weights, ridge @ prior])
        found = least + _nonnegative(lines, wanted - lines @ least)
        errors = np.abs(scaled @ found - 1.0)
        sigma = max(STEP_SIGMA, 1.5 * float(np.median(errors)))  # normal errors' own, by median
        quiet = max(QUIET_ERROR, sigma)
        new = 1.0 / np.sqrt(1.0 + (errors / quiet) ** 2)
        if np.allclose(new, weights, atol=1e-3):
            break
        weights = new
    return found, _error_root(lines, found > least, spread, sigma * np.sqrt(repeated))


def _nonnegative(lines: Floats, wanted: Floats) -> Floats:
    """Least squares without a negative coefficient, by way of the few normal equations.

    The triangular factor of the lines has the same solution, and `nnls` takes time by rows.
    """
    orthogonal, triangle = np.linalg.qr(lines)
    return np.asarray(nnls(triangle, orthogonal.T @ wanted)[0], dtype=float)


def _error_root(lines: Floats, free: NDArray[np.bool_], spread: Floats, sigma: float) -> Floats:
    """Root of the covariance of the free coefficients, whose lines err by `sigma` each."""
    root = np.zeros((len(free), len(free)))
    places = np.flatnonzero(free)
    if len(places):
        # In units of the spreads, as the coefficients differ by many orders of magnitude.
        unit = spread[places]
        triangle = np.linalg.qr(lines[:, places] * unit, mode="r")
        inverse = np.linalg.inv(triangle)
        root[np.ix_(places, places)] = sigma * unit[:, None] * inverse
    return root
