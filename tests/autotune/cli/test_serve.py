"""What a command line becomes before a server is started."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import engine.server.run_router
import engine.server.run_server
from autotune.cli.exits import guarded
from autotune.cli.serve import serve
from autotune.embedded import TARGET
from engine.config import EngineConfig
from engine.server.settings import ServerSettings

app = typer.Typer(rich_markup_mode=None)
app.command()(guarded(serve))


class Servers:
    """Stands in for both kinds of server and remembers how it was started."""

    def __init__(self) -> None:
        self.code = 0
        self.replicas: int | None = None
        self.routing: str | None = None

    def one(self, config: EngineConfig, settings: ServerSettings, **more: Any) -> int:
        self.config, self.settings, self.more = config, settings, more
        return self.code

    def several(
        self,
        config: EngineConfig,
        settings: ServerSettings,
        *,
        replicas: int,
        router: str,
        **_: Any,
    ) -> int:
        self.config, self.settings = config, settings
        self.replicas, self.routing = replicas, router
        return self.code


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    stand_in = Servers()
    monkeypatch.setattr(engine.server.run_server, "run_server", stand_in.one)
    monkeypatch.setattr(engine.server.run_router, "run_router", stand_in.several)
    return stand_in


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=environment)


def test_by_default_the_embedded_model_on_this_machine_alone(servers: Servers) -> None:
    result = run()
    assert (result.exit_code, result.output) == (0, "")
    assert servers.config == EngineConfig(model=str(TARGET))
    assert servers.settings == ServerSettings()
    assert servers.more["names"] == ["embedded", str(TARGET)]


def test_every_setting_has_an_option(servers: Servers, tmp_path: Path) -> None:
    result = run(
        *("--host", "::1", "--port", "0", "--uds", "a-socket", "--access-log"),
        *("--api-key", "one", "--api-key", "two", "--drain", "2m"),
        *("--max-waiting", "7", "--max-prompt-tokens", "8", "--max-output-tokens", "9"),
        *("--max-body-bytes", "2MiB", "--request-timeout", "none", "--read-timeout", "3s"),
        *("--write-timeout", "4s", "--keep-alive", "5s", "--stall", "6s"),
        *("--served-model-name", "a", "--served-model-name", "b"),
        *("--chat-template", str(tmp_path / "t.jinja"), "--no-generation-defaults"),
        *("--max-num-seqs", "12"),
    )
    assert result.exit_code == 0, result.output
    settings, limits = servers.settings, servers.settings.limits
    assert (settings.host, settings.port, settings.uds) == ("::1", 0, "a-socket")
    assert (settings.access_log, settings.api_keys, settings.drain_s) == (True, ("one", "two"), 120)
    assert (limits.max_waiting, limits.max_prompt_tokens, limits.max_output_tokens) == (7, 8, 9)
    assert (limits.max_body_bytes, limits.request_timeout_s) == (2 << 20, None)
    assert (limits.read_timeout_s, limits.write_timeout_s) == (3, 4)
    assert (limits.keep_alive_s, limits.stall_s) == (5, 6)
    assert servers.more["names"] == ["a", "b"]
    assert servers.more["chat_template"] == tmp_path / "t.jinja"
    assert servers.more["generation_defaults"] is False
    assert servers.config.max_num_seqs == 12


def test_keys_come_from_the_environment(servers: Servers) -> None:
    assert run(AUTOTUNE_API_KEY="one two").exit_code == 0
    assert servers.settings.api_keys == ("one", "two")


@pytest.fixture
def knobs_file(tmp_path: Path) -> Path:
    file = tmp_path / "a run" / "deploy" / "engine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        f"model: {json.dumps(str(TARGET))}\nmax_num_seqs: 3000\nmax_num_batched_tokens: 4096\n"
    )
    return file


@pytest.mark.parametrize("how", ["file", "run", "option"])
def test_a_tuned_configuration_is_served(servers: Servers, knobs_file: Path, how: str) -> None:
    named = {
        "file": [str(knobs_file)],
        "run": [str(knobs_file.parent.parent)],
        "option": ["--config", str(knobs_file)],
    }[how]
    # The file makes room for what the flag asks, which the defaults would not.
    result = run(*named, "--max-num-seqs", "4000")
    assert result.exit_code == 0, result.output
    config = servers.config
    assert (config.model, config.max_num_seqs) == (str(TARGET), 4000)
    assert config.max_num_batched_tokens == 4096


def test_a_model_is_named_by_its_folder(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "some-model").mkdir()
    assert run(str(tmp_path / "some-model")).exit_code == 0
    assert servers.config.model == str(tmp_path / "some-model")
    assert servers.more["names"] == ["some-model", str(tmp_path / "some-model")]


def test_replicas_are_routed_to(servers: Servers) -> None:
    assert run("--replicas", "3").exit_code == 0
    assert (servers.replicas, servers.routing) == (3, "prefix_aware")
    assert run("--replicas", "2", "--routing", "least-loaded").exit_code == 0
    assert servers.routing == "least_loaded"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-file.yaml"], "no-such-file.yaml"),
        (["a.yaml", "--config", "b.yaml"], "two files"),
        (["a-model", "--model", "b-model"], "two models"),
        (["--drain", "soon"], "--drain"),
        (["--request-timeout", "never"], "--request-timeout"),
        (["--routing", "random"], "--routing 'random': choose prefix"),
        (["--max-body-bytes", "0"], "max_body_bytes"),
        (["--api-key", ""], "key"),
        (["--port", "70000"], "port"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
    ],
)
def test_bad_input_is_one_sentence(servers: Servers, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
    assert not hasattr(servers, "config")


@pytest.mark.parametrize("keys", [[], ["--api-key", "secret-key"]])
def test_a_server_for_other_machines_warns(servers: Servers, keys: list[str]) -> None:
    result = run("--host", "0.0.0.0", *keys)
    assert result.exit_code == 0
    assert "warning: 0.0.0.0" in result.output
    assert ("TLS" if keys else "AUTOTUNE_API_KEY") in result.output
    assert "secret-key" not in result.output


def test_the_server_s_code_is_the_command_s(servers: Servers) -> None:
    servers.code = 1
    assert run().exit_code == 1


def test_a_port_in_use_is_told_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("--port", port)
    assert result.exit_code == 3
    assert f"127.0.0.1:{port}" in result.output
