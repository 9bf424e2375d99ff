"""Short loads, each with what one bottleneck needs; the same seed makes the same load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from autotune.workload.materialise import LoadRequest

_VOCABULARY = (3, 4096)  # of the embedded model, without its special tokens


class Traffic:
    """Collects requests; prompts are random, and as long as asked."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.requests: list[LoadRequest] = []

    def add(
        self,
        arrivals: Iterable[float],
        prompt: int,
        output: int,
        prefix: Sequence[int] = (),
    ) -> Traffic:
        """Add one request at each of these times, in seconds."""
        for at in arrivals:
            own = self.tokens(prompt - len(prefix))
            name = f"{len(self.requests):04d}"
            self.requests.append(LoadRequest(name, float(at), (*prefix, *own), output))
        return self

    def tokens(self, count: int) -> tuple[int, ...]:
        """Random token ids."""
        return tuple(int(t) for t in self.rng.integers(*_VOCABULARY, count))

    def steady(self, count: int, seconds: float) -> list[float]:
        """Arrivals that come nearly evenly, so that nobody waits for chance."""
        gap = seconds / count
        return [gap * (i + self.rng.uniform(0.0, 0.5)) for i in range(count)]


def at_once(count: int) -> list[float]:
    """All at the beginning."""
    return [0.0] * count


def clumps(times: Iterable[float], each: int) -> list[float]:
    """`each` arrivals within some milliseconds of each time."""
    return [at + 1e-3 * i for at in times for i in range(each)]
