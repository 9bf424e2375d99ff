"""`autotune serve --replicas 2` as a user has it: real engines, one of which is killed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.end_to_end.conftest import ENTRY, ENVIRONMENT
from tests.engine.server.tiny_served import make_folder

KNOBS = ("--num-threads", "1", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "4MiB")
PROMPT = "Of two engines with the same weights, it makes no difference who answers. "


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The command in an environment of its own, and a client; nothing of it may be left."""
    said: list[str] = []
    process = subprocess.Popen(
        [*ENTRY, "serve", str(folder), "--port", "0", *KNOBS, *options],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    stderr = process.stderr
    reader = threading.Thread(target=lambda: said.extend(stderr), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"replicas at (http://\S+)", "".join(said))):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        replicas = psutil.Process(process.pid).children(recursive=True)
        with httpx.Client(base_url=found.group(1), timeout=60.0) as client:
            yield process, client
        process.wait(60)
        assert not psutil.wait_procs(replicas, timeout=30)[1]
    finally:
        process.kill()  # which ends the replicas too
        process.wait()
        reader.join(30)
        stderr.close()


def complete(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body)


def test_one_of_two_engines_is_killed_and_the_other_serves_until_asked_to_end(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path)
    with serving(folder, "--replicas", "2", "--routing", "round-robin") as (process, client):
        answers = [complete(client) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert {answer.headers["x-replica"] for answer in answers} == {"0", "1"}
        assert answers[0].json()["choices"] == answers[1].json()["choices"]
        cached = complete(client).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached > 0
        metrics = client.get("/metrics").text
        for replica in (0, 1):
            assert re.search(
                rf'vllm:generation_tokens_total\{{replica="{replica}".*\}} (8|16)\.0', metrics
            )

        victim = psutil.Process(process.pid).children()[0]
        victim.kill()
        victim.wait(10)
        for _ in range(4):
            assert complete(client).status_code == 200

        def states() -> list[str]:
            return [r["state"] for r in client.get("/health").json()["replicas"]]

        assert "ready" in states()

        with client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": PROMPT, "max_tokens": 300, "ignore_eos": True, "stream": True},
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert (
            json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
    assert process.returncode == 0
