"""What one replica does at a rate, by arithmetic: the steady state of continuous batching.

A decode takes a step a token, and a step's time grows with the batch; the batch grows with the time
that answers take. With T(B) the seconds of a step of B decodes, S those that a prompt adds to the
steps of others and O the tokens of an answer, at a rate r:

    tpot = T(1 + B) / (1 - r S)        prompts take their share of all time
    B    = r O tpot                    Little's law

whose smallest solution is what happens; where there is none, requests pile up. Waiting is that of
M/G/1 for prompts (Pollaczek-Khinchine) and of M/G/c for seats in the cache (Sakasegawa 1977), both
with the arrivals' own variation; its tail is taken as exponential. This tells in milliseconds what
is worth simulating, and how what was simulated changes with the rate. It is no simulation: bursts
within the batch, preemption and the order of chunks are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autotune.planning.planned_traffic import Floats, LengthSample
from autotune.planning.step_table import BATCHES, BESIDE, StepTables
from autotune.slo_grammar import LATENCIES, Limit

# The logarithm of a violation beyond which it makes no difference how far off something is.
HOPELESS = 3.0
_ITERATIONS = 60
_BISECTIONS = 11
_LEAST_SHARE = 1 / 200  # of the highest rate, where a search for the capacity begins
# Of the time, beyond which a queue has no end for what is planned.
_FULL = 0.99


@dataclass(frozen=True, slots=True)
class Steady:
    """Replicas [R] at a rate each: latencies [R, n] of requests as likely as each other, seconds.

    `batch` is the mean number of decoding sequences; where `saturated`, requests pile up and
    nothing else holds.
    """

    batch: Floats
    ttft: Floats
    tpot: Floats
    e2e: Floats
    saturated: npt.NDArray[np.bool_]

    def statistic(self, limit: Limit) -> Floats | None:
        """What a limit looks at [R]; None where arithmetic does not tell."""
        if limit.metric not in LATENCIES or limit.statistic is None:
            return None
        values: Floats = self.tpot if limit.metric == "itl" else getattr(self, limit.metric)
        return row_statistic(values, limit.statistic)


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas of several configurations under one traffic, one of each.

    Args:
        tables: seconds of their steps.
        sample: the traffic's lengths.
        seats: most sequences at once [R], by the knobs and by the cache.
        variation: squared coefficient of variation of the gaps between one's arrivals [R].
    """

    tables: StepTables
    sample: LengthSample
    seats: Floats
    variation: Floats

    def only(self, row: int) -> Replicas:
        """One of them."""
        return self.between(row, row + 1)

    def between(self, first: int, last: int) -> Replicas:
        """Some of them."""
        some = slice(first, last)
        return Replicas(
            self.tables.between(first, last), self.sample, self.seats[some], self.variation[some]
        )

    def repeated(self, times: int) -> Replicas:
        """The only one so many times."""
        return Replicas(
            self.tables.repeated(times),
            self.sample,
            np.repeat(self.seats, times),
            np.repeat(self.variation, times),
        )

    def with_variation(self, variation: Floats) -> Replicas:
        """The same with other arrivals."""
        return replace(self, variation=variation)

    def with_seats(self, seats: Floats) -> Replicas:
        """The same with other room."""
        return replace(self, seats=seats)

    def at(self, rate: Floats) -> Steady:
        """The steady states at rates in requests per second [R]."""
        tables, sample = self.tables, self.sample
        answers = float(np.mean(sample.outputs - 1))
        batch, share, saturated = self._batch(rate, answers)
        busy = rate * _at(tables.full, BESIDE, batch)
        saturated = saturated | (busy >= _FULL)
        busy = np.minimum(busy, _FULL)
        alone = _rows_at(tables.alone, BESIDE, batch) @ tables.weights
        step = _at(tables.decode, BATCHES, 1 + batch)
        tpot = step / (1 - share)
        residence = alone.mean(axis=1) + answers * tpot
        load = rate * residence / self.seats
        saturated = saturated | (load >= _FULL)
        load = np.minimum(load, _FULL)
        draws = _draws(len(sample.outputs))
        waits = self._prompt_waits(rate, batch, busy, draws.prompt)
        waits += self._seat_waits(load, residence, draws.seat)
        waits += draws.residual * (step * np.minimum(1.0, batch))[:, None]
        ttft = waits + alone
        tpots = self._tpots(rate, batch, step, tpot, draws)
        e2e = ttft + tpots * (sample.outputs - 1)
        return Steady(batch, ttft, tpots, e2e, saturated)

    def violation(self, rate: Floats, limits: Sequence[Limit]) -> Floats:
        """log(measured / bound) of the limit that fares worst [R]; above 0 is a miss."""
        state = self.at(rate)
        worst = np.full(len(rate), -HOPELESS)
        for limit in limits:
            found = _violation(state, limit, limits)
            if found is not None:
                worst = np.maximum(worst, found)
        return np.where(state.saturated, HOPELESS, worst)

    def capacity(self, limits: Sequence[Limit]) -> Floats:
        """The highest rates at which all limits hold [R]; 0 where none does."""
        high = self._highest_rate()
        low = high * _LEAST_SHARE
        hopeless = self.violation(low, limits) > 0
        for _ in range(_BISECTIONS):
            middle = np.sqrt(low * high)
            missed = self.violation(middle, limits) > 0
            high = np.where(missed, middle, high)
            low = np.where(missed, low, middle)
        return np.where(hopeless, 0.0, np.sqrt(low * high))

    def missed_first(self, rate: Floats, limits: Sequence[Limit]) -> list[Limit | None]:
        """The limit of each that fares worst; None where requests pile up or none is judged."""
        state = self.at(rate)
        judged = [
            (found, limit)
            for limit in limits
            if (found := _violation(state, limit, limits)) is not None
        ]
        if not judged:
            return [None] * len(rate)
        worst = np.argmax(np.array([found for found, _ in judged]), axis=0)
        return [
            None if full else judged[place][1]
            for place, full in zip(worst.tolist(), state.saturated.tolist(), strict=True)
        ]

    def _batch(self, rate: Floats, answers: float) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """Mean decoding sequences, the share of time that prompts take, where there is no end."""
        tables = self.tables
        batch = np.zeros_like(rate)
        saturated = np.zeros(len(rate), dtype=bool)
        share = np.zeros_like(rate)
        for _ in range(_ITERATIONS):
            share = rate * _at(tables.added, BESIDE, batch)
            saturated |= (share >= _FULL) | (batch > self.seats)
            share = np.minimum(share, _FULL)
            after = rate * answers * _at(tables.decode, BATCHES, 1 + batch) / (1 - share)
            after = np.where(saturated, batch, after)
            moved = np.abs(after - batch) > 1e-3 * (1e-3 + batch)
            batch = after
            if not moved.any():
                break
        else:
            saturated |= moved
        return batch, share, saturated

    def _highest_rate(self) -> Floats:
        """Rates at which all are saturated: all seats taken, or no time but for prompts."""
        answers = float(np.mean(self.sample.outputs - 1))
        step = _at(self.tables.decode, BATCHES, self.seats)
        by_seats = self.seats / np.maximum(answers * step, 1e-9)
        by_prompts = 1.0 / np.maximum(self.tables.full[:, 0], 1e-9)
        return np.minimum(by_seats, by_prompts)

    def _prompt_waits(self, rate: Floats, batch: Floats, busy: Floats, chances: Floats) -> Floats:
        """Seconds that prompts wait for those before them [R, n]."""
        spread = self._spread(batch)
        once = _at(self.tables.full, BESIDE, batch)
        wait = rate * spread * once**2 / (2 * (1 - busy))
        # For other arrivals than Poisson's: (Ca^2 + Cs^2) / (1 + Cs^2), Cs^2 = spread - 1.
        wait *= (self.variation + spread - 1) / spread
        return _exponential(chances, busy, wait)

    def _seat_waits(self, load: Floats, residence: Floats, chances: Floats) -> Floats:
        """Seconds for a seat [R, n]: (Ca^2 + Cs^2)/2 rho^(sqrt(2(c+1))-1) / (c(1-rho)) E[S]."""
        seats, outputs = self.seats, self.sample.outputs
        square = float(np.var(outputs) / np.mean(outputs) ** 2)
        chance = load ** (np.sqrt(2 * (seats + 1)) - 1)
        mean = (self.variation + square) / 2 * chance / (seats * (1 - load)) * residence
        return _exponential(chances, chance, mean)

    def _tpots(
        self, rate: Floats, batch: Floats, step: Floats, tpot: Floats, draws: _Draws
    ) -> Floats:
        """What requests see differs [R, n]: the batch does, and so many prompts come in between."""
        outputs = self.sample.outputs
        # The number of others varies as Poisson's does, and is met as its mean over an answer.
        spread = np.sqrt(0.7 * self.variation * batch)
        others = 1 + np.maximum(0.0, batch[:, None] + draws.batch * spread[:, None])
        steps = np.array(
            [np.interp(o, BATCHES, row) for o, row in zip(others, self.tables.decode, strict=True)]
        )
        steps *= (tpot / np.maximum(step, 1e-12))[:, None]
        added = _at(self.tables.added, BESIDE, batch)
        prompts = self.variation * rate * tpot * added**2 * self._spread(batch)
        noise = np.sqrt(prompts[:, None] / np.maximum(outputs - 1, 1.0))
        return np.maximum(self.tables.decode[:, :1], steps + draws.prompts * noise)

    def _spread(self, batch: Floats) -> Floats:
        """E[S^2] / E[S]^2 of the prompts' times."""
        mean = _at(self.tables.added, BESIDE, batch)
        square = _at(self.tables.square, BESIDE, batch)
        spread: Floats = np.maximum(1.0, square / np.maximum(mean, 1e-12) ** 2)
        return spread


