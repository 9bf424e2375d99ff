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
    # In units of the spreads, as coefficients differ by many orders of magnitude.
    low = np.broadcast_to(least, prior.shape) / spread
    expected = prior / spread
    target = np.maximum(target, 1e-9)
    scaled = features * spread / target[:, None]
    repeated = max(1.0, len(target) / INDEPENDENT_STEPS)
    sigma = STEP_SIGMA
    weights = np.ones(len(target))
    found = expected
    for _ in range(ROUNDS):
        # Of the normal equations, which are few; the ridge keeps them well-conditioned.
        lines = scaled * weights[:, None]
        products = lines.T @ lines + sigma**2 * repeated * np.eye(len(prior))
        wanted = lines.T @ weights + sigma**2 * repeated * expected
        found = low + _nonnegative(products, wanted - products @ low)
        errors = np.abs(scaled @ found - 1.0)
        sigma = max(STEP_SIGMA, 1.5 * float(np.median(errors)))  # normal errors' own, by median
        quiet = max(QUIET_ERROR, sigma)
        new = 1.0 / np.sqrt(1.0 + (errors / quiet) ** 2)
        if np.allclose(new, weights, atol=1e-3):
            break
        weights = new
    root = _error_root(products, found > low, sigma * np.sqrt(repeated))
    return found * spread, spread[:, None] * root


def _nonnegative(products: Floats, wanted: Floats) -> Floats:
    """Least squares without a negative coefficient, from the normal equations."""
    root = np.linalg.cholesky(products)
    return np.asarray(nnls(root.T, np.linalg.solve(root, wanted))[0], dtype=float)


def _error_root(products: Floats, free: NDArray[np.bool_], sigma: float) -> Floats:
    """Root of the covariance of the free coefficients, whose lines err by `sigma` each."""
    root = np.zeros(products.shape)
    places = np.ix_(free, free)
    if free.any():
        root[places] = sigma * np.linalg.inv(np.linalg.cholesky(products[places])).T
    return root
