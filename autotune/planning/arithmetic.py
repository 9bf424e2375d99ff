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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autotune.planning.planned_traffic import Floats, LengthSample
from autotune.planning.step_table import StepTable
from autotune.slo import statistic_of
from autotune.slo_grammar import LATENCIES, Limit

# The logarithm of a violation beyond which it makes no difference how far off something is.
HOPELESS = 3.0
_ITERATIONS = 80
_BISECTIONS = 12
_LEAST_SHARE = 1 / 400  # of the highest rate, where a search for the capacity begins


@dataclass(frozen=True, slots=True)
class Steady:
    """One replica at a rate: latencies of requests as likely as each other, in seconds.

    `batch` is the mean number of decoding sequences; `saturated` says that requests pile up, and
    then nothing else holds.
    """

    rate: float
    batch: float
    ttft: Floats
    tpot: Floats
    e2e: Floats
    saturated: bool = False

    def statistic(self, limit: Limit) -> float | None:
        """What a limit looks at; None where arithmetic does not tell."""
        if limit.metric == "goodput":
            return None
        if limit.metric not in LATENCIES or limit.statistic is None:
            return None
        values = self.tpot if limit.metric == "itl" else getattr(self, limit.metric)
        return statistic_of(values, limit.statistic)


@dataclass(frozen=True, slots=True)
class Replica:
    """What arithmetic needs of one replica.

    Args:
        table: seconds of its steps.
        sample: the traffic's lengths.
        seats: most sequences at once, by the knobs and by the cache.
        variation: squared coefficient of variation of the gaps between its arrivals.
    """

    table: StepTable
    sample: LengthSample
    seats: float
    variation: float = 1.0

    def at(self, rate: float) -> Steady:
        """The steady state at a rate in requests per second."""
        table, sample = self.table, self.sample
        answers = float(np.mean(sample.outputs - 1))
        batch = 0.0
        settled = False
        for _ in range(_ITERATIONS):
            share = rate * table.added_seconds(batch)
            if share >= 0.99 or batch > self.seats:
                break
            after = rate * answers * table.decode_seconds(1 + batch) / (1 - share)
            settled = abs(after - batch) <= 1e-3 * (1e-3 + batch)
            batch = after
            if settled:
                break
        busy = rate * table.full_seconds(batch)
        alone = table.alone_seconds(batch)
        if not settled or busy >= 0.99:
            return _saturated(rate, len(sample.outputs))
        step = table.decode_seconds(1 + batch)
        share = rate * table.added_seconds(batch)
        tpot = step / (1 - share)
        residence = float(np.mean(alone)) + answers * tpot
        load = (rate * residence) / self.seats
        if load >= 0.99:
            return _saturated(rate, len(sample.outputs))
        draws = _draws(len(sample.outputs))
        waits = (
            self._prompt_waits(rate, batch, busy, draws.prompt)
            + self._seat_waits(load, residence, draws.seat)
            + draws.residual * step * min(1.0, batch)
        )
        ttft = waits + alone
        tpots = self._tpots(rate, batch, tpot, draws)
        e2e = ttft + tpots * (sample.outputs - 1)
        return Steady(rate, batch, ttft, tpots, e2e)

    def violation(self, rate: float, limits: Sequence[Limit]) -> float:
        """The logarithm of measured / bound of the limit that fares worst; above 0 is a miss."""
        return self._worst(self.at(rate), limits)

    def capacity(self, limits: Sequence[Limit]) -> float:
        """The highest rate at which all limits hold; 0 if none does."""
        highest = self._highest_rate()
        low, high = highest * _LEAST_SHARE, highest
        if self.violation(low, limits) > 0:
            # Perhaps even a request that is alone is too slow.
            return 0.0
        if self.violation(high, limits) <= 0:
            return high
        for _ in range(_BISECTIONS):
            middle = math.sqrt(low * high)
            if self.violation(middle, limits) > 0:
                high = middle
            else:
                low = middle
        return math.sqrt(low * high)

    def missed_first(self, rate: float, limits: Sequence[Limit]) -> Limit | None:
        """The limit that fares worst at a rate; None where requests pile up or none is judged."""
        state = self.at(rate)
        if state.saturated:
            return None
        judged = [(_violation(state, limit), limit) for limit in limits]
        known = [(value, index) for index, (value, _) in enumerate(judged) if value is not None]
        return judged[max(known)[1]][1] if known else None

    def _highest_rate(self) -> float:
        """A rate at which the replica is saturated: all seats taken, or no time but for prompts."""
        answers = float(np.mean(self.sample.outputs - 1))
        step = self.table.decode_seconds(max(1.0, min(self.seats, self.table.batches[-1])))
        by_seats = self.seats / max(answers * step, 1e-9) if answers > 0 else math.inf
        by_prompts = 1.0 / max(self.table.full_seconds(0.0), 1e-9)
        return min(by_seats, by_prompts)

    def _worst(self, state: Steady, limits: Sequence[Limit]) -> float:
        if state.saturated:
            return HOPELESS
        found = [_violation(state, limit) for limit in limits]
        goodput = self._goodput(state, limits)
        return max((f for f in (*found, goodput) if f is not None), default=-HOPELESS)

    def _goodput(self, state: Steady, limits: Sequence[Limit]) -> float | None:
        wanted = next((limit for limit in limits if limit.metric == "goodput"), None)
        if wanted is None:
            return None
        good = np.ones(len(state.ttft), dtype=bool)
        for limit in limits:
            if limit.metric in ("ttft", "e2e"):
                good &= getattr(state, limit.metric) < limit.bound
            elif limit.metric in ("tpot", "itl"):
                good &= state.tpot < limit.bound
        return log_shortfall(float(np.mean(good)), wanted.bound, len(good))

    def _prompt_waits(self, rate: float, batch: float, busy: float, chances: Floats) -> Floats:
        """Seconds that prompts wait for those before them."""
        spread = self.table.spread(batch)
        once = self.table.full_seconds(batch)
        wait = rate * spread * once**2 / (2 * (1 - busy))
        # For other arrivals than Poisson's: (Ca^2 + Cs^2) / (1 + Cs^2), Cs^2 = spread - 1.
        wait *= (self.variation + spread - 1) / spread
        return _exponential(chances, busy, wait)

    def _seat_waits(self, load: float, residence: float, chances: Floats) -> Floats:
        """Seconds for a place in the batch: (Ca^2 + Cs^2)/2 rho^(sqrt(2(c+1))-1)/(c(1-rho)) E[S]."""
        seats = self.seats
        outputs = self.sample.outputs
        square = float(np.var(outputs) / np.mean(outputs) ** 2)
        chance = load ** (math.sqrt(2 * (seats + 1)) - 1)
        mean = (self.variation + square) / 2 * chance / (seats * (1 - load)) * residence
        return _exponential(chances, chance, mean)

    def _tpots(self, rate: float, batch: float, tpot: float, draws: _Draws) -> Floats:
        """What requests see differs: the batch does, and so many prompts come in between."""
        table, outputs = self.table, self.sample.outputs
        # The number of others varies as Poisson's does, and is met as its mean over an answer.
        others = 1 + np.maximum(0.0, batch + draws.batch * math.sqrt(0.7 * self.variation * batch))
        steps = np.interp(others, table.batches, table.decode)
        steps *= tpot / max(table.decode_seconds(1 + batch), 1e-12)
        prompts = rate * tpot * table.added_seconds(batch) ** 2 * table.spread(batch)
        noise = np.sqrt(self.variation * prompts / np.maximum(outputs - 1, 1.0))
        least = table.decode_seconds(1.0)
        return np.maximum(least, steps + draws.prompts * noise)


