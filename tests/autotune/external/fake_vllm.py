"""A program that takes vLLM's flags, serves its API, and fails as told; standard library only.

`install(folder)` writes a `vllm` that runs this file. What it does beyond serving is told by the
environment variable FAKE_VLLM, a JSON object:

  version     what --version prints; 0.32.0+cpu
  start_s     seconds from the start until it is healthy; 0
  token_s     seconds of one token; 0.001
  mode        how it goes wrong: see `_go_wrong`
  when        {flag: {value: mode}}: goes wrong so where the flag has the value
  workers     starts a worker that renames itself and one in a session of its own, both deaf to
              SIGTERM
  deaf        is itself deaf to SIGTERM
  key         what it wants of those who ask for anything below /v1
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def install(folder: Path) -> Path:
    """An executable `vllm` in the folder that runs this file."""
    program = folder / "vllm"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).resolve()} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vllm serve", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default=None)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--long-prefill-token-threshold", type=int, default=0)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 28)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--watermark", type=float, default=0.0)
    parser.add_argument("--speculative-config", type=json.loads, default=None)
    for name in ("enable-prefix-caching", "enable-chunked-prefill", "enforce-eager"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None)
    return parser


def _log(text: str) -> None:
    sys.stderr.write(f"INFO 01-01 00:00:00 [fake.py:1] {text}\n")
    sys.stderr.flush()


def _go_wrong(mode: str) -> None:
    """Fail at the start, as vLLM does; modes of a server that runs are not handled here."""
    if mode == "device_memory":
        _log("ValueError: No available memory for the cache blocks. Try increasing it.")
        sys.exit(1)
    if mode == "host_memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "value":
        _log("ValueError: block_size 7 must suit the attention backend.")
        sys.exit(1)
    if mode == "crash":
        _log("RuntimeError: something inside broke")
        sys.exit(3)
    if mode == "port":
        _log("OSError: [Errno 98] error while attempting to bind: address already in use")
        sys.exit(1)


class _State:
    def __init__(self, arguments: argparse.Namespace, fake: dict[str, Any]) -> None:
        self.arguments, self.fake = arguments, fake
        self.name = arguments.served_model_name or arguments.model
        self.seats = threading.Semaphore(arguments.max_num_seqs)
        self.lock = threading.Lock()
        self.healthy_at = time.monotonic() + float(fake.get("start_s", 0.0))
        self.running = self.waiting = 0
        self.finished = self.prompt_tokens = self.generation_tokens = 0
        self.resets = 0
        self.ttft: list[float] = []

    def page(self) -> str:
        """The metrics page."""
        label = f'{{engine="0",model_name="{self.name}"}}'
        lines = []
        for name, value in (
            ("num_requests_running", self.running),
            ("num_requests_waiting", self.waiting),
            ("prompt_tokens_total", self.prompt_tokens),
            ("generation_tokens_total", self.generation_tokens),
            ("num_preemptions_total", 0),
            ("kv_cache_usage_perc", 0.25),
        ):
            lines.append(f"vllm:{name}{label} {value}")
        lines.append(
            f'vllm:request_success_total{{engine="0",finished_reason="length"}} {self.finished}'
        )
        with self.lock:
            seen = list(self.ttft)
        for bound in (*TTFT_BUCKETS, float("inf")):
            count = sum(value <= bound for value in seen)
            end = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f'vllm:time_to_first_token_seconds_bucket{{le="{end}"}} {count}')
        lines.append(f"vllm:time_to_first_token_seconds_count {len(seen)}")
        lines.append(f"vllm:time_to_first_token_seconds_sum {sum(seen)}")
        return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: _State

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _is_known(self) -> bool:
        key = self.state.fake.get("key")
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def do_GET(self) -> None:
        state, mode = self.state, self.state.fake.get("mode")
        if self.path.startswith("/v1") and not self._is_known():
            self._send(401, b"")
        elif self.path == "/health":
            ready = time.monotonic() >= state.healthy_at
            self._send(200 if ready else 503, b"")
        elif self.path == "/v1/models":
            if mode == "garbage":
                self._send(200, b"<html>hello</html>")
                return
            card = {"id": state.name, "object": "model", "max_model_len": 4096}
            self._json({"object": "list", "data": [card]})
        elif self.path == "/metrics":
            self._send(200, state.page().encode(), "text/plain")
        elif self.path == "/pid":
            self._json({"pid": os.getpid(), "resets": state.resets})
        else:
            self._send(404, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/v1") and not self._is_known():
            self._send(401, b"")
        elif self.path == "/reset_prefix_cache" and os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            self.state.resets += 1
            self._send(200, b"")
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            self._complete(json.loads(body))
        else:
            self._send(404, b"")

    def _complete(self, request: dict[str, Any]) -> None:
        state = self.state
        if state.fake.get("mode") == "die_on_request":
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        prompt = request.get("prompt", "")
        given = len(prompt) if isinstance(prompt, list) else len(str(prompt).split())
        wanted = int(request.get("max_tokens") or request.get("max_completion_tokens") or 16)
        token_s = float(state.fake.get("token_s", 0.001))
        with state.lock:
            state.waiting += 1
        with state.seats:
            with state.lock:
                state.waiting -= 1
                state.running += 1
            try:
                if request.get("stream"):
                    self._stream(request, given, wanted, token_s, began)
                else:
                    time.sleep(token_s * wanted)
                    self._json(self._chunk(request, " a" * wanted, given, wanted, "length"))
            except OSError:
                self.close_connection = True
            finally:
                with state.lock:
                    state.running -= 1
                    state.finished += 1
                    state.prompt_tokens += given

    def _stream(
        self, request: dict[str, Any], given: int, wanted: int, token_s: float, began: float
    ) -> None:
        state = self.state
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for index in range(wanted):
            time.sleep(token_s)
            if index == 0:
                with state.lock:
                    state.ttft.append(time.monotonic() - began)
            done = "length" if index == wanted - 1 else None
            if state.fake.get("mode") == "garbage_stream":
                self.wfile.write(b"data: {not json\n\n")
            else:
                chunk = self._chunk(request, " a", given, index + 1, done)
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            with state.lock:
                state.generation_tokens += 1
        if (request.get("stream_options") or {}).get("include_usage"):
            chunk = self._chunk(request, None, given, wanted, None)
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(
        self, request: dict[str, Any], text: str | None, given: int, made: int, reason: str | None
    ) -> dict[str, Any]:
        chat = self.path.endswith("chat/completions")
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if chat:
            choice["delta" if request.get("stream") else "message"] = {"content": text}
        else:
            choice["text"] = text
        options = request.get("stream_options") or {}
        usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        told = text is None or not request.get("stream") or options.get("continuous_usage_stats")
        return {
            "id": "cmpl-fake",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 0,
            "model": self.state.name,
            "choices": [] if text is None else [choice],
            "usage": usage if told else None,
        }

    def _json(self, content: dict[str, Any]) -> None:
        self._send(200, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def main() -> None:
    """Be vLLM."""
    fake: dict[str, Any] = json.loads(os.environ.get("FAKE_VLLM", "{}"))
    if sys.argv[1:] == ["--version"]:
        print(fake.get("version", "0.32.0+cpu"))
        return
    assert sys.argv[1] == "serve", sys.argv
    if sys.argv[2:] == ["--help=all"]:
        _parser().print_help()
        return
    arguments = _parser().parse_args(sys.argv[2:])
    for flag, modes in fake.get("when", {}).items():
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        fake["mode"] = modes.get(str(value), fake.get("mode"))
    if arguments.max_num_batched_tokens < arguments.max_num_seqs:
        fake["mode"] = "value"
    if fake.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _log("Starting to load model fake...")
    if fake.get("workers"):
        deaf = "trap '' TERM INT HUP; exec sleep 300"
        for apart in (False, True):
            subprocess.Popen(
                ["VLLM::Worker", "-c", deaf], executable="/bin/sh", start_new_session=apart
            )
        # Its parent ends at once: nothing but descent from the keeper tells whose it is.
        subprocess.run(["/bin/sh", "-c", f'setsid sh -c "{deaf}" &'], check=True)
    _go_wrong(str(fake.get("mode")))
    _Handler.state = _State(arguments, fake)
    server = _Server((arguments.host, arguments.port), _Handler)
    _log("CPU KV cache size: 93,184 tokens, Maximum concurrency for 4,096 tokens: 22.75x")
    _log("Application startup complete.")
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
