"""What a window has of each quantity that a dialect names."""

from __future__ import annotations

from autotune.profiling.enough import LEAST_REQUESTS
from autotune.profiling.metrics_window import Histogram, Window
from autotune.profiling.schema import Spread
from autotune.profiling.server_dialects import Dialect


class Seen:
    """What a window has of a dialect's quantities."""

    def __init__(self, window: Window, dialect: Dialect) -> None:
        self.window, self.dialect = window, dialect
        label, values = dialect.failure_label or ("", ())
        ended = window.increase(dialect.finished) or 0.0
        unsuccessful = (
            window.increase(dialect.finished, lambda labels: labels.get(label) in values) or 0.0
        )
        self.finished = round(ended - unsuccessful)
        self.failed = round(unsuccessful + (window.increase(dialect.failed) or 0.0))
        self.prompt_tokens = window.increase(dialect.prompt_tokens)
        self.output_tokens = window.increase(dialect.output_tokens)
        self.arrived = self._arrived()
        preemptions = window.increase(dialect.preemptions)
        self.preemptions = None if preemptions is None else round(preemptions)
        queries, hits = window.increase(dialect.cache_queries), window.increase(dialect.cache_hits)
        self.hit_rate = min(1.0, hits / queries) if queries and hits is not None else None

    def enough(self, names: tuple[str, ...]) -> Histogram | None:
        """A histogram, if it holds as many observations as a quantile needs."""
        histogram = self.window.histogram(names)
        return histogram if histogram and histogram.count >= LEAST_REQUESTS else None

    def latency(self, metric: str) -> Histogram | None:
        """The histogram of one of the latencies that limits name."""
        names = {
            "ttft": self.dialect.ttft,
            # Older releases tell only of single gaps, whose mean is that of TPOT by tokens.
            "tpot": self.dialect.tpot,
            "itl": self.dialect.gap,
            "e2e": self.dialect.e2e,
        }[metric]
        found = self.enough(names)
        return self.enough(self.dialect.gap) if metric == "tpot" and found is None else found

    @property
    def tpot_from_gaps(self) -> bool:
        """Whether TPOT is told only by the gaps between tokens."""
        return self.enough(self.dialect.tpot) is None and self.latency("tpot") is not None

    def lengths(self) -> tuple[Spread | None, Spread | None]:
        """Lengths of prompts and answers."""
        return (
            spread_of(self.enough(self.dialect.input_lengths)),
            spread_of(self.enough(self.dialect.output_lengths)),
        )

    def _arrived(self) -> int:
        """Requests that came: as counted, or those that ended and those that are there more."""
        counted = self.window.increase(self.dialect.arrived)
        if counted is not None:
            return round(counted)
        inside = [
            (self.window.gauge(self.dialect.running, s) or 0.0)
            + (self.window.gauge(self.dialect.waiting, s) or 0.0)
            for s in (self.window.scrapes[0], self.window.scrapes[-1])
        ]
        return max(0, round(self.finished + self.failed + inside[1] - inside[0]))


def spread_of(histogram: Histogram | None) -> Spread | None:
    """Statistics of a histogram, interpolated; `max` is the end of its highest bucket in use."""
    if histogram is None or histogram.mean is None or histogram.largest is None:
        return None
    quantiles = [histogram.quantile(share) for share in (0.5, 0.95, 0.99)]
    p50, p95, p99 = (q.value if q else 0.0 for q in quantiles)
    return Spread(mean=histogram.mean, p50=p50, p95=p95, p99=p99, max=max(histogram.largest, p99))


def mean_wait_s(seen: Seen) -> float | None:
    """Mean time that requests waited for their first step; None if it cannot be told.

    As the server's histogram has it, or by Little's law: those that wait over arrivals a second.
    """
    told = seen.enough(seen.dialect.queue)
    if told is not None:
        return told.mean
    waiting = [seen.window.gauge(seen.dialect.waiting, s) for s in seen.window.scrapes]
    known = [value for value in waiting if value is not None]
    if not known or seen.arrived < LEAST_REQUESTS:
        return None
    return sum(known) / len(known) * seen.window.seconds / seen.arrived


def first_token_s(seen: Seen) -> float | None:
    """Mean time to the first token, as told, or as the mean wait and the mean prefill step."""
    ttft = seen.enough(seen.dialect.ttft)
    if ttft is not None:
        return ttft.mean
    wait = mean_wait_s(seen)
    steps = seen.window.histogram(
        seen.dialect.step, lambda labels: labels.get("method") == "prefill"
    )
    if wait is None or steps is None or steps.mean is None or steps.count < LEAST_REQUESTS:
        return None
    return wait + steps.mean
