"""A load replayed by guidellm, and what it measured by our names.

Its inter-token latency of a request is our TPOT; its `time_per_output_token` includes the time to
the first token and has no counterpart here; gaps between chunks it does not tell. Prompts are texts
of as many tokens as were asked for, so that their number differs a little at the server.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_FIELDS = {
    "ttft": ("time_to_first_token_ms", 1e3),
    "tpot": ("inter_token_latency_ms", 1e3),
    "e2e": ("request_latency", 1.0),
}


class TracedLoad(Protocol):
    """What is replayed; limits of goodput in milliseconds."""

    @property
    def rows(self) -> Sequence[tuple[float, int, int]]:
        """Arrival in seconds, tokens of prompt and answer."""
        ...

    @property
    def ttft_ms(self) -> float:
        """Limit of the time to the first token."""
        ...

    @property
    def tpot_ms(self) -> float:
        """Limit of the time per further token."""
        ...


def run_guidellm(
    program: Path,
    run_tool: Callable[[Sequence[str]], str],
    url: str,
    model: str,
    tokenizer: str,
    load: TracedLoad,
) -> dict[str, float | None]:
    """Replay the load and read the requests that it kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace, result = folder / "trace.jsonl", folder / "result.json"
        trace.write_text(
            "".join(
                json.dumps({"timestamp": at, "input_length": i, "output_length": o}) + "\n"
                for at, i, o in load.rows
            )
        )
        backend = {
            "kind": "openai_http",
            "target": url,
            "model": model,
            "request_format": "/v1/completions",
        }
        source = {"kind": "json_file", "path": str(trace)}
        run_tool(
            [
                *(str(program), "run", "--backend", json.dumps(backend)),
                *("--profile", "kind=replay,schedule_turn=timestamp"),
                *("--tokenizer", json.dumps({"kind": "hf_auto", "model": tokenizer})),
                *("--data", json.dumps({"kind": "trace_synthetic", "source": source})),
                *("--output", f"kind=json,path={result}", "--disable-console"),
            ]
        )
        return _read(json.loads(result.read_text())["benchmarks"][0], load)


def _read(benchmark: dict[str, Any], load: TracedLoad) -> dict[str, float | None]:
    requests = benchmark["requests"]["successful"]
    # From the first request's start to the last one's end, as here.
    duration = benchmark["duration"]
    found: dict[str, float | None] = {}
    values: dict[str, Any] = {}
    for latency, (field, scale) in _FIELDS.items():
        told = [r[field] for r in requests]
        values[latency] = np.array([np.nan if v is None else v / scale for v in told])
        found[f"{latency}_mean"] = float(np.nanmean(values[latency]))
        for statistic in (50, 95, 99):
            found[f"{latency}_p{statistic}"] = float(np.nanpercentile(values[latency], statistic))
    # A single token has no TPOT, which no limit forbids.
    tpot = np.nan_to_num(values["tpot"], nan=0.0)
    good = (values["ttft"] <= load.ttft_ms / 1e3) & (tpot <= load.tpot_ms / 1e3)
    found["completed"] = len(requests)
    found["requests_per_s"] = len(requests) / duration
    found["output_tokens_per_s"] = sum(r["output_tokens"] for r in requests) / duration
    found["goodput_requests_per_s"] = float(good.sum()) / duration
    return found
