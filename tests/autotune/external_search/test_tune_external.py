from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.deploy.evidence import Evidence
from autotune.embedded import TARGET
from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure
from autotune.external.table import load_table
from autotune.external_search.deploy import render_flags_yaml, write_external_deploy
from autotune.external_search.options import ExternalOptions
from autotune.external_search.prepare import engine_of
from autotune.external_search.tune import tune_external
from autotune.records import RunFolder, TrialRecord
from autotune.traffic_options import TrafficOptions
from reports.report import render_report
from tests.autotune.external_search.virtual_servers import VirtualServers, vllm

TRAFFIC = TrafficOptions(source="chat", rate=25.0, duration_s=4.0, length_factor=0.04)
# A small space, whose simulation takes no time.
NARROWING: dict[str, list[Any]] = {
    "max_num_seqs": [8, 32, 128],
    "enforce_eager": [False, True],
    "watermark": [0.0, 0.1],
    **{
        name: [value]
        for name, value in vllm().table.defaults("cpu").items()
        if name in vllm().table.searched("cpu")
        and name not in ("max_num_seqs", "enforce_eager", "watermark", "prompt_lookup_max")
    },
}


def options(**changes: Any) -> ExternalOptions:
    known: dict[str, Any] = {
        "engine": "vllm",
        "model": str(TARGET),
        "traffic": TRAFFIC,
        "slo": "ttft<200ms,tpot<30ms",
        "objective": "latency",
        "budget_s": None,
        "trials": 8,
        "rounds": 3,
        "finalists": 1,
        "narrowing": NARROWING,
    }
    return ExternalOptions(**{**known, **changes})


