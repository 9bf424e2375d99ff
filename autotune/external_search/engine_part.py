"""What a server's own metrics say of a load: the `engine` part of `bench --json`."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Protocol

from autotune.errors import AutotuneError
from autotune.profiling.metrics_seen import Seen
from autotune.profiling.metrics_window import Window
from autotune.profiling.prometheus_scrape import Scrape
from autotune.profiling.server_dialects import dialect_of

# Pages are written by the process that serves: reading them more often would load it.
_INTERVAL_S = 1.0


class _Server(Protocol):
    url: str

    def metrics(self) -> Scrape: ...


class EngineWatch:
    """Reads a server's metrics while a load runs; what cannot be read is left out.

    Args:
        server: to be read.
    """

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._scrapes: list[Scrape] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="metrics", daemon=True)

    def __enter__(self) -> EngineWatch:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._take()

    def engine_part(self, cached_share: float | None) -> dict[str, Any]:
        """By the keys of `bench --json` under `engine`; None where the server does not tell.

        `cached_share` is the share of prompts found in the cache by the answers' own word.
        """
        part: dict[str, Any] = dict.fromkeys(
            ("preemptions", "prefix_hit_rate", "kv_blocks_total", "kv_peak_usage")
        )
        part |= {"steps": 0, "mean_batch": None, "host_share": None, "device_share": None}
        part["prefix_hit_rate"] = cached_share
        if len(self._scrapes) < 2:
            return part
        try:
            dialect = dialect_of(self._scrapes[-1], self._server.url)
        except AutotuneError:
            return part
        window = Window(self._scrapes, dialect.counters)
        seen = Seen(window, dialect)
        part["preemptions"] = seen.preemptions
        if seen.hit_rate is not None:
            part["prefix_hit_rate"] = seen.hit_rate
        usage = [window.gauge(dialect.occupancy, s, mean=True) for s in self._scrapes]
        part["kv_peak_usage"] = max((u for u in usage if u is not None), default=None)
        running = [window.gauge(dialect.running, s) for s in self._scrapes]
        busy = [r for r in running if r]
        part["mean_batch"] = sum(busy) / len(busy) if busy else None
        steps = window.histogram(dialect.step_tokens)
        if steps is not None:
            part["steps"] = steps.count
        return part

    def _read(self) -> None:
        while not self._over.wait(_INTERVAL_S):
            self._take()

    def _take(self) -> None:
        with contextlib.suppress(AutotuneError):
            self._scrapes.append(self._server.metrics())
