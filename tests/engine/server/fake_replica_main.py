"""A replica's process without an engine, quick to start: what it does is its config's `do`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingMixIn, UnixStreamServer

ARGUMENTS = json.loads(sys.stdin.buffer.readline())
DO = ARGUMENTS["config"]["do"]
sick = threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(503 if sick.is_set() else 200, "{}")
        elif self.path == "/metrics":
            self.answer(200, 'vllm:cache_config_info{block_size="16",num_gpu_blocks="10"} 1\n')
        elif self.path == "/sick":
            sick.set()
            self.answer(200, "{}")
        elif self.path == "/slow":
            time.sleep(0.5)
            self.answer(200, json.dumps(os.getpid()))
        else:
            self.answer(200, json.dumps(os.getpid()))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def address_string(self) -> str:
        return "router"

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True


def main() -> None:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    if DO == "refuse":
        print(json.dumps({"error": "ConfigError", "message": "max_num_seqs=0 is too few"}))
        sys.exit(2)
    if DO == "crash":
        print("some words", file=sys.stderr)
        print("the last words", file=sys.stderr)
        sys.exit(7)
    if DO == "never":
        time.sleep(3600)
    if DO == "talk":
        print("x" * (1 << 20), flush=True)
        print("y" * (1 << 20), file=sys.stderr, flush=True)
    if DO == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("here I am", file=sys.stderr, flush=True)
    Server(ARGUMENTS["uds"], Handler).serve_forever(poll_interval=0.05)


main()