def row_statistic(values: Floats, statistic: str) -> Floats:
    """`mean` or `pNN` of each row."""
    if statistic == "mean":
        mean: Floats = values.mean(axis=1)
        return mean
    quantile: Floats = np.quantile(values, float(statistic[1:]) / 100, axis=1)
    return quantile


def log_shortfall(share: float, bound: float, count: int) -> float:
    """How far a share falls short of a bound, as the logarithm of the misses' ratio."""
    least = 1 / (2 * count)
    return math.log((1 - share + least) / (1 - bound + least))


def _violation(state: Steady, limit: Limit, limits: Sequence[Limit]) -> Floats | None:
    if limit.metric == "goodput":
        good = _good(state, limits)
        count = state.ttft.shape[1]
        return np.array([log_shortfall(float(g), limit.bound, count) for g in good])
    value = state.statistic(limit)
    if value is None:
        return None
    return np.minimum(HOPELESS, np.log(np.maximum(value, 1e-9) / limit.bound))


def _good(state: Steady, limits: Sequence[Limit]) -> Floats:
    """The share of requests that meet every limit that one request can meet [R]."""
    good = np.ones(state.ttft.shape, dtype=bool)
    for limit in limits:
        if limit.metric in ("ttft", "e2e"):
            good &= getattr(state, limit.metric) < limit.bound
        elif limit.metric in ("tpot", "itl"):
            good &= state.tpot < limit.bound
    share: Floats = good.mean(axis=1)
    return share