def log_shortfall(share: float, bound: float, count: int) -> float:
    """How far a share falls short of a bound, as the logarithm of the misses' ratio."""
    least = 1 / (2 * count)
    return math.log((1 - share + least) / (1 - bound + least))


def _violation(state: Steady, limit: Limit) -> float | None:
    value = state.statistic(limit)
    if value is None:
        return None
    if not math.isfinite(value):
        return HOPELESS
    return min(HOPELESS, math.log(max(value, 1e-9) / limit.bound))


def _exponential(chances: Floats, probability: float, mean: float) -> Floats:
    """Waits of which so many are 0 and the others exponential, by their rank in 0..1."""
    if probability <= 0 or mean <= 0:
        return np.zeros_like(chances)
    probability = min(probability, 1.0)
    scale = mean / probability
    return np.maximum(0.0, scale * np.log(probability / np.maximum(1 - chances, 1e-12)))


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

    def normal() -> Floats:
        from scipy.special import ndtri

        values: Floats = ndtri(rng.permutation(even))
        return values

    return _Draws(
        rng.permutation(even), rng.permutation(even), rng.permutation(even), normal(), normal()
    )


def _saturated(rate: float, count: int) -> Steady:
    endless = np.full(count, math.inf)
    return Steady(rate, math.inf, endless, endless, endless, saturated=True)
