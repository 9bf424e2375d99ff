"""Which points to measure next: those that promise most, over all that may be so.

Every candidate has samples of what a trial of it would measure, drawn jointly: what slows one down
in a sample slows down what is like it. A point's worth is by how much it is expected to beat the
best that is known, counting only samples in which it keeps the promise (Schonlau, Welch and Jones
1998, "Global versus Local Search in Constrained Optimization of Computer Models"). Of several
points each is chosen as if those before it had been measured already, sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Samples of what trials would measure, (points, samples).

    `value` is the objective, more being better; `met` whether all limits are met, and `missed` by
    how much they are missed, added up.
    """

    value: Floats
    met: Booleans
    missed: Floats

    def rows(self, chosen: Sequence[int]) -> Sampled:
        """Those of some points."""
        index = np.asarray(chosen, dtype=np.int64)
        return Sampled(self.value[index], self.met[index], self.missed[index])


@dataclass(frozen=True, slots=True)
class Reached:
    """The best that is known, by sample: `value` of what meets the limits, -inf where nothing does,
    and by how much the nearest to that misses them, `missed`."""

    value: Floats
    missed: Floats

    @classmethod
    def by(cls, measured: Sampled, least_missed: float) -> Reached:
        """By measured points that met the limits, as they are believed to be.

        Where there are none, `least_missed` says by how much the best trial missed them.
        """
        samples = measured.value.shape[1]
        if not len(measured.value):
            return cls(np.full(samples, -np.inf), np.full(samples, least_missed))
        return cls(measured.value.max(axis=0), np.zeros(samples))

    def and_also(self, one: Sampled) -> Reached:
        """With another point measured; in samples in which it fails it brings nothing."""
        value = np.where(one.met[0], one.value[0], -np.inf)
        return Reached(np.maximum(self.value, value), np.minimum(self.missed, one.missed[0]))


def expected_improvements(candidates: Sampled, reached: Reached) -> Floats:
    """By how much each candidate is expected to beat what is reached; (points,).

    In shares of the range of the candidates' values; where nothing meets the limits yet, what comes
    nearer to them is worth up to 1, and what meets them more by its value.
    """
    finite = candidates.value[np.isfinite(candidates.value)]
    if not len(finite):
        return np.zeros(len(candidates.value))
    low, high = float(finite.min()), float(finite.max())
    spread = max(high - low, 1e-12)
    beaten = np.maximum(candidates.value - np.maximum(reached.value, low), 0.0) / spread
    nearer = np.clip(1.0 - candidates.missed / np.maximum(reached.missed, 1e-9), 0.0, 1.0)
    gains = np.where(
        np.isfinite(reached.value),
        np.where(candidates.met, beaten, 0.0),
        nearer + np.where(candidates.met, beaten, 0.0),
    )
    return np.asarray(gains.mean(axis=1))


def choose(candidates: Sampled, reached: Reached, count: int) -> list[tuple[int, float]]:
    """Places of the candidates to measure, with what each is worth; the worthiest first."""
    chosen: list[tuple[int, float]] = []
    left = list(range(len(candidates.value)))
    while left and len(chosen) < count:
        worth = expected_improvements(candidates.rows(left), reached)
        place = int(np.argmax(worth))
        index = left.pop(place)
        chosen.append((index, float(worth[place])))
        reached = reached.and_also(candidates.rows([index]))
    return chosen
