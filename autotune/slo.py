"""The service-level objective: what it says, and how a measurement fares against it.

The grammar is told in `autotune.slo_grammar`. A request that was refused, failed or timed out has
an infinite latency: it is a miss of every limit, and it moves the percentiles that the limits look
at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autotune.records import LimitResult, RequestRecord
from autotune.slo_grammar import DEFAULT_STATISTIC, LATENCIES, Limit, SloError, parse_limits

__all__ = [
    "QUALITY_METRICS",
    "UNMEASURED_VIOLATION",
    "Limit",
    "Slo",
    "SloError",
    "parse_slo",
    "statistic_of",
]

# Violation of a limit whose statistic is infinite or was never measured; above every finite
# violation that a search is likely to meet, so that "nothing finished" is the worst of all.
UNMEASURED_VIOLATION = 1000.0
# Limits on the quality of the answers; these are also the keys of a measured quality.
QUALITY_METRICS = ("quality_loss", "kl", "top1_agreement")


@dataclass(frozen=True, slots=True)
class Slo:
    """All limits that a configuration has to meet; no limits at all are met by everything."""

    limits: tuple[Limit, ...] = ()

    def __str__(self) -> str:
        return ",".join(limit.text for limit in self.limits)

    @property
    def needs_quality(self) -> bool:
        """Whether a limit is about the quality of the answers, which a load does not measure."""
        return bool(self.guard.limits)

    @property
    def guard(self) -> Slo:
        """The limits on the quality alone."""
        return Slo(tuple(limit for limit in self.limits if limit.metric in QUALITY_METRICS))

    def evaluate(self, metrics: Mapping[str, Any]) -> list[LimitResult]:
        """How each limit fares, from the metrics of one measurement (the keys of `bench`).

        Latency statistics come from `metrics["slo_statistics"]` where `compute_metrics` was given
        this SLO: there, requests that did not finish count as infinitely late. Without that entry
        they come from the statistics over finished requests. `quality_loss`, `kl` and
        `top1_agreement` are entries of the metrics, beside the others.

        A statistic that was not measured is a violation of at least `UNMEASURED_VIOLATION`, more
        the fewer requests finished. TPOT and ITL of requests that all have one token are met.
        """
        return [self._result(limit, metrics) for limit in self.limits]

    def request_meets(self, record: RequestRecord) -> bool:
        """Whether one request met every limit that a single request can meet.

        TTFT, TPOT and E2E are compared with the bound, whatever the limit's statistic over
        requests is; of ITL the named statistic over the request's own gaps is. A request that did
        not finish meets none; TPOT and ITL of a single token are met, as in vLLM's goodput.
        """
        if not record.completed:
            return False
        return all(
            value is None or limit.met_by(value)
            for limit in self.limits
            if limit.per_request
            for value in (_of_request(limit, record),)
        )

    def _result(self, limit: Limit, metrics: Mapping[str, Any]) -> LimitResult:
        measured = _measured(limit, metrics)
        completed = metrics.get("completed") or 0
        if measured is not None and math.isfinite(measured):
            met, violation = limit.met_by(measured), limit.violation(measured)
        elif limit.metric in ("tpot", "itl") and completed and _misses(metrics) == 0:
            measured, met, violation = None, True, 0.0
        else:
            total = completed + _misses(metrics)
            share = _misses(metrics) / total if total else 1.0
            measured, met, violation = None, False, UNMEASURED_VIOLATION * (1 + share)
        return LimitResult(limit.text, measured, limit.bound, met, violation)


def parse_slo(text: str) -> Slo:
    """Read an SLO such as `ttft<200ms,tpot<100ms`; the grammar is told in `slo_grammar`.

    Raises:
        SloError: the text is not an SLO, or names the same statistic twice.
    """
    return Slo(parse_limits(text))


def statistic_of(values: Sequence[float] | np.ndarray[Any, Any], statistic: str) -> float | None:
    """`mean` or `pNN` (linear interpolation, as numpy) of values; None if there are none.

    Infinite values are allowed: a percentile that needs one of them is infinite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return None
    if statistic == "mean":
        return float(data.mean())
    # Interpolating between a finite value and infinity is infinite at any weight above 0, and
    # numpy's own arithmetic makes NaN of some of these cases; so the rank is taken here.
    data = np.sort(data)
    rank = (data.size - 1) * float(statistic[1:]) / 100
    low = min(math.floor(rank), data.size - 1)
    weight = rank - low
    if weight == 0 or low + 1 == data.size:
        return float(data[low])
    below, above = float(data[low]), float(data[low + 1])
    if math.isinf(above):
        return above
    # The form that numpy uses, so that results agree with np.percentile to the last bit or so.
    return below + (above - below) * weight


def _of_request(limit: Limit, record: RequestRecord) -> float | None:
    if limit.metric == "itl":
        gaps = np.diff(np.asarray(record.token_times, dtype=np.float64))
        return statistic_of(gaps, limit.statistic or DEFAULT_STATISTIC)
    value: float | None = getattr(record, limit.metric)
    return value


def _misses(metrics: Mapping[str, Any]) -> int:
    return sum(metrics.get(outcome) or 0 for outcome in ("failed", "refused", "timed_out"))


def _measured(limit: Limit, metrics: Mapping[str, Any]) -> float | None:
    value: Any
    if limit.metric in LATENCIES:
        assert limit.statistic is not None
        name = f"{limit.statistic}({limit.metric})"
        counted: Mapping[str, Any] = metrics.get("slo_statistics") or {}
        if name in counted:
            value = counted[name]
        else:
            value = (metrics.get(limit.metric) or {}).get(limit.statistic)
    else:
        key = {"goodput": "slo_attainment", "throughput": "output_tokens_per_s"}.get(
            limit.metric, limit.metric
        )
        value = metrics.get(key)
    return None if value is None else float(value)
