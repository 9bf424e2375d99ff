"""A workload on a running server, over HTTP: what `autotune bench --url` calls."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from autotune.calibration import (
    CALIBRATION_LIMIT_S,
    CALIBRATION_REQUESTS,
    offered_rate,
    sustained_rate,
)
from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.hardware.versions import library_versions
from autotune.load.discover import Server, answers, discover
from autotune.load.endpoint import PromptForm
from autotune.load.http_load import HttpLoadResult, run_http_load
from autotune.load.open_loop import LoadProgress
from autotune.load.server_watch import ServerFigures, ServerWatch
from autotune.metrics import compute_metrics
from autotune.profiling.evidence import synthetic_prompts
from autotune.profiling.prometheus_scrape import metrics_url
from autotune.records import SCHEMA_VERSION, LimitResult, RequestRecord, RunFolder, utc_now
from autotune.search.windows import write_windows
from autotune.slo import Slo, parse_slo
from autotune.traffic import Traffic, fit_traffic
from autotune.traffic_options import PRESET_CONTEXT, TrafficOptions
from autotune.workload.materialise import LoadRequest
from engine.tokenizer import load_tokenizer

WARMUP_REQUESTS = 4
# A share of prompts found in the prefix cache that the workload's own prefixes do not explain.
_UNEXPLAINED_HITS = 0.05
# Texts are tokenised anew by the server, which may need more tokens than they were made of.
_ROOM_FOR_TEXTS = 0.9


@dataclass(frozen=True, slots=True)
class ServerBenchOutcome:
    """What one bench of a server measured; `requests` is what was offered.

    `lost` says that the server stopped answering during the load; None if it did not.
    """

    server: dict[str, Any]
    workload: dict[str, Any]
    metrics: dict[str, Any]
    records: list[RequestRecord]
    slo_text: str
    slo: list[LimitResult]
    notes: list[str]
    requests: list[LoadRequest]
    seed: int
    lost: str | None = None

    @property
    def slo_met(self) -> bool:
        """Whether every limit is met and the load was delivered as asked."""
        return all(limit.met for limit in self.slo) and self.metrics["load_delivered"]


def bench_server(
    url: str,
    traffic: TrafficOptions,
    *,
    slo: str,
    drain_limit: float,
    seed: int = 0,
    served_model: str | None = None,
    api_key: str | None = None,
    prompts: PromptForm | None = None,
    tokenizer: str | None = None,
    max_model_len: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> ServerBenchOutcome:
    """Offer a workload to a server, and measure as `bench` does in process.

    Args:
        url: its address.
        traffic: the workload; `duration_s` must be set.
        slo: limits that goodput is counted by; none on quality.
        drain_limit: seconds after the last arrival at which unfinished requests are given up.
        seed: of everything drawn.
        served_model: the model's name there; needed where it serves several.
        api_key: sent as a bearer token.
        prompts: token ids, texts or chats; None sends ids where they are taken.
        tokenizer: folder of the model's tokenizer; see `discover` for what is done without.
        max_model_len: most tokens of a prompt and its answer; None is what the server says.
        say: told what is going on, for a progress line.
        stop: set it to end the load early.

    Raises:
        BadInput: bad traffic, SLO, address, key or model.
        EnvironmentMissing: the server cannot be reached or does not work.
        Interrupted: `stop` was set before the load began.
        engine.errors.ModelError: the tokenizer cannot be used.
    """
    parsed = parse_slo(slo)
    if parsed.needs_quality:
        raise BadInput(f"a server's quality cannot be measured over HTTP: drop {parsed.guard}")
    server = discover(
        url,
        model=served_model,
        api_key=api_key,
        prompts=prompts,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        say=say,
        stop=stop,
    )
    notes = list(server.notes)
    limit, note = _context(server, max_model_len)
    notes += note
    source = _traffic(server, limit, traffic, seed)
    # Whatever was sent before, to this server or by this function, is in nobody's prefix cache.
    endpoint = server.endpoint.with_salt(secrets.token_hex(8))
    server = dataclasses.replace(server, endpoint=endpoint)
    say("warming up")
    _warm_up(server, source, seed, stop)
    rate = traffic.rate
    if traffic.rate_is_measured:
        say("calibrating: all requests at once")
        rate, text = offered_rate(traffic, _sustained(server, source, seed, stop), "the server")
        notes.append(text)
    assert traffic.duration_s is not None
    offered = source.windows(rate, traffic.duration_s, count=1)
    notes += offered.notes
    requests = offered.windows[0]
    # Metrics are at a server's root, whatever path stands before its /v1.
    host = urlsplit(endpoint.url)
    with ServerWatch(metrics_url(f"{host.scheme}://{host.netloc}"), api_key) as watch:
        load = run_http_load(
            endpoint,
            requests,
            slo=parsed,
            drain_limit=drain_limit,
            on_progress=lambda done: say(_progress(done)),
            stop=stop,
        )
    figures = watch.figures()
    notes += load.notes + _notes(load, figures, offered.description)
    described = {
        "url": endpoint.url,
        "served_model": endpoint.model,
        "server": server.software,
        "prompts": endpoint.prompts,
        "max_model_len": limit,
    }
    metrics = _metrics(load, parsed, described, figures, seed)
    return ServerBenchOutcome(
        server=described,
        workload=offered.description,
        metrics=metrics,
        records=load.records,
        slo_text=str(parsed),
        slo=parsed.evaluate(metrics),
        notes=notes,
        requests=requests,
        seed=seed,
        lost=_lost(server, load),
    )


def save_server_bench(outcome: ServerBenchOutcome, path: Path, command: Sequence[str]) -> None:
    """Write `run.json`, `bench.json`, the records and what was offered into the folder."""
    folder = RunFolder(path)
    folder.write_part(0, outcome.records, [])
    folder.merge_parts()
    write_windows(folder, [outcome.requests])
    folder.write_json(path / "bench.json", outcome.metrics)
    folder.write_json(
        folder.run_json,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "bench",
            "command": list(command),
            "started_at": utc_now(),
            "status": "done",
            "model": {"name": outcome.server["served_model"], "path": outcome.server["url"]},
            "server": outcome.server,
            "engine_config": {},
            "workload": outcome.workload,
            "slo": outcome.slo_text,
            "hardware": {},
            "versions": library_versions(),
            "seeds": {"seed": outcome.seed},
            "notes": outcome.notes,
        },
    )


@dataclass(frozen=True, slots=True)
class _Limits:
    vocab_size: int
    max_model_len: int


def _context(server: Server, given: int | None) -> tuple[int, list[str]]:
    """Most tokens of a prompt and its answer."""
    told = server.max_model_len
    if given is not None:
        if told is not None and given > told:
            raise BadInput(f"--max-model-len {given} is above the {told} that the server tells")
        return given, []
    if told is None:
        return PRESET_CONTEXT, [
            f"the server does not tell its context length: {PRESET_CONTEXT} tokens were assumed; "
            "--max-model-len says otherwise"
        ]
    if server.endpoint.prompts == "token_ids":
        return told, []
    return max(2, int(_ROOM_FOR_TEXTS * told)), []


def _traffic(server: Server, limit: int, options: TrafficOptions, seed: int) -> Traffic:
    size = server.vocabulary[-1] + 1
    special = frozenset(range(size)).difference(server.vocabulary)
    return fit_traffic(options, _Limits(size, limit), server.tokenizer, special, seed)


def _strangers(requests: Sequence[LoadRequest], server: Server, seed: int) -> list[LoadRequest]:
    """The same requests with other prompts of the same lengths.

    A server keeps the prefixes of what it was asked before: the load would find its own prompts.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    vocabulary = np.asarray(server.vocabulary)
    return [
        dataclasses.replace(r, token_ids=tuple(rng.choice(vocabulary, len(r.token_ids)).tolist()))
        for r in requests
    ]


