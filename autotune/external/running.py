"""A serving engine that runs: its address, its metrics, how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure, classify
from autotune.external.probes import status_of
from autotune.external.server_log import ServerLog
from autotune.external.start_watch import oom_kills
from autotune.profiling.prometheus_scrape import metrics_url

_HEALTH_QUESTIONS = 3


class ServerProcess(Protocol):
    """What runs a server: a process of ours, or a command that restarts it elsewhere."""

    @property
    def pid(self) -> int | None:
        """The server's process; None where it runs elsewhere."""
        ...

    @property
    def status(self) -> int | None:
        """The exit status, -N for the signal N; None while it runs or where it is not known."""
        ...

    def ended(self) -> bool:
        """Whether it has ended or failed."""
        ...

    def answers_count(self) -> bool:
        """Whether what answers at the address now is the server that was asked for."""
        ...

    def stop(self) -> None:
        """End it, as far as it is ours to end."""
        ...


class Ends:
    """Tells why an engine ended: its status, its log, and what the kernel killed meanwhile.

    Args:
        engine: what was started.
        process: the one that runs it.
        log: what it writes.
    """

    def __init__(self, engine: ExternalEngine, process: ServerProcess, log: ServerLog) -> None:
        self._engine, self._process, self._log = engine, process, log
        self._kills = oom_kills()

    def failure(self, *, has_served: bool = False) -> Failure:
        """Why it has ended."""
        kills = oom_kills()
        more = kills is not None and self._kills is not None and kills > self._kills
        return classify(
            self._engine.table.title,
            self._engine.table.failures,
            self._process.status,
            self._log.tail(),
            on_device=self._engine.device == "cuda",
            has_served=has_served,
            killed_for_memory=more,
        )


class RunningServer:
    """A server that answers; leaving the `with` block stops it.

    Args:
        engine: what was started.
        process: the one that runs it.
        ends: tells why it ended.
        url: http://host:port.
        model: the model's name in requests.
        log: what it writes.
        facts: what it said of itself when it started.
        started_in_s: seconds until it was healthy.
    """

    def __init__(
        self,
        engine: ExternalEngine,
        process: ServerProcess,
        ends: Ends,
        *,
        url: str,
        model: str,
        log: ServerLog,
        facts: Mapping[str, float | str],
        started_in_s: float,
    ) -> None:
        self.engine = engine
        self.url = url
        self.model = model
        self.facts = dict(facts)
        self.started_in_s = started_in_s
        self._process = process
        self._ends = ends
        self._log = log
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The server's process; None where a command runs it elsewhere."""
        return self._process.pid

    @property
    def metrics_url(self) -> str:
        """Where its metrics are."""
        return metrics_url(self.url + self.engine.table.metrics_path)

    def failure(self) -> Failure | None:
        """Why it went away by itself; None while it runs, or when it was stopped.

        Of a server that a command has started elsewhere, it is known only that it answers no more.
        """
        if self._stopped:
            return None
        if self._process.ended():
            return self._ends.failure(has_served=True)
        elsewhere = self._process.pid is None
        # One answer that is late means nothing.
        if elsewhere and not any(self.healthy() for _ in range(_HEALTH_QUESTIONS)):
            reason = f"{self.engine.table.title} at {self.url} is healthy no more"
            return Failure("crash", reason, None, tuple(self._log.tail(40)))
        return None

    def healthy(self) -> bool:
        """Whether it says of itself that it can serve."""
        health = self.url + self.engine.table.health_path
        return status_of(health, api_key=self.engine.api_key) == 200

    def reset_cache(self) -> bool:
        """Have it forget all prefixes, so that a second load does not profit from the first."""
        reset = self.engine.table.reset_cache
        if reset is None:
            return False
        return status_of(self.url + reset.path, post=True, api_key=self.engine.api_key) == 200

    def stop(self) -> None:
        """End it and all of its workers; harmless where it has ended."""
        self._stopped = True
        self._process.stop()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
