"""The metrics of `bench` from a server's histograms and counters, and which limits they decide."""

from __future__ import annotations

import math
from typing import Any

from autotune.metrics import STATISTICS
from autotune.profiling.metrics_seen import Seen
from autotune.profiling.metrics_window import Histogram
from autotune.slo import Slo
from autotune.slo_grammar import LATENCIES


def bench_metrics(seen: Seen, slo: Slo | None) -> dict[str, Any]:
    """The keys of `bench`; what a server does not tell of single requests is None."""
    seconds = seen.window.seconds
    named = [(limit.metric, limit.statistic) for limit in slo.limits] if slo else []
    metrics: dict[str, Any] = {}
    for metric in LATENCIES:
        wanted = {s for m, s in named if m == metric and s is not None}
        statistics = (*STATISTICS, *sorted(wanted - set(STATISTICS)))
        metrics[metric] = _latency(seen.latency(metric), statistics)
    ended = seen.finished + seen.failed
    return {
        **metrics,
        "output_tokens_per_s": _rate(seen.output_tokens, seconds),
        "requests_per_s": _rate(seen.finished, seconds),
        "goodput_requests_per_s": None,
        "goodput_tokens_per_s": None,
        "slo_attainment": None,
        "completed": seen.finished,
        "failed": seen.failed,
        "refused": 0,
        "timed_out": 0,
        "duration_s": seconds,
        "offered_rate": _rate(seen.arrived, seconds),
        "error_rate": seen.failed / ended if ended else None,
        "load_delivered": True,
        "load_note": "the load came from the server's own users",
        "config": None,
        "engine": _engine(seen),
        "slo_statistics": {},
        "intervals": {"slo_attainment": None, "goodput_requests_per_s": None},
    }


def _latency(histogram: Histogram | None, statistics: tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(statistics)
    intervals: dict[str, list[float] | None] = dict.fromkeys(statistics)
    if histogram is not None:
        values["mean"] = histogram.mean
        for name in statistics:
            quantile = None if name == "mean" else histogram.quantile(float(name[1:]) / 100)
            if quantile is not None:
                values[name] = quantile.value
                closed = math.isfinite(quantile.high)
                intervals[name] = [quantile.low, quantile.high] if closed else None
    return {**values, "intervals": intervals}


def _engine(seen: Seen) -> dict[str, Any]:
    steps = seen.window.histogram(seen.dialect.step_tokens)
    usage = [seen.window.gauge(seen.dialect.occupancy, s, mean=True) for s in seen.window.scrapes]
    batch = [seen.window.gauge(seen.dialect.running, s) for s in seen.window.scrapes]
    busy = [value for value in batch if value]
    return {
        "steps": steps.count if steps else None,
        "preemptions": seen.preemptions,
        "prefix_hit_rate": seen.hit_rate,
        "kv_blocks_total": None,
        "kv_peak_usage": max((v for v in usage if v is not None), default=None),
        "mean_batch": sum(busy) / len(busy) if busy else None,
        "host_share": None,
        "device_share": None,
    }


def undecided_limits(seen: Seen, slo: Slo | None) -> list[str]:
    """Limits that lie within the bucket that holds their statistic: the server cannot tell."""
    sentences = []
    for limit in slo.limits if slo else ():
        histogram = seen.latency(limit.metric) if limit.metric in LATENCIES else None
        if histogram is None or limit.quantile is None:
            continue
        quantile = histogram.quantile(limit.quantile / 100)
        if quantile is None:
            continue
        if math.isinf(quantile.high):
            sentences.append(
                f"{limit.statistic}({limit.metric}) is above {_ms(quantile.low)}, the end of the "
                "server's last bucket; how far is not known"
            )
        elif quantile.low < limit.bound < quantile.high:
            sentences.append(
                f"the server's buckets cannot decide {limit.text}: {limit.statistic}"
                f"({limit.metric}) lies between {_ms(quantile.low)} and {_ms(quantile.high)}, and "
                "the limit lies between them too"
            )
    return sentences


def _rate(amount: float | None, seconds: float) -> float | None:
    return amount / seconds if amount is not None and seconds else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:g} ms"
