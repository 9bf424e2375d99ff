"""Which statistic of a latency a gain is told of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.slo import Slo
from autotune.slo_grammar import DEFAULT_STATISTIC

TOLD_LATENCIES = ("ttft", "tpot", "e2e")


def latency_statistics(slo: Slo | None, metrics: Mapping[str, Any] | None) -> dict[str, str]:
    """For each latency the statistic of the SLO's limit on it, p95 without one.

    Of several limits on one latency that which is furthest from being met. Gaps between tokens
    are told of only where the SLO limits them.
    """
    asked = dict.fromkeys(TOLD_LATENCIES, DEFAULT_STATISTIC)
    worst: dict[str, float] = {}
    results = slo.evaluate(metrics) if slo is not None and metrics is not None else []
    for index, limit in enumerate(slo.limits if slo is not None else ()):
        if limit.statistic is None:
            continue
        violation = results[index].violation if results else 0.0
        if limit.metric not in worst or violation > worst[limit.metric]:
            worst[limit.metric] = violation
            asked[limit.metric] = limit.statistic
    return asked
