"""How far each metric is from its limit: which one binds, and how pressing the others are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autotune.diagnose.finding import Metric
from autotune.diagnose.thresholds import MIN_URGENCY
from autotune.profiling.schema import Profile
from autotune.search.options import DEFAULT_SLO
from autotune.slo import Slo, parse_slo

# The metrics of a diagnosis that a limit of the SLO is about.
_ABOUT: dict[str, tuple[Metric, ...]] = {
    "ttft": ("ttft",),
    "tpot": ("tpot",),
    "itl": ("tpot",),
    "e2e": ("ttft", "tpot"),
    "throughput": ("throughput", "cost"),
    "goodput": ("ttft", "tpot"),
    "error_rate": ("memory", "ttft"),
}


@dataclass(frozen=True, slots=True)
class Standing:
    """One limit: measured over bound (bound over measured where more is better).

    `ratio` above 1 is missed, infinite where too few requests finished to measure it.
    """

    limit: str
    metric: str
    ratio: float

    @property
    def about(self) -> tuple[Metric, ...]:
        """The metrics of a diagnosis that it is about."""
        return _ABOUT.get(self.metric, ())


def standings(profile: Profile) -> list[Standing]:
    """How every limit on the serving stands, worst first; those of `run` where there is no SLO.

    Limits on quality are left out: no bottleneck moves them. Without metrics nothing stands.

    Raises:
        SloError: the profile's SLO is not one.
    """
    if profile.metrics is None:
        return []
    slo = parse_slo(profile.slo or DEFAULT_SLO)
    limits = [limit for limit in slo.limits if limit.metric in _ABOUT]
    found = []
    for limit, result in zip(limits, Slo(tuple(limits)).evaluate(profile.metrics), strict=True):
        measured = result.measured
        if measured is None and profile.source.kind == "metrics":
            continue  # a server that is watched does not tell everything
        if measured is None:
            # Either nothing finished, or TPOT of single tokens, which is met.
            ratio = 0.0 if result.met else math.inf
        elif limit.operator in ("<", "<="):
            ratio = measured / limit.bound if limit.bound else math.inf if measured else 0.0
        else:
            ratio = limit.bound / measured if measured else math.inf
        found.append(Standing(limit.text, limit.metric, ratio))
    return sorted(found, key=lambda s: -s.ratio)


def urgency(metric: Metric, profile: Profile, found: list[Standing]) -> float:
    """How pressing a metric is, in `MIN_URGENCY`..1.

    It is measured over bound of its worst limit, 1 where that is missed. Throughput without a limit
    is as pressing as arrivals come near to what the server sustains: one with room for more has no
    want of throughput. Cost and memory have no limit of their own and are taken as they are, like a
    latency that was not measured.
    """
    ratios = [s.ratio for s in found if metric in s.about]
    if ratios:
        return min(1.0, max(MIN_URGENCY, max(ratios)))
    if metric == "throughput":
        # One that is busy all the time may do so with batches that are nearly empty.
        queue = profile.queueing
        used = queue.busy_share if queue.utilisation is None else queue.utilisation
        return 1.0 if used is None else min(1.0, max(MIN_URGENCY, used))
    return 1.0
