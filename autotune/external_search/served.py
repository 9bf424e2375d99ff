"""What a search asks of a server that runs, and how it is started: the seam to the processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure
from autotune.external.flags import with_length
from autotune.external.launch import launch
from autotune.external.table import Value
from autotune.external_search.space import FlagConfig
from autotune.load.endpoint import Endpoint
from autotune.records import RunFolder
from autotune.search.windows import read_windows
from autotune.workload.materialise import LoadRequest
from engine.request import SamplingParams


class Server(Protocol):
    """A server of a trial; `autotune.external.running.RunningServer` is one."""

    url: str
    model: str
    started_in_s: float
    facts: dict[str, float | str]

    @property
    def metrics_url(self) -> str:
        """Where its metrics are."""
        ...

    def failure(self) -> Failure | None:
        """Why it went away by itself; None while it runs."""
        ...

    def reset_cache(self) -> bool:
        """Have it forget all prefixes; whether it did."""
        ...

    def stop(self) -> None:
        """End it and all of its workers."""
        ...


# That a process has ended is seen a little later than that its connections have.
_NOTICED_S = 2.0
Start = Callable[[Mapping[str, Value], threading.Event, Callable[[str], None]], Server]


def failure_soon(server: Server, broken: int) -> Failure | None:
    """Why the server went away; None if it did not. Waits a little if answers were broken off."""
    until = time.monotonic() + (_NOTICED_S if broken else 0.0)
    while (failure := server.failure()) is None and time.monotonic() < until:
        time.sleep(0.05)
    return failure


def starter(engine: ExternalEngine, folder: Path) -> Start:
    """Starts the engine with a trial's values; log and process ids stand in the run's folder."""

    def start(
        values: Mapping[str, Value], stop: threading.Event, say: Callable[[str], None]
    ) -> Server:
        return launch(
            engine,
            values,
            log_file=folder / "server.log",
            pid_file=folder / "server.pid",
            stop=stop,
            say=say,
        )

    return start


def values_given(
    engine: ExternalEngine, config: FlagConfig, longest: int
) -> tuple[dict[str, Value], dict[str, Value]]:
    """The values that the engine is started with, and those that go with each request.

    Where the engine's own limit is known to be below the longest request (tokens), it is raised:
    otherwise it would refuse what the workload asks for, whatever its other values.
    """
    table, device = engine.table, engine.device
    given = config.given(table, device)
    known = {**table.defaults(device), **given}
    limit, times = known.get(table.length.knob), 1
    if table.length.times is not None and isinstance(known.get(table.length.times), int):
        times = int(known[table.length.times])
    if isinstance(limit, int) and table.length.knob not in given and 0 < limit < longest * times:
        given = with_length(table, given, longest, device)
    started = {n: v for n, v in given.items() if table.knobs[n].restarts}
    return started, {n: v for n, v in given.items() if n not in started}


def longest_of(folder: RunFolder) -> int:
    """Tokens of the longest request of a run, prompt and answer together."""
    windows = read_windows(folder)
    return max(len(r.token_ids) + r.output_tokens for window in windows for r in window)


@dataclass(frozen=True, slots=True)
class TunedEndpoint(Endpoint):
    """A server whose requests carry fields with values of knobs."""

    fields: Mapping[str, Any] = field(default_factory=dict)

    def body(self, request: LoadRequest, sampling: SamplingParams) -> dict[str, Any]:
        """The JSON of a request, with those fields."""
        return {**Endpoint.body(self, request, sampling), **self.fields}
