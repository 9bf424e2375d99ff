"""Replays side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autotune.metrics import latencies
from autotune.predict.replay import Replayed
from autotune.records import RequestRecord
from autotune.slo import statistic_of


def latency_ratio(base: Replayed, changed: Replayed, metric: str, statistic: str) -> float | None:
    """A latency before over after, of the requests that finished in each."""
    before, after = (_statistic(p.records, metric, statistic) for p in (base, changed))
    return before / after if before and after else None


def latency_logs(plays: Sequence[Replayed | None], metric: str, statistic: str) -> list[float]:
    """Logarithms of a latency in each of several replays, where it is defined."""
    values = [_statistic(play.records, metric, statistic) for play in plays if play is not None]
    return [math.log(value) for value in values if value]


def served_per_second(played: Replayed) -> float:
    """Finished requests per second; 0 where nothing ran."""
    finished = sum(record.completed for record in played.records)
    return finished / played.duration if played.duration else 0.0


def _statistic(records: Sequence[RequestRecord], metric: str, statistic: str) -> float | None:
    values, _ = latencies(metric, [record for record in records if record.completed])
    return statistic_of(values, statistic)
