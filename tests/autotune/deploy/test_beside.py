"""The scripts beside an export, run as a person runs them."""

import json
import os
import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from autotune.cli.main import app
from autotune.deploy.beside import smoke_test
from tests.autotune.deploy.platforms.exported_runs import changed, exported, exported_of


class Server(BaseHTTPRequestHandler):
    """As much of an OpenAI-compatible server as the smoke test asks."""

    key: ClassVar[str | None] = None
    tokens: ClassVar[int] = 8
    healthy: ClassVar[bool] = True
    seen: ClassVar[list[Any]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def allowed(self) -> bool:
        return self.key is None or self.headers["Authorization"] == f"Bearer {self.key}"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200 if self.healthy else 503, {})
        elif not self.allowed():
            self.answer(401, {})
        else:
            self.answer(200, {"data": [{"id": "org/name"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if not self.allowed():
            self.answer(401, {})
        else:
            usage = {"completion_tokens": self.tokens}
            self.answer(200, {"choices": [{"text": "x"}], "usage": usage})


@contextmanager
def serving(**how: Any) -> Iterator[str]:
    handler = type("Handler", (Server,), {**how, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def run(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.sh"
    path.write_text(script)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["sh", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**kept, "no_proxy": "*", **variables},
    )


def test_a_server_that_answers_passes(tmp_path: Path) -> None:
    with serving() as url:
        done = run(smoke_test("org/name", start="x", url=url), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passed: org/name" in done.stdout


def test_a_key_is_shown_where_one_is_wanted(tmp_path: Path) -> None:
    with serving(key="s3cret") as url:
        script = smoke_test("org/name", start="x", url=url)
        assert run(script, tmp_path, API_KEY="s3cret").returncode == 0
        done = run(script, tmp_path)
    assert done.returncode == 1
    assert "smoke test failed" in done.stderr


@pytest.mark.parametrize(
    ("how", "variables", "message"),
    [
        ({}, {"MODEL": "other"}, "does not name other"),
        ({"tokens": 0}, {}, "a completion without tokens"),
        ({"healthy": False}, {"WAIT": "0"}, "/health does not answer after 0 s"),
    ],
)
def test_a_server_that_does_not_serve_fails(
    how: dict[str, Any], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    with serving(**how) as url:
        done = run(smoke_test("org/name", start="x", url=url), tmp_path, **variables)
    assert done.returncode == 1
    assert message in done.stderr


def _asked(script: str, folder: Path, **variables: str) -> list[str]:
    """What the benchmark asks of autotune, which is a script here that writes it down."""
    fake = folder / "autotune"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    fake.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    done = run(script, folder, **{"PATH": path, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_benchmark_offers_the_load_of_the_run(tmp_path: Path) -> None:
    script = exported("cpu", "compose").files["benchmark.sh"]
    words = _asked(script, tmp_path, URL="http://h:1")
    told = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "bench"
    assert told["--url"] == "http://h:1"
    assert told["--served-model"] == "Example 1B"
    assert (told["--workload"], told["--rate"], told["--scale-lengths"]) == ("chat", "4", "0.5")
    assert told["--slo"] == "ttft<200ms,tpot<100ms"
    assert "--api-key-env" in _asked(script, tmp_path, API_KEY="x")
    # Of a search for capacity: the rate that was found.
    script = exported("gpus", "compose").files["benchmark.sh"]
    words = _asked(script, tmp_path)
    assert words[words.index("--rate") + 1] == "12.5"


def test_the_benchmark_asks_for_what_the_whole_trace_was_scaled_to(tmp_path: Path) -> None:
    """The measured window had 52 of the 68 requests/s; lengths were scaled to the model."""
    run = changed("cpu")
    run["options"]["traffic"] = {"source": "trace.csv", "start_s": 60.0, "keep_grid": True}
    run["workload"] |= {"rate": 52.0, "scaling": {"rate": 68.0, "lengths": 0.25}}
    run["result"]["winner"]["offered_rate"] = 52.0
    script = exported_of(run, "vllm").files["benchmark.sh"]
    words = _asked(script, tmp_path)
    assert words[words.index("--rate") + 1] == "68"
    assert words[words.index("--scale-lengths") + 1] == "0.25"
    assert words[words.index("--start") + 1] == "60s"
    assert "--keep-grid" in words
    # Others do not know the trace: they offer what arrived.
    assert "--request-rate 52" in script
    # What was found to be borne was borne in such windows, too.
    run["result"]["winner"]["capacity_requests_per_s"] = 26.0
    script = exported_of(run, "vllm").files["benchmark.sh"]
    words = _asked(script, tmp_path)
    assert words[words.index("--rate") + 1] == "34"
    assert "--request-rate 26" in script


def test_all_at_once_is_asked_for_again(tmp_path: Path) -> None:
    run = changed("cpu")
    run["options"]["traffic"]["rate"] = "inf"
    run["workload"] |= {"rate": None, "scaling": {"rate": None}}
    run["result"]["winner"]["offered_rate"] = None
    script = exported_of(run, "vllm").files["benchmark.sh"]
    words = _asked(script, tmp_path)
    assert words[words.index("--rate") + 1] == "inf"
    assert "vllm bench serve" not in script


def test_limits_on_quality_are_not_asked_of_a_server(tmp_path: Path) -> None:
    run = changed("cpu")
    run["slo"] = "ttft<200ms,quality_loss<1%"
    script = exported_of(run, "vllm").files["benchmark.sh"]
    words = _asked(script, tmp_path)
    assert words[words.index("--slo") + 1] == "ttft<200ms"
    assert "# Not measured over HTTP: quality_loss<1%" in script
    run["slo"] = "quality_loss<1%"
    assert "--slo" not in _asked(exported_of(run, "vllm").files["benchmark.sh"], tmp_path)


def test_bench_knows_every_option_of_the_benchmark(tmp_path: Path) -> None:
    script = exported("gpus", "compose").files["benchmark.sh"]
    options = [w for w in _asked(script, tmp_path, API_KEY="x") if w.startswith("--")]
    assert len(options) >= 7
    known = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout
    assert [option for option in options if option not in known] == []


def test_the_peer_s_command_has_the_run_s_lengths() -> None:
    script = exported("cpu", "compose").files["benchmark.sh"]
    line = next(line for line in script.splitlines() if "vllm bench serve" in line)
    words = shlex.split(line.removeprefix("#"))
    assert words[words.index("--random-input-len") + 1] == "388"
    assert words[words.index("--random-output-len") + 1] == "46"
    assert words[words.index("--num-prompts") + 1] == "240"
