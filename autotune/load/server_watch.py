"""A server's own figures while it is loaded: its `/metrics`, by the keys of `bench --json`."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from autotune.errors import AutotuneError
from autotune.profiling.metrics_seen import Seen
from autotune.profiling.metrics_window import Window
from autotune.profiling.prometheus_scrape import Scrape, scrape
from autotune.profiling.server_dialects import Dialect, dialect_of
from autotune.speculation_counts import SpeculationTotals

# Often enough for peaks, seldom enough to load nobody: a page takes some milliseconds to write.
_INTERVAL_S = 1.0
# Pages are large: of a long load so many are kept, farther apart.
_MOST_SCRAPES = 120
_DRAFT_TOKENS = ("vllm:spec_decode_num_draft_tokens",)
_ACCEPTED_BY_POSITION = ("vllm:spec_decode_num_accepted_tokens_per_pos",)


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """What a server told of a load: `engine` and `speculation` as in `bench --json`.

    `problem` says why there is less than there could be.
    """

    engine: dict[str, Any]
    speculation: dict[str, Any] | None = None
    problem: str | None = None


class ServerWatch:
    """Reads `/metrics` from the beginning of a block to its end.

    Where there is none, or none that is known, the load goes on without.

    Args:
        url: the page, as `metrics_url` gives it.
        api_key: sent as a bearer token; never shown.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url, self._api_key = url, api_key
        self._interval = _INTERVAL_S
        self._scrapes: list[Scrape] = []
        self._problem: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="server-watch", daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> ServerWatch:
        self._read()
        if self._scrapes:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._scrapes:
            self._thread.join()
            self._read()

    def figures(self) -> ServerFigures:
        """What the server told; after the block."""
        if not self._scrapes:
            return ServerFigures(_nothing(), problem=self._problem)
        try:
            dialect = dialect_of(self._scrapes[0], self._url)
        except AutotuneError as error:
            return ServerFigures(_nothing(), problem=str(error))
        window = Window(self._scrapes, dialect.counters)
        problem = self._problem
        if window.resets:
            problem = "the server began again during the load"
        seen = Seen(window, dialect)
        return ServerFigures(
            engine_figures(window, dialect, seen),
            speculation_figures(window, dialect, seen),
            problem,
        )

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._read()
            if len(self._scrapes) > _MOST_SCRAPES:
                # What grew between two of them shows in those on both sides.
                del self._scrapes[1::2]
                self._interval *= 2

    def _read(self) -> None:
        now = time.monotonic() - self._began
        try:
            self._scrapes.append(scrape(self._url, now, api_key=self._api_key))
        except AutotuneError as error:
            self._problem = str(error)


def engine_figures(window: Window, dialect: Dialect, seen: Seen) -> dict[str, Any]:
    """`engine` of `bench --json`; None for what the server does not tell.

    `mean_batch` is the mean of the requests running, over readings at which there were some.
    """
    used = [window.gauge(dialect.occupancy, s, mean=True) for s in window.scrapes]
    running = [window.gauge(dialect.running, s) for s in window.scrapes]
    busy = [number for number in running if number]
    steps = window.histogram(dialect.step_tokens)
    blocks = [labels.get("num_gpu_blocks", "") for labels in window.labels(dialect.cache_info)]
    known = [int(text) for text in blocks if text.isdecimal() and int(text) > 0]
    return _nothing() | {
        "steps": None if steps is None else steps.count,
        "preemptions": seen.preemptions,
        "prefix_hit_rate": seen.hit_rate,
        "kv_blocks_total": sum(known) if known else None,
        "kv_peak_usage": max((value for value in used if value is not None), default=None),
        "mean_batch": sum(busy) / len(busy) if busy else None,
    }


def speculation_figures(window: Window, dialect: Dialect, seen: Seen) -> dict[str, Any] | None:
    """`speculation` of `bench --json`, from counters; None where the server drafts nothing.

    Counters do not tell how many drafts reached a position: each is taken to be as long as the
    mean. What drafting costs, and runs of right drafts, are not told either.
    """
    drafts = window.increase(dialect.drafts)
    drafted = window.increase(_DRAFT_TOKENS)
    accepted = window.increase(dialect.accepted)
    if not drafts or not drafted or accepted is None:
        return None
    depth = max(1, round(drafted / drafts))
    by_depth = [
        window.increase(_ACCEPTED_BY_POSITION, lambda labels, p=str(p): labels.get("position") == p)  # type: ignore[misc]
        or 0.0
        for p in range(depth)
    ]
    # A request's first token comes from its prompt, every other from a decode or a draft.
    decodes = (seen.output_tokens or 0.0) - seen.finished - accepted
    totals = SpeculationTotals(
        decodes=max(round(drafts), round(decodes)),
        drafted_tokens=round(drafted),
        accepted_tokens=round(accepted),
        drafted_by_depth=[round(drafts)] * depth,
        accepted_by_depth=[round(value) for value in by_depth],
    )
    return {**totals.to_metrics(), "loads": []}


def _nothing() -> dict[str, Any]:
    names = (
        *("steps", "preemptions", "prefix_hit_rate", "kv_blocks_total", "kv_peak_usage"),
        *("mean_batch", "host_share", "device_share"),
    )
    return dict.fromkeys(names)
