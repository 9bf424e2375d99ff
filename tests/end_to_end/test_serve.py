"""`autotune serve` as a user and a supervisor run it: healthy soon, and ended by a signal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

from tests.end_to_end.conftest import ENTRY, ENVIRONMENT


@contextmanager
def serving(
    folder: Path, *arguments: str
) -> Iterator[tuple[int, subprocess.Popen[str], list[str]]]:
    """A server's port, its process, and what it has said on stderr so far."""
    process = subprocess.Popen(
        [*ENTRY, "serve", "--port", "0", "--num-threads", "1", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    assert process.stderr is not None
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError(f"the server ended: {said}")
        rest = threading.Thread(target=lambda: said.extend(process.stderr or ()))
        rest.start()
        yield int(found.group(1)), process, said
    finally:
        process.kill()
        process.wait(30)
        rest.join(30)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def begin_stream(port: int, max_tokens: int) -> tuple[HTTPConnection, HTTPResponse]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        "prompt": "def test_",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


def status_of(port: int, path: str) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_server_finishes_what_runs_when_it_is_asked_to_end(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-num-seqs", "4") as (port, process, said):
        assert status_of(port, "/health") == 200
        connection, response = begin_stream(port, 500)
        first = response.readline()
        process.send_signal(signal.SIGTERM)
        while not any("SIGTERM" in line for line in said):
            time.sleep(0.01)
        assert status_of(port, "/health") == 503
        lines = [first, *response]
        connection.close()
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert "finishing 1 request," in said[-1]
    events = [line for line in lines if line.strip()]
    assert events[-1] == b"data: [DONE]\n"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    tokens = [t for chunk in chunks for t in chunk["choices"][0]["token_ids"]]
    assert len(tokens) == 500