def _at(table: Floats, grid: Floats, where: Floats) -> Floats:
    """Each row [R, len(grid)] at its own place [R], straight between and level beyond."""
    below, weight = _place(grid, where)
    rows = np.arange(len(where))
    found: Floats = (1 - weight) * table[rows, below] + weight * table[rows, below + 1]
    return found


def _rows_at(table: Floats, grid: Floats, where: Floats) -> Floats:
    """The same of a table [R, len(grid), L], giving [R, L]."""
    below, weight = _place(grid, where)
    rows = np.arange(len(where))
    part = weight[:, None]
    found: Floats = (1 - part) * table[rows, below] + part * table[rows, below + 1]
    return found


def _place(grid: Floats, where: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    below = np.clip(np.searchsorted(grid, where, side="right") - 1, 0, len(grid) - 2)
    weight = (where - grid[below]) / (grid[below + 1] - grid[below])
    return below, np.clip(weight, 0.0, 1.0)


def _exponential(chances: Floats, probability: Floats, mean: Floats) -> Floats:
    """Waits [R, n] of which so many are 0 and the others exponential, by ranks in 0..1 [n]."""
    probability = np.clip(probability, 1e-12, 1.0)
    scale = mean / probability
    left = np.maximum(1 - chances, 1e-12)
    return np.maximum(0.0, scale[:, None] * np.log(probability[:, None] / left))


@dataclass(frozen=True, slots=True)
class _Draws:
    prompt: Floats
    seat: Floats
    residual: Floats
    batch: Floats
    prompts: Floats


@functools.cache
def _draws(count: int) -> _Draws:
    """Ranks in 0..1 and standard normals, the same for every replica: only they are compared."""
    rng = np.random.default_rng(20_07)
    even = (np.arange(count) + 0.5) / count

    def uniform() -> Floats:
        return rng.permutation(even)

    def normal() -> Floats:
        from scipy.special import ndtri

        quantile: Callable[[Floats], Floats] = ndtri
        return quantile(rng.permutation(even))

    return _Draws(uniform(), uniform(), uniform(), normal(), normal())
