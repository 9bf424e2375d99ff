"""Servers in virtual time in place of started ones: their flags decide what a load measures."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure, LaunchFailed
from autotune.external.table import load_table
from autotune.external_search.step_costs import LinearCost
from autotune.load.endpoint import Endpoint
from autotune.load.http_load import HttpLoadResult
from autotune.predict.replay import replay
from autotune.workload.materialise import LoadRequest
from engine.config import EngineConfig
from engine.engine import CacheShape

COST = LinearCost(base=4e-3, sequence=4e-4, token=2e-5)
Fails = Callable[[Mapping[str, Any]], Failure | None]


def vllm(**fixed: Any) -> ExternalEngine:
    """vLLM as it would be found here, never started."""
    return ExternalEngine(
        table=load_table("vllm"),
        program=("/somewhere/vllm", "serve"),
        version="0.32.0",
        device="cpu",
        model="/somewhere/model",
        served_name="model",
        fixed=fixed,
    )


class VirtualServer:
    """A server that is gone or asked by `VirtualServers`."""

    def __init__(self, url: str, values: Mapping[str, Any], forgets: bool) -> None:
        self.url = url
        # Nobody listens there.
        self.metrics_url = "http://127.0.0.1:9/metrics"
        self.forgets = forgets
        self.model = "model"
        self.values = dict(values)
        self.started_in_s = 1.0
        self.facts: dict[str, float | str] = {"kv_cache_tokens": 50_000.0}
        self.died: Failure | None = None
        self.stopped = False

    def failure(self) -> Failure | None:
        """What `VirtualServers` has put here."""
        return self.died

    def reset_cache(self) -> bool:
        """Whether each load begins with an empty cache."""
        return self.forgets

    def stop(self) -> None:
        """End."""
        self.stopped = True


class VirtualServers:
    """Starts them and offers loads to them; in place of `served.starter` and `run_http_load`.

    Args:
        fails: the failure of a start with values; None where it serves.
        dies: the failure during a load.
        forgets: whether a server can be made to forget its prefixes.
        loads: loads before the user stops the run; None never stops it.
        stop: set then.
    """

    def __init__(
        self,
        *,
        fails: Fails = lambda _: None,
        dies: Fails = lambda _: None,
        forgets: bool = True,
        loads: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.fails, self.dies, self.forgets = fails, dies, forgets
        self.loads_left = loads
        self.stop = stop or threading.Event()
        self.servers: list[VirtualServer] = []
        self.loads: list[tuple[int, int]] = []
        self.endpoints: list[Endpoint] = []
        self._numbers = itertools.count()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> VirtualServers:
        """Have the search use these servers."""
        monkeypatch.setattr("autotune.external_search.tune.starter", lambda *_: self.start)
        monkeypatch.setattr("autotune.external_search.evaluator.run_http_load", self.load)
        monkeypatch.setattr("autotune.external_search.tune.discover", _understands_all)
        monkeypatch.setattr("autotune.external_search.prepare.find_engine", _found)
        # Intervals of single trials are of no interest here and take long.
        monkeypatch.setattr("autotune.external_search.evaluator.RESAMPLES", 20)
        return self

    def start(
        self, values: Mapping[str, Any], _stop: threading.Event, say: Callable[[str], None]
    ) -> VirtualServer:
        """Start one."""
        say("loading weights")
        failure = self.fails(values)
        if failure is not None:
            raise LaunchFailed(failure)
        server = VirtualServer(f"http://127.0.0.1:{next(self._numbers)}", values, self.forgets)
        self.servers.append(server)
        return server

    def load(
        self, endpoint: Endpoint, requests: Sequence[LoadRequest], **options: Any
    ) -> HttpLoadResult:
        """What the load would measure."""
        place = int(endpoint.url.rpartition(":")[2])
        server = self.servers[place]
        assert not server.stopped
        self.loads.append((place, len(requests)))
        self.endpoints.append(endpoint)
        if self.loads_left is not None:
            self.loads_left -= 1
            if self.loads_left <= 0:
                self.stop.set()
        server.died = self.dies(server.values)
        values = {
            name: value
            for name, value in server.values.items()
            if name in ("max_num_seqs", "max_num_batched_tokens")
        }
        config = EngineConfig(max_model_len=4096, **{"max_num_seqs": 128, **values})
        # A knob of which no simulation knows.
        slower = 1.0 if server.values.get("enforce_eager") else 1.3
        cost = LinearCost(COST.base * slower, COST.sequence * slower, COST.token * slower)
        cache = CacheShape(4096, 4096)
        played = replay(requests, config, cost, cache, drain_limit=options["drain_limit"])
        return HttpLoadResult(played.records, [], played.duration, True, None)


def _understands_all(url: str, *, model: str, **_: Any) -> Any:
    return SimpleNamespace(notes=[], endpoint=Endpoint(url, model))


def _found(name: str, model: str, **given: Any) -> ExternalEngine:
    assert name == "vllm"
    assert Path(model).exists()
    return vllm(**given["fixed"])
