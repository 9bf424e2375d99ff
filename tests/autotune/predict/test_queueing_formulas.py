"""Where the engine is a queue that theory has solved, the simulator gives what theory says.

One seat and one step a request make a single server in order of arrival (M/M/1, M/D/1, M/G/1);
c seats and steps that take the same whatever they hold make c servers (M/M/c). Every wait is
compared with the exact recursion on the same path, and the mean with the formula. The mean of a
path of this length is off by more than 2% by luck alone; the recursion on millions of further
requests takes that luck out (it is a control variate whose mean is known as well as need be).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.virtual_engine import Cost, VirtualEngine
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

Draws = Callable[[np.random.Generator, int], np.ndarray]
# Mean 1 each, and the second moments of them.
SERVICES: dict[str, tuple[Draws, float]] = {
    "exponential": (lambda rng, n: rng.exponential(1.0, n), 2.0),
    "constant": (lambda rng, n: np.ones(n), 1.0),
    "short or long": (lambda rng, n: rng.choice([0.5, 5.5], n, p=[0.9, 0.1]), 3.25),
}


class ServiceTimes:
    """Steps that take what is drawn for the request that they serve, in turn."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self._seconds = seconds

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return None

    def device_seconds(self, work: StepWork) -> float:
        assert work.sequences == 1
        return next(self._seconds)

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


class EqualSteps:
    """Steps that take the same whatever they hold."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return DecodeLine((0.0,), (self._seconds,))

    def device_seconds(self, work: StepWork) -> float:
        return self._seconds

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


def simulated_waits(
    seats: int, cost: Cost, arrivals: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Seconds from each arrival to the step that first serves the request."""
    config = EngineConfig(
        max_num_seqs=seats, max_num_batched_tokens=max(8, 2 * seats), enable_prefix_caching=False
    )
    longest = int(lengths.max()) + 1
    shape = CacheShape(seats * (longest // config.block_size + 1), longest + 1)
    engine = VirtualEngine(config, cost, shape)
    for number, (arrival, length) in enumerate(zip(arrivals, lengths, strict=True)):
        engine.run(float(arrival))
        engine.send(LoadRequest(f"{number}", float(arrival), (1,), int(length)), float(arrival))
    engine.run()
    starts = {r.request_id: r.first_scheduled for r in engine.take_records() if r.completed}
    waits: np.ndarray = np.array([starts[f"{i}"] for i in range(len(arrivals))]) - arrivals
    return waits


def lindley(gaps: np.ndarray, services: np.ndarray) -> np.ndarray:
    """Waits in front of one server; `gaps[i]` lies between arrival i - 1 and i (Lindley 1952).

    w[i] = max(0, w[i-1] + s[i-1] - gap[i]), solved by the walk's running minimum.
    """
    walk = np.concatenate([[0.0], np.cumsum(services[:-1] - gaps[1:])])
    waits: np.ndarray = walk - np.minimum.accumulate(walk)
    return waits


@pytest.mark.parametrize("load", [0.5, 0.85])
@pytest.mark.parametrize("service", SERVICES)
def test_one_seat_is_a_single_server(service: str, load: float) -> None:
    draw, second_moment = SERVICES[service]
    rng = np.random.default_rng([len(service), int(100 * load)])
    gaps = rng.exponential(1 / load, 10_000)
    services = draw(rng, len(gaps))
    arrivals = np.cumsum(gaps)
    lengths = np.ones(len(gaps))
    waits = simulated_waits(1, ServiceTimes(iter(services.tolist())), arrivals, lengths)
    path = lindley(gaps, services)
    assert waits == pytest.approx(path, abs=1e-6)
    further = [
        lindley(rng.exponential(1 / load, 2_000_000), draw(rng, 2_000_000)).mean() for _ in range(4)
    ]
    # Pollaczek and Khinchine: load * E[s^2] / (2 (1 - load)) for services of mean 1. It is
    # load / (1 - load) in M/M/1 and half of that in M/D/1.
    expected = load * second_moment / (2 * (1 - load))
    assert waits.mean() - path.mean() + np.mean(further) == pytest.approx(expected, rel=0.02)


STEP = 2.0**-10  # of the mean service


def stepped_servers(servers: int, arrivals: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Waits in front of servers that begin and end with steps; lengths are in steps.

    While anybody is served, steps follow one another; the step that meets an idle engine begins
    with the arrival (Kiefer and Wolfowitz 1955, on that grid).
    """
    free = [-math.inf] * servers  # when each server is free again
    last = -math.inf  # when all are
    began = 0.0
    waits = np.empty(len(arrivals))
    for i, (arrival, length) in enumerate(zip(arrivals.tolist(), lengths.tolist(), strict=True)):
        if last <= arrival:
            began = start = arrival
        else:
            next_step = began + math.ceil((arrival - began) / STEP) * STEP
            start = max(free[0], next_step)
        end = start + length * STEP
        heapq.heapreplace(free, end)
        last = max(last, end)
        waits[i] = start - arrival
    return waits


def erlang_c(servers: int, load: float) -> float:
    """The chance to wait in M/M/c, `load` a server (Erlang 1917)."""
    offered = servers * load
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    full = offered**servers / math.factorial(servers) / (1 - load)
    return full / (sum(terms) + full)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (2, 0.6), (4, 0.6)])
def test_seats_are_servers(servers: int, load: float) -> None:
    rng = np.random.default_rng([servers, int(100 * load)])

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        # Arrivals on a fine grid, so that sums are exact and nobody arrives within rounding of a
        # step; services of mean 1, cut up by steps.
        gaps = rng.exponential(1 / (load * servers), count)
        arrivals = np.round(np.cumsum(gaps) * 2**24) / 2**24
        return arrivals, rng.geometric(STEP, count)

    arrivals, lengths = draw(2_000)
    waits = simulated_waits(servers, EqualSteps(STEP), arrivals, lengths)
    path = stepped_servers(servers, arrivals, lengths)
    assert waits == pytest.approx(path, abs=1e-9)
    further = stepped_servers(servers, *draw(800_000))
    expected = erlang_c(servers, load) / (servers * (1 - load))
    assert waits.mean() - path.mean() + further.mean() == pytest.approx(expected, rel=0.02)
