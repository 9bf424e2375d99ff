"""`autotune serve` that also writes down how long the engine itself took to each first token.

What a client waits beyond that is the server's doing, and the way between. A line of JSON a
request, as it leaves: the beginning of its prompt, which tells it from others, and the seconds.

    python -m benchmarks.timed_server FILE serve MODEL --port 8000
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import engine.server.async_engine
from autotune.cli.main import main
from engine.request import Request
from engine.server.request_metrics import RequestMetrics

NAMED_BY = 4


def named(prompt: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """What tells a request of random tokens from others."""
    return tuple(prompt[:NAMED_BY])


def read_first_tokens(path: Path) -> dict[tuple[int, ...], float]:
    """Seconds from a request's entry into the engine to its first token, by its name."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return {tuple(line["named"]): line["ttft_s"] for line in lines}


class _WrittenDown(RequestMetrics):
    """The server's counts, with a line for each request that leaves."""

    path: Path

    def on_leave(
        self, request: Request, now: float, first_at: float | None, last_at: float | None
    ) -> None:
        """Count the request and write its line."""
        super().on_leave(request, now, first_at, last_at)
        if first_at is not None:
            line = {"named": named(request.token_ids), "ttft_s": first_at - request.arrival}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    _WrittenDown.path = Path(sys.argv.pop(1))
    engine.server.async_engine.RequestMetrics = _WrittenDown  # type: ignore[misc]
    main()
