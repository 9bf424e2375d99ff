"""The queue of a running server, from its gauges at each reading."""

from __future__ import annotations

import math

import numpy as np

from autotune.profiling.metrics_seen import Seen, first_token_s, mean_wait_s, spread_of
from autotune.profiling.metrics_window import Window
from autotune.profiling.schema import Queueing, SeriesPoint
from autotune.profiling.server_dialects import Dialect

# Below, a trend is read into noise.
_LEAST_READINGS = 8
# Student's t for a two-sided 95% interval is near 2 for more than a few readings; queues are
# autocorrelated, which makes the naive interval too narrow, so more is asked for.
_T = 4.0


def queueing_of(seen: Seen) -> Queueing:
    """Waiting and running over the window.

    The server is over its capacity if what is inside grows for sure. Then what it finished is
    what it can, and `utilisation` is arrivals over that.
    """
    window, dialect, arrived = seen.window, seen.dialect, seen.arrived
    running = _values(window, dialect.running)
    waiting = _values(window, dialect.waiting)
    growth, grows = _trend(window, running, waiting)
    done = arrived - growth * window.seconds if growth is not None else 0.0
    wait, ttft = mean_wait_s(seen), first_token_s(seen)
    share = min(1.0, wait / ttft) if wait is not None and ttft else None
    return Queueing(
        busy_share=sum(v > 0 for v in running) / len(running) if running else None,
        utilisation=arrived / done if grows and done > 0 else None,
        wait=spread_of(seen.enough(dialect.queue)),
        wait_share=share,
        queue_mean=float(np.mean(waiting)) if waiting else None,
        queue_max=round(max(waiting)) if waiting else None,
        running_mean=float(np.mean(running)) if running else None,
        running_max=round(max(running)) if running else None,
        growth_per_s=growth,
        stable=None if growth is None else not grows,
    )


def series_of(window: Window, dialect: Dialect) -> list[SeriesPoint]:
    """The server at each reading."""
    points = []
    for scrape in window.scrapes:
        waiting = window.gauge(dialect.waiting, scrape)
        running = window.gauge(dialect.running, scrape)
        if waiting is not None and running is not None:
            occupancy = window.gauge(dialect.occupancy, scrape, mean=True)
            points.append(
                SeriesPoint(at_s=scrape.at_s, queue=waiting, running=running, occupancy=occupancy)
            )
    return points


def _values(window: Window, names: tuple[str, ...]) -> list[float]:
    values = (window.gauge(names, scrape) for scrape in window.scrapes)
    return [value for value in values if value is not None]


def _trend(window: Window, running: list[float], waiting: list[float]) -> tuple[float | None, bool]:
    """(requests by which the inside grows a second, whether that is beyond doubt)."""
    if len(running) < _LEAST_READINGS or len(running) != len(waiting):
        return None, False
    if len(running) != len(window.scrapes):
        return None, False
    times = np.array([scrape.at_s for scrape in window.scrapes])
    inside = np.array(running) + np.array(waiting)
    times = times - times.mean()
    spread = float(times @ times)
    if spread == 0:
        return None, False
    slope = float(times @ inside) / spread
    rest = inside - inside.mean() - slope * times
    error = math.sqrt(float(rest @ rest) / (len(times) - 2) / spread)
    # What grows by less than a request or a tenth within the window does not matter.
    matters = slope * window.seconds > max(1.0, 0.1 * float(inside.mean()))
    # Requests that run more do not wait: only where some wait is the server at its end.
    return slope, matters and slope > _T * error and waiting[-1] > 0
