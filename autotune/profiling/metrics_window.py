"""What a server's counters and histograms grew by while they were watched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autotune.profiling.prometheus_scrape import Labels, Scrape
from autotune.profiling.server_dialects import Names

# Ranks of one engine tell the same requests again; those of data parallelism tell others.
_REPEATED_BY = ("tp_rank", "pp_rank")
Chosen = Callable[[dict[str, str]], bool]


@dataclass(frozen=True, slots=True)
class Quantile:
    """A quantile read from buckets: it lies in [low, high]; `value` is interpolated.

    In the last bucket, which has no end, `high` is infinite and `value` is its beginning.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by bucket: `counts[i]` in (`bounds[i-1]`, `bounds[i]`], the last bound infinite.

    `total` is the sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def count(self) -> int:
        """Number of observations."""
        return round(sum(self.counts))

    @property
    def mean(self) -> float | None:
        """Mean of the observations, exact; None without any."""
        return self.total / sum(self.counts) if self.count else None

    def quantile(self, share: float) -> Quantile | None:
        """The quantile at `share` in 0..1, as numpy would take it of the observations themselves.

        numpy interpolates between the observations at the ranks beside share * (n - 1), so that the
        true value lies between the bucket of the one and that of the other. Within, observations
        are taken as evenly spread, as Prometheus' `histogram_quantile` does. None without any.
        """
        number = self.count
        if number == 0:
            return None
        ends = np.cumsum(self.counts)
        rank = share * (number - 1)
        low, _ = self._edges(self._bucket(ends, math.floor(rank)))
        _, high = self._edges(self._bucket(ends, math.ceil(rank)))
        bucket = self._bucket(ends, round(rank))
        start, end = self._edges(bucket)
        # In the middle of the observation's share of its bucket.
        before = float(ends[bucket] - self.counts[bucket])
        within = min(1.0, max(0.0, (rank + 0.5 - before) / self.counts[bucket]))
        value = start if math.isinf(end) else start + (end - start) * within
        return Quantile(value, low, high)

    @property
    def largest(self) -> float | None:
        """Upper end of the highest bucket in use, its lower end where there is none; or None."""
        used = [index for index, count in enumerate(self.counts) if count > 0]
        if not used:
            return None
        start, end = self._edges(used[-1])
        return start if math.isinf(end) else end

    def _bucket(self, ends: np.ndarray[tuple[int], np.dtype[np.float64]], index: int) -> int:
        """The bucket that holds the observation at this rank, from 0."""
        return min(int(np.searchsorted(ends, index + 0.5)), len(self.counts) - 1)

    def _edges(self, bucket: int) -> tuple[float, float]:
        # Latencies and lengths are not negative, whatever the first bucket's end is.
        start = self.bounds[bucket - 1] if bucket else min(0.0, self.bounds[0])
        return start, self.bounds[bucket]


class Window:
    """Growth between consecutive scrapes, added up; what fell has begun again at zero.

    A name is looked up among several; the first that the server has counts. `counters` are looked
    at, beside the histograms, to see a restart; `resets` is how often there was one.
    """

    def __init__(self, scrapes: Sequence[Scrape], counters: Names = ()) -> None:
        self.scrapes = scrapes
        self.resets = 0
        self._counters = frozenset(counters)
        self._grown: dict[str, dict[Labels, float]] = {}
        for earlier, later in itertools.pairwise(scrapes):
            self._add(earlier, later)

    @property
    def seconds(self) -> float:
        """From the first scrape to the last."""
        return self.scrapes[-1].at_s - self.scrapes[0].at_s if self.scrapes else 0.0

    def increase(self, names: Names, chosen: Chosen | None = None) -> float | None:
        """Growth of a counter, over all of its series; None if the server has no such counter."""
        name = self._name(names)
        if name is None:
            return None
        return sum(
            value
            for labels, value in self._grown.get(name, {}).items()
            if chosen is None or chosen(dict(labels))
        )

    def gauge(self, names: Names, scrape: Scrape, *, mean: bool = False) -> float | None:
        """A gauge at one scrape: the sum (or mean) over engines; None if there is no such gauge."""
        for name in names:
            values = [v for k, v in scrape.series.get(name, {}).items() if _counts(k)]
            if values and not any(math.isnan(value) for value in values):
                return sum(values) / (len(values) if mean else 1)
        return None

    def labels(self, names: Names) -> list[dict[str, str]]:
        """The labels of an info metric in the last scrape."""
        return [dict(k) for name in names for k in self.scrapes[-1].series.get(name, {})]

    def histogram(self, names: Names, chosen: Chosen | None = None) -> Histogram | None:
        """What was observed during the window; None if the server has no such histogram."""
        name = next((n for n in names if self._name((f"{n}_bucket",)) is not None), None)
        if name is None:
            return None
        ends: dict[float, float] = {}
        for labels, value in self._grown.get(f"{name}_bucket", {}).items():
            others = dict(labels)
            bound = float(others.pop("le"))
            if chosen is None or chosen(others):
                ends[bound] = ends.get(bound, 0.0) + value
        if not ends:
            return Histogram((math.inf,), (0.0,), 0.0)
        bounds = sorted(ends)
        if not math.isinf(bounds[-1]):
            bounds.append(math.inf)
            ends[math.inf] = self.increase((f"{name}_count",), chosen) or ends[bounds[-2]]
        # A page that was written while requests ended may be off by one between buckets.
        cumulative = np.maximum.accumulate([ends[bound] for bound in bounds])
        counts = np.diff(cumulative, prepend=0.0)
        total = self.increase((f"{name}_sum",), chosen) or 0.0
        return Histogram(tuple(bounds), tuple(float(count) for count in counts), total)

    def _name(self, names: Names) -> str | None:
        return next((n for n in names if any(n in scrape.series for scrape in self.scrapes)), None)

    def _add(self, earlier: Scrape, later: Scrape) -> None:
        # A restart shows in any counter that fell; the others may have passed their old value.
        fell = any(
            later.series.get(name, {}).get(labels, value) < value
            for name, of_name in earlier.series.items()
            if name in self._counters or name.endswith(("_count", "_bucket"))
            for labels, value in of_name.items()
        )
        self.resets += fell
        for name, of_name in later.series.items():
            before = earlier.series.get(name, {})
            grown = self._grown.setdefault(name, {})
            for labels, value in of_name.items():
                if not _counts(labels) or math.isnan(value):
                    continue
                old = before.get(labels, 0.0)
                began_again = fell or value < old
                grown[labels] = grown.get(labels, 0.0) + (value if began_again else value - old)


def _counts(labels: Labels) -> bool:
    return not any(name in _REPEATED_BY and value != "0" for name, value in labels)