def _warm_up(server: Server, source: Traffic, seed: int, stop: threading.Event | None) -> None:
    requests = _strangers(source.burst(WARMUP_REQUESTS), server, seed)
    load = run_http_load(server.endpoint, requests, drain_limit=CALIBRATION_LIMIT_S, stop=stop)
    _go_on_unless(stop)
    if not any(record.completed for record in load.records):
        raise EnvironmentMissing(
            f"{server.endpoint.url} completed none of {len(requests)} requests before the load: "
            f"{load.records[0].reason}"
        )


def _sustained(server: Server, source: Traffic, seed: int, stop: threading.Event | None) -> float:
    """Requests per second that the server finishes when all come at once."""
    requests = _strangers(source.burst(CALIBRATION_REQUESTS), server, seed + 1)
    load = run_http_load(server.endpoint, requests, drain_limit=CALIBRATION_LIMIT_S, stop=stop)
    _go_on_unless(stop)
    sustained = sustained_rate(load.records, load.duration)
    if not sustained:
        raise BadInput(
            f"no request of the calibration finished within {CALIBRATION_LIMIT_S:.0f} s: give "
            "--rate, or shorter lengths (--scale-lengths)"
        )
    return sustained


def _metrics(
    load: HttpLoadResult,
    slo: Slo,
    described: dict[str, Any],
    figures: ServerFigures,
    seed: int,
) -> dict[str, Any]:
    return compute_metrics(
        load.records,
        slo,
        duration=load.duration,
        config=described,
        load_delivered=load.delivered,
        load_note=load.note,
        seed=seed,
        engine=figures.engine,
        speculation=figures.speculation,
    )


def _notes(load: HttpLoadResult, figures: ServerFigures, workload: dict[str, Any]) -> list[str]:
    notes = []
    if figures.problem is not None:
        notes.append(f"what the engine did is not known in full: {figures.problem}")
    hits = load.cached_share if load.cached_share is not None else figures.engine["prefix_hit_rate"]
    own = workload["prefix_share"]
    # Prefixes of recorded prompts are not counted.
    if hits is not None and hits > own + _UNEXPLAINED_HITS and synthetic_prompts(workload):
        notes.append(
            f"the server found {hits:.0%} of the prompts' tokens in its prefix cache, the "
            f"workload's own prefixes are {own:.0%}: it may have had them "
            "from an earlier load; another --seed, or a restart, makes it begin anew"
        )
    return notes


def _lost(server: Server, load: HttpLoadResult) -> str | None:
    """That the server is gone, if it is."""
    broken = [r for r in load.records if r.outcome == "failed"]
    if load.interrupted or not broken or answers(server.endpoint.url, server.endpoint.api_key):
        return None
    return (
        f"{server.endpoint.url} stopped answering during the load: {len(broken)} of "
        f"{len(load.records)} requests failed; what it measured before is shown"
    )


def _progress(done: LoadProgress) -> str:
    return f"measuring: {done.left}/{done.total} requests"


def _go_on_unless(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Interrupted("Interrupted before anything was measured.")
