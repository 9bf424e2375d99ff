"""One trial at a time, on servers in virtual time: which share a server, and how they fail."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import EnvironmentMissing
from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure
from autotune.external.table import load_table
from autotune.external_search.evaluator import ExternalEvaluator
from autotune.external_search.served import Server
from autotune.load.endpoint import Endpoint
from autotune.records import RunFolder
from autotune.search.messages import Answer, Failed, MeasureCommand, Measured
from autotune.search.objective import Objective
from autotune.search.windows import write_windows
from autotune.workload.materialise import LoadRequest
from engine.request import SamplingParams
from tests.autotune.external_search.virtual_servers import VirtualServers, vllm

REQUESTS = [LoadRequest(f"r{i}", 0.05 * i, (1, 2, 3, 4 + i), 4) for i in range(12)]
DEATH = Failure("device_memory", "vLLM: CUDA out of memory")


def llamacpp() -> ExternalEngine:
    return ExternalEngine(
        table=load_table("llamacpp"),
        program=("/somewhere/llama-server",),
        version=None,
        device="cpu",
        model="/somewhere/model.gguf",
        served_name="model",
    )


class Trials:
    """Measures one after the other on servers of the test's own."""

    def __init__(
        self,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        servers: VirtualServers,
        engine: ExternalEngine,
        **more: Any,
    ) -> None:
        self.folder, self.servers = RunFolder(path), servers
        path.mkdir()
        write_windows(self.folder, [REQUESTS])
        servers.install(monkeypatch)
        monkeypatch.setattr("autotune.external_search.served._NOTICED_S", 0.05)
        self.evaluator = ExternalEvaluator(
            self.folder, engine, servers.start, Objective("goodput"), threading.Event(), **more
        )
        self.number = 0

    def measure(self, **config: Any) -> Answer:
        command = MeasureCommand(self.number, config, 0, 1.0, 10.0, 0, "ttft<1s")
        self.number += 1
        return self.evaluator.measure(command, 60.0)


def fields(endpoint: Endpoint) -> Any:
    return endpoint.body(REQUESTS[0], SamplingParams()).get("cache_prompt")


def test_what_goes_with_requests_shares_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = VirtualServers(forgets=False)
    trials = Trials(tmp_path / "run", monkeypatch, servers, llamacpp())
    assert isinstance(trials.measure(cache_prompt=True, parallel=4), Measured)
    assert isinstance(trials.measure(cache_prompt=False, parallel=4), Measured)
    assert [place for place, _ in servers.loads] == [0, 0, 0]  # the first is the warm-up
    assert [fields(endpoint) for endpoint in servers.endpoints] == [None, None, False]
    # What it keeps of the loads before, nobody can make it forget.
    trials.measure(cache_prompt=True, parallel=4)
    trials.measure(cache_prompt=False, parallel=8)
    assert [server.values for server in servers.servers] == [
        {"parallel": 4},
        {"parallel": 4},
        {"parallel": 8},
    ]
    assert [server.stopped for server in servers.servers] == [True, True, False]
    trials.evaluator.close()
    assert servers.servers[-1].stopped


def test_equal_values_share_a_server_that_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = VirtualServers()
    trials = Trials(tmp_path / "run", monkeypatch, servers, vllm())
    for seqs in (8, 8, 16, 16, 8):
        trials.measure(max_num_seqs=seqs)
    assert [server.values["max_num_seqs"] for server in servers.servers] == [8, 16, 8]


def test_a_server_that_dies_of_its_warm_up_gets_no_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = VirtualServers(dies=lambda _: DEATH)
    trials = Trials(tmp_path / "run", monkeypatch, servers, vllm())
    assert trials.measure(max_num_seqs=8) == Failed("out_of_memory", DEATH.reason)
    assert len(servers.loads) == 1
    assert servers.servers[0].stopped


def test_what_was_answered_before_a_crash_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(_: Mapping[str, Any]) -> Failure | None:
        return DEATH if len(servers.loads) == 2 else None

    servers = VirtualServers(dies=dies)
    trials = Trials(tmp_path / "run", monkeypatch, servers, vllm())
    assert trials.measure(max_num_seqs=8) == Failed("out_of_memory", DEATH.reason)
    assert {r.request_id for r in trials.folder.read_requests(0)} == {f"r{i}" for i in range(12)}
    # And the next trial has a server of its own.
    assert isinstance(trials.measure(max_num_seqs=8), Measured)
    assert len(servers.servers) == 2


@pytest.mark.parametrize("dead", [True, False])
def test_a_default_that_breaks_down_when_it_is_first_asked_is_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    def agree(server: Server) -> Endpoint:
        if len(servers.servers) == 1:
            servers.servers[0].died = DEATH if dead else None
            raise EnvironmentMissing("the server does not answer")
        return Endpoint(server.url, server.model)

    servers = VirtualServers()
    trials = Trials(tmp_path / "run", monkeypatch, servers, vllm(), agree=agree)
    if not dead:
        with pytest.raises(EnvironmentMissing, match="does not answer"):
            trials.measure()
        return
    assert trials.measure() == Failed("out_of_memory", DEATH.reason)
    assert isinstance(trials.measure(), Measured)