def searched(path: Path) -> list[TrialRecord]:
    return [t for t in RunFolder(path).read_trials() if t.kind == "search"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VirtualServers]:
    """A finished run over virtual servers."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        servers = VirtualServers().install(patch)
        narrowing = NARROWING | {"cpu_omp_threads_bind": ["0-1"]}
        tune_external(options(narrowing=narrowing), path)
    return path, servers


def test_a_better_configuration_is_found_and_proven(tuned: tuple[Path, VirtualServers]) -> None:
    path, servers = tuned
    run = RunFolder(path).read_run()
    result = run["result"]
    trials = RunFolder(path).read_trials()
    assert run["status"] == "done"
    # Of this no simulation knows: the trials had to tell.
    assert result["changes"]["enforce_eager"] == [False, True]
    assert result["proven"]
    assert result["gain"]["low"] > 1.1
    assert result["winner"]["config"]["enforce_eager"] is True
    assert trials[0].source == "default"
    assert len(searched(path)) == 8
    proof = [t for t in trials if t.kind == "proof"]
    # There and back again: who ends a round begins the next.
    eager = [t.config["enforce_eager"] for t in proof]
    assert eager == [False, True, True, False, False, True]
    assert [t.round for t in proof] == [0, 0, 1, 1, 2, 2]
    # Each search trial has a server of its own, and the proof one for each run of one contender.
    assert len(servers.servers) == 8 + 4
    assert all(server.stopped for server in servers.servers)
    assert servers.servers[0].values == {"cpu_omp_threads_bind": "0-1"}
    for trial in searched(path)[1:]:
        assert trial.predicted is not None
        assert trial.predicted["after_trials"] == trial.number
    assert json.loads((path / "autotune.lock").read_text())["versions"]["vllm"] == "0.32.0"
    page = render_report(path).read_text()
    assert "enforce_eager" in page


def test_hopeless_trials_get_a_short_load_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = VirtualServers().install(monkeypatch)
    path = tmp_path / "run"
    narrowing = NARROWING | {"max_num_seqs": [1, 128]}
    tune_external(options(sampler="tpe", trials=3, narrowing=narrowing), path)
    trials = searched(path)
    short = [t for t in trials if t.config["max_num_seqs"] == 1]
    assert len(short) == 1
    assert short[0].outcome == "cut_short"
    assert short[0].objective is None
    assert "worse than trial 0" in (short[0].reason or "")
    full = servers.loads[2][1]
    # The default: warm-up, short load, full load; the one cut short lacks the last.
    assert [count for place, count in servers.loads if place == 0][:3] == [
        8,
        servers.loads[1][1],
        full,
    ]
    place = next(i for i, s in enumerate(servers.servers) if s.values.get("max_num_seqs") == 1)
    assert [count for p, count in servers.loads if p == place] == [8, servers.loads[1][1]]
    assert servers.loads[1][1] < full / 2
    # Its records are those of the short load.
    assert len(RunFolder(path).read_requests(short[0].number)) == servers.loads[1][1]


def test_failures_are_trials_and_are_avoided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(values: Mapping[str, Any]) -> Failure | None:
        if values.get("max_num_seqs", 128) > 128:
            return Failure("host_memory", "vLLM: out of memory")
        return Failure("bad_flag", "vLLM: no") if values.get("block_size") == 32 else None

    def dies(values: Mapping[str, Any]) -> Failure | None:
        crashes = values.get("enable_prefix_caching") is False
        return Failure("crash", "vLLM ended with SIGSEGV") if crashes else None

    VirtualServers(fails=fails, dies=dies).install(monkeypatch)
    path = tmp_path / "run"
    narrowing = NARROWING | {
        "max_num_seqs": [128, 256],
        "block_size": [32, 128],
        "enable_prefix_caching": [True, False],
        "watermark": [0.0],
        "enforce_eager": [False],
    }
    tune_external(options(trials=8, narrowing=narrowing), path)
    outcomes = {t.outcome for t in searched(path)}
    assert outcomes == {"ok", "out_of_memory", "rejected", "crash"}
    for trial in searched(path):
        if trial.config["max_num_seqs"] == 256:
            assert (trial.outcome, trial.objective) == ("out_of_memory", None)
        elif trial.config["block_size"] == 32:
            assert trial.outcome == "rejected"
        elif not trial.config["enable_prefix_caching"]:
            assert (trial.outcome, trial.reason) == ("crash", "vLLM ended with SIGSEGV")


def test_what_no_flag_could_mend_ends_the_run_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Failure("model_not_found", "vLLM: no such model")
    VirtualServers(fails=lambda _: failure).install(monkeypatch)
    path = tmp_path / "run"
    with pytest.raises(EnvironmentMissing, match=r"no such model; .*--resume"):
        tune_external(options(trials=2, rounds=2), path)
    VirtualServers().install(monkeypatch)
    assert tune_external(None, path)["status"] == "done"
    assert len(searched(path)) == 2


def test_a_run_is_not_gone_on_with_on_another_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VirtualServers(fails=lambda _: Failure("port_in_use", "taken")).install(monkeypatch)
    path = tmp_path / "run"
    with pytest.raises(EnvironmentMissing, match="taken"):
        tune_external(options(trials=2), path)
    newer = dataclasses.replace(vllm(), version="0.33.0")
    monkeypatch.setattr("autotune.external_search.prepare.find_engine", lambda *_, **__: newer)
    with pytest.raises(BadInput, match=r"began with vLLM 0\.32\.0 and finds 0\.33\.0"):
        tune_external(None, path)


def test_a_run_without_a_single_server_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VirtualServers(fails=lambda _: Failure("timeout", "not healthy")).install(monkeypatch)
    run = tune_external(options(trials=3), tmp_path / "run")
    assert run["result"] is None
    assert {t.outcome for t in searched(tmp_path / "run")} == {"timeout"}


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VirtualServers().install(monkeypatch)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune_external(options(trials=3, rounds=2), whole)
    asked: ExternalOptions | None = options(trials=3, rounds=2)
    for _ in range(8):
        stop = threading.Event()
        VirtualServers(loads=6, stop=stop).install(monkeypatch)
        try:
            tune_external(asked, parts, stop=stop)
            break
        except Interrupted:
            assert RunFolder(parts).read_run()["status"] == "interrupted"
        asked = None
    assert RunFolder(parts).read_run()["status"] == "done"
    told = [
        [(t.kind, t.config, t.round) for t in RunFolder(path).read_trials()]
        for path in (whole, parts)
    ]
    assert told[0] == told[1]
    # A finished run is left as it is.
    VirtualServers(fails=lambda _: Failure("crash", "must not start")).install(monkeypatch)
    assert tune_external(None, parts)["status"] == "done"


def test_deploy_starts_what_won(tuned: tuple[Path, VirtualServers]) -> None:
    folder = RunFolder(tuned[0])
    run = folder.read_run()
    run["result"]["winner_config"] |= {
        "speculative_method": "ngram",
        "num_speculative_tokens": 4,
        "enable_prefix_caching": False,
    }
    engine = vllm(cpu_omp_threads_bind="0-1")
    files = write_external_deploy(folder, run, engine)
    assert [file.name for file in files] == ["vllm.yaml", "serve.sh"]
    settings = yaml.safe_load((folder.deploy / "vllm.yaml").read_text())
    assert settings["enforce-eager"] is True
    assert settings["no-enable-prefix-caching"] is True
    assert json.loads(settings["speculative-config"]) == {
        "method": "ngram",
        "num_speculative_tokens": 4,
    }
    script = (folder.deploy / "serve.sh").read_text()
    assert "export VLLM_CPU_OMP_THREADS_BIND=0-1" in script
    assert "--enforce-eager" in script
    assert '--host "${HOST:-127.0.0.1}"' in script
    assert (folder.deploy / "serve.sh").stat().st_mode & 0o111
    assert "tuned: default false" in (folder.deploy / "vllm.yaml").read_text()


def test_what_means_something_beside_another_flag_alone_is_in_the_file(
    tuned: tuple[Path, VirtualServers],
) -> None:
    engine = ExternalEngine(
        table=load_table("sglang"),
        program=("/somewhere/sglang", "serve"),
        version="0.5.23",
        device="cuda",
        model="m",
        served_name="m",
        extra_arguments=("--hf-token=secret", "--admin-key", "secret"),
    )
    evidence = Evidence.from_run(RunFolder(tuned[0]).read_run())
    drafts = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 8}
    others = {"disable_radix_cache": True, "enable_mixed_chunk": False, "max_running_requests": 32}
    text = render_flags_yaml(engine, drafts | others, evidence)
    assert yaml.safe_load(text) == {
        "speculative-algorithm": "NGRAM",
        "speculative-num-draft-tokens": 8,
        "disable-radix-cache": True,
        "max-running-requests": 32,
    }
    assert "Not in this file, but in serve.sh: --hf-token, --admin-key" in text
    assert "secret" not in text
    idle = render_flags_yaml(engine, drafts | {"speculative_algorithm": "none"}, evidence)
    assert not yaml.safe_load(idle)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "http://127.0.0.1:1"}, "belong together"),
        (
            {"url": "http://h", "restart_command": ("{flags}",), "engine_arguments": ("--x",)},
            "--engine-args has no effect with --url",
        ),
        ({"model": ""}, "the model is not known"),
        ({"slo": "quality_loss<1%"}, "quality"),
        ({"short_share": 1.0}, "short load"),
    ],
)
def test_options_that_contradict_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        options(**changes)


def test_options_survive_the_record() -> None:
    asked = options(narrowing={"max_num_seqs": [1, 2]}, engine_arguments=("--x",))
    again = ExternalOptions.from_json(json.loads(json.dumps(asked.to_json())))
    assert json.dumps(again.to_json()) == json.dumps(asked.to_json())
    assert again.narrowing == asked.narrowing


def test_a_servers_address_may_end_as_clients_write_it() -> None:
    asked = options(
        url="http://127.0.0.1:8000/v1",
        restart_command=("restart", "{flags}"),
        device="cpu",
        narrowing={"max_num_seqs": [32]},
    )
    engine, notes = engine_of(asked)
    assert engine.url == "http://127.0.0.1:8000"
    assert engine.fixed == {"max_num_seqs": 32}
    assert "0.32.0" in notes[0]
