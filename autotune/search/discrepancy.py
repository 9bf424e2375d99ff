"""How far measured trials lie from their simulation, and what that says of others.

A Gaussian process over the logarithm of measured over simulated (Kennedy and O'Hagan 2001,
"Bayesian Calibration of Computer Models"): part of it is common to all configurations, as the
machine is faster or slower than in the hour of the calibration, part to those with the same
weights, cache and drafts, and part to neighbours; the rest is the noise of a single trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.search.configuration import Space

Floats = NDArray[np.float64]

# Shares of the variance; they add up to 1, and the noise comes beside.
COMMON, OF_CLASS, OF_NEIGHBOURS = 0.35, 0.25, 0.4
NOISES = (0.1, 0.3, 1.0)
# Knobs that decide which kernels run.
CLASS_KNOBS = ("quantization", "kv_cache_dtype")
# What a simulation may misjudge as a whole: what these kernels cost, what is accepted of drafts.
ALIKE_KNOBS = (*CLASS_KNOBS, "speculative_method")
# Correlation falls by e over so many times the whole range of a number, or with another choice.
RANGE = 0.5
# Standard deviation expected of the logarithm, and how many trials that expectation is worth.
EXPECTED = 0.08
EXPECTED_TRIALS = 4.0
# So many standard deviations off, a trial counts as disturbed; found out in so many rounds.
OUTLYING = 2.0
ROUNDS = 3


class Discrepancy:
    """What is known of measured over simulated at other points, for several quantities at once.

    Args:
        space: of the points.
        points: where trials were measured.
        residuals: logarithms of measured over simulated, by quantity and in the order of `points`;
            NaN where one is missing.
    """

    def __init__(
        self,
        space: Space[Any],
        points: Sequence[Mapping[str, object]],
        residuals: Mapping[str, Sequence[float]],
    ) -> None:
        self._space = space
        self._points = list(points)
        self._known = {n: np.asarray(r, dtype=np.float64) for n, r in residuals.items()}
        self._kernel = self._correlations(self._points, self._points)
        # A trial during which something else ran tells little: it is as if its noise were larger.
        self._disturbed = np.ones(len(self._points))
        for _ in range(ROUNDS if self._points else 1):
            self.noise = self._likeliest_noise()
            self._scales = {name: self._scale(values) for name, values in self._known.items()}
            self._disturbed = self._disturbances()

    def scale(self, name: str) -> float:
        """Standard deviation of a quantity's logarithm where nothing was measured."""
        return self._scales.get(name, EXPECTED)

    def means(self, name: str, points: Sequence[Mapping[str, object]]) -> Floats:
        """Expected logarithm of measured over simulated."""
        values = self._known.get(name)
        if values is None or not np.isfinite(values).any():
            return np.zeros(len(points))
        rows = np.isfinite(values)
        known = [point for point, there in zip(self._points, rows, strict=True) if there]
        across = self._correlations(points, known)
        return np.asarray(across @ np.linalg.solve(self._noisy(rows), values[rows]))

    def root(self, points: Sequence[Mapping[str, object]]) -> Floats:
        """A square root of the covariance at points, to be scaled by `scale`; (points, points)."""
        prior = self._correlations(points, points)
        if self._points:
            across = self._correlations(points, self._points)
            every = np.ones(len(self._points), dtype=bool)
            prior = prior - across @ np.linalg.solve(self._noisy(every), across.T)
        values, vectors = np.linalg.eigh((prior + prior.T) / 2)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))

    def _noisy(self, rows: NDArray[np.bool_], noise: float | None = None) -> Floats:
        kernel = self._kernel[np.ix_(rows, rows)]
        return kernel + (self.noise if noise is None else noise) * np.diag(self._disturbed[rows])

    def _disturbances(self) -> Floats:
        """Factors on the noise of each trial, by how far it lies from what the others say of it.

        Of several quantities the middle one counts.
        """
        squares = np.full((len(self._known), len(self._points)), np.nan)
        for line, (name, values) in enumerate(self._known.items()):
            rows = np.isfinite(values)
            if rows.sum() < 3:
                continue
            inverse = np.linalg.inv(self._noisy(rows))
            # Leave-one-out residuals of a Gaussian process, squared over their variances.
            square = (inverse @ values[rows]) ** 2 / np.diag(inverse)
            squares[line, rows] = square / self._scales[name] ** 2 * self._disturbed[rows]
        told = np.isfinite(squares).any(axis=0)
        factors = np.ones(len(self._points))
        if told.any():
            factors[told] = np.nanmedian(squares[:, told], axis=0) / OUTLYING**2
        return np.maximum(1.0, factors)

    def _likeliest_noise(self) -> float:
        """Of `NOISES`, the one that makes what was seen likeliest, with each scale its best."""
        table = [v[np.isfinite(v)] for v in self._known.values()]
        if max((len(values) for values in table), default=0) < 3:
            return NOISES[1]

        def likelihood(noise: float) -> float:
            total = 0.0
            for values in self._known.values():
                rows = np.isfinite(values)
                if not rows.any():
                    continue
                matrix = self._noisy(rows, noise)
                _, determinant = np.linalg.slogdet(matrix)
                square = self._square(values[rows], matrix)
                total -= 0.5 * (determinant + (EXPECTED_TRIALS + rows.sum()) * math.log(square))
            return total

        best: Callable[[float], float] = likelihood
        return max(NOISES, key=best)

    def _scale(self, values: Floats) -> float:
        rows = np.isfinite(values)
        if not rows.any():
            return EXPECTED
        square = self._square(values[rows], self._noisy(rows))
        return math.sqrt(square / (EXPECTED_TRIALS + rows.sum()))

    def _square(self, values: Floats, matrix: Floats) -> float:
        return float(EXPECTED_TRIALS * EXPECTED**2 + values @ np.linalg.solve(matrix, values))

    def _correlations(
        self, first: Sequence[Mapping[str, object]], second: Sequence[Mapping[str, object]]
    ) -> Floats:
        distance = np.zeros((len(first), len(second)))
        alike = np.ones((len(first), len(second)))
        for name, values in self._space.values.items():
            place = {value: index for index, value in enumerate(values)}
            one = np.array([place[p[name]] for p in first], dtype=float)[:, None]
            other = np.array([place[p[name]] for p in second], dtype=float)[None, :]
            if self._space.is_ordinal(name):
                distance += np.abs(one - other) / max(1, len(values) - 1) / RANGE
            else:
                distance += one != other
            if name in ALIKE_KNOBS:
                alike *= one == other
        return np.asarray(COMMON + OF_CLASS * alike + OF_NEIGHBOURS * np.exp(-distance))
