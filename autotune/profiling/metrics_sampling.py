"""A running server's endpoint, read again and again over a window."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from autotune.errors import BadInput, EnvironmentMissing
from autotune.profiling.prometheus_scrape import Scrape, metrics_url, scrape
from autotune.profiling.server_dialects import Dialect, dialect_of

# Readings in a window: enough for a picture and for the trend of the queue. A server writes its
# page in some milliseconds, so that reading more often would load it.
_READINGS = 100
_LEAST_INTERVAL_S = 0.25
# Readings that fail one after another before the server is taken for gone.
_FAILURES = 3


@dataclass(frozen=True, slots=True)
class Sampled:
    """The readings of one window, at least two, and what went wrong meanwhile, in sentences."""

    url: str
    dialect: Dialect
    scrapes: tuple[Scrape, ...]
    problems: tuple[str, ...]


def sample_endpoint(
    url: str,
    window_s: float,
    *,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Sampled:
    """Read an endpoint over a window; what was read before the server went away is kept.

    Arguments:
        url: the server or its /metrics.
        window_s: seconds from the first reading to the last.
        say: told what is going on, a sentence at a time.
        stop: set it to end early.

    Raises:
        BadInput: no address, no metrics, or a dialect that is not known here.
        EnvironmentMissing: nobody answers, or the server went before the second reading.
    """
    if not window_s > 0:
        raise BadInput(f"a window of {window_s:g} s is too short: give for instance 60s")
    url = metrics_url(url)
    stop = stop or threading.Event()
    began = time.monotonic()
    first = scrape(url, 0.0)
    dialect = dialect_of(first, url)
    say(f"Watching {dialect.title} for {window_s:g} s")
    scrapes, problems = [first], []
    interval = min(window_s, max(_LEAST_INTERVAL_S, window_s / _READINGS))
    failed = missed = 0
    due, last = began, began + window_s
    while not stop.is_set() and time.monotonic() < last:
        due = min(max(due + interval, time.monotonic()), last)
        stop.wait(max(0.0, due - time.monotonic()))
        try:
            scrapes.append(scrape(url, time.monotonic() - began))
            failed = 0
        except (EnvironmentMissing, BadInput) as error:
            failed, missed = failed + 1, missed + 1
            if failed >= _FAILURES:
                at_s = scrapes[-1].at_s
                if len(scrapes) < 2:
                    raise
                problems.append(
                    f"the server stopped answering {at_s:.1f} s into the window of "
                    f"{window_s:g} s ({error}); the figures are of the time before"
                )
                break
    else:
        if missed:
            problems.append(f"{missed} of the readings failed and were left out")
        if stop.is_set():
            problems.append(
                f"sampling was interrupted {time.monotonic() - began:.1f} s into the window of "
                f"{window_s:g} s"
            )
    if len(scrapes) < 2:
        # Stopped at once: nothing can have grown between a reading and itself.
        scrapes.append(scrape(url, time.monotonic() - began))
    return Sampled(url, dialect, tuple(scrapes), tuple(problems))
