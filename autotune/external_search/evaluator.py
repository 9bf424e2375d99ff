"""Measures trials on a server that is started with their flags, over HTTP."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.errors import BadInput, EnvironmentMissing, Interrupted
from autotune.external.engine import ExternalEngine
from autotune.external.failures import Failure, LaunchFailed
from autotune.external.table import Value
from autotune.external_search.other_tokens import in_other_tokens
from autotune.external_search.served import (
    Server,
    Start,
    TunedEndpoint,
    failure_soon,
    longest_of,
    values_given,
)
from autotune.external_search.space import FlagConfig
from autotune.load.endpoint import EXTENSIONS, Decoder, Endpoint
from autotune.load.http_load import HttpLoadResult, run_http_load
from autotune.load.open_loop import LoadProgress
from autotune.load.server_watch import ServerWatch
from autotune.measure import at_rate
from autotune.metrics import RESAMPLES, compute_metrics
from autotune.records import RunFolder
from autotune.search.forecast import quantities, worth_of
from autotune.search.messages import (
    Answer,
    CutShort,
    Failed,
    FailureKind,
    MeasureCommand,
    Measured,
    ProbeCommand,
    Progress,
)
from autotune.search.objective import Objective
from autotune.search.windows import WindowReader
from autotune.slo import Slo, parse_slo
from autotune.workload.materialise import LoadRequest

# The first requests of a new server meet what is compiled or allocated at first use.
WARMUP_REQUESTS = 8
# What is told of a load; a short one only compares, so that its figures need no intervals.
FULL = "load"
_WARMUP_LIMIT_S = 120.0
# Engines that keep prompts of another salt apart in their prefix cache.
HEED_SALTS = ("vllm",)
# A short load of fewer requests tells nothing.
_FEWEST_SHORT = 10
# A trial gets no full load if its short one is worse than the best's by this factor: what a short
# load misjudges is far less, and what it costs to be wrong is one trial.
HOPELESS = 1.3
_KINDS: Mapping[str, FailureKind] = {
    "host_memory": "out_of_memory",
    "device_memory": "out_of_memory",
    "bad_flag": "rejected",
    "crash": "crash",
    "timeout": "timeout",
}


@dataclass(frozen=True, slots=True)
class Rival:
    """The best trial so far: its number, and what its short load was worth."""

    trial: int
    worth: float


@dataclass(frozen=True, slots=True)
class Screening:
    """A short load first: the first `seconds` of the window; `rival` None: nothing to compare."""

    seconds: float
    rival: Rival | None


@dataclass(slots=True)
class _Up:
    """The server that runs now, and what it was started with."""

    server: Server
    values: dict[str, Value]


class ExternalEvaluator:
    """A `TrialEvaluator` over servers; trials that differ in request fields alone share one.

    Args:
        folder: the run.
        engine: what is the same for every trial.
        start: starts it with a trial's values.
        objective: what is compared.
        stop: set by Ctrl-C; the measurement under way is dropped and `Interrupted` raised.
        on_progress: told what is going on.
        api_key: sent with requests; never shown.
        tokenizer: counts tokens where the server does not tell them.
        agree: finds out, on the first server, how to talk to it; without it, it understands all.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: ExternalEngine,
        start: Start,
        objective: Objective,
        stop: threading.Event,
        on_progress: Callable[[Progress], None] = lambda _: None,
        *,
        api_key: str | None = None,
        tokenizer: Decoder | None = None,
        agree: Callable[[Server], Endpoint] | None = None,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._start = start
        self._objective = objective
        self._stop = stop
        self._on_progress = on_progress
        self._api_key = api_key
        self._tokenizer = tokenizer
        self._agree = agree
        self._agreed: Endpoint | None = None
        self._windows = WindowReader(folder)
        self._up: _Up | None = None
        self._loads = itertools.count()
        self.screening: Screening | None = None
        """What the next measurements begin with; None: the full load at once."""

    def measure(self, command: MeasureCommand, time_limit: float) -> Answer:
        """Start the server if it must be, offer the load, and compute the metrics.

        Raises:
            Interrupted: `stop` was set.
            EnvironmentMissing: what failed would fail whatever the configuration.
        """
        slo = parse_slo(command.slo)
        values, fields = values_given(
            self._engine, FlagConfig(command.config), longest_of(self._folder)
        )
        requests = at_rate(self._windows.window(command.window), command.rate_factor)
        try:
            server = self._serving(values, fields, requests)
        except LaunchFailed as error:
            return self._failed(error.failure)
        endpoint = self._endpoint(server, fields)
        short: dict[str, Any] | None = None
        if self.screening is not None and command.rate_factor is not None:
            short = self._short_load(endpoint, requests, command, slo, self.screening)
            if short is not None and (failure := failure_soon(server, short["failed"])):
                return self._failed(failure)
            if short is not None and (told := self._hopeless(short, slo, self.screening)):
                return told
        metrics = self._load(endpoint, server, requests, command, slo, FULL, time_limit)
        if (failure := failure_soon(server, metrics["failed"])) is not None:
            return self._failed(failure)
        if not metrics["completed"]:
            return Failed(
                "crash", f"{self._engine.table.title} finished no request: {_why(metrics)}"
            )
        if short is not None:
            metrics["short_load"] = {
                "duration_s": short["duration_s"],
                "requests": short["requests"],
                "worth": self._worth(short, slo),
            }
        return Measured(metrics)

    def probe(self, command: ProbeCommand) -> Failed:
        """Nothing of another engine is probed."""
        asked = ", ".join(command.methods)
        return Failed("rejected", f"{self._engine.table.title} has no probes of {asked}")

    def close(self) -> None:
        """End the server."""
        up, self._up = self._up, None
        if up is not None:
            up.server.stop()

    def __enter__(self) -> ExternalEvaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serving(
        self,
        values: dict[str, Value],
        fields: Mapping[str, Value],
        requests: Sequence[LoadRequest],
    ) -> Server:
        """A server with these values: the one that runs, or a new one, warmed up.

        Raises:
            LaunchFailed: it does not come to serve, or breaks down at its first requests.
        """
        if self._up is not None:
            server = self._up.server
            same = self._up.values == values and server.failure() is None
            if same and self._forgets(server, fields):
                return server
            self.close()
        self._on_progress(Progress("starting"))
        server = self._start(values, self._stop, lambda said: self._on_progress(Progress(said)))
        self._up = _Up(server, values)
        if self._agreed is None and self._agree is not None:
            self._on_progress(Progress("asking the server how to talk to it"))
            try:
                self._agreed = self._agree(server)
            except (BadInput, EnvironmentMissing):
                # If its process has ended the configuration failed, and the next may not.
                if (failure := failure_soon(server, 1)) is None:
                    raise
                raise LaunchFailed(failure) from None
        self._on_progress(Progress("warm-up"))
        burst = at_rate(requests[:WARMUP_REQUESTS], None)
        warmed = self._offer(self._endpoint(server, {}), burst, None, _WARMUP_LIMIT_S)
        broken = sum(record.outcome == "failed" for record in warmed.records)
        if (failure := failure_soon(server, broken)) is not None:
            raise LaunchFailed(failure)
        server.reset_cache()
        return server

    def _forgets(self, server: Server, fields: Mapping[str, Value]) -> bool:
        """Whether a load finds nothing in the cache of an equal one before it.

        Servers that do not know a salt may take and ignore it.
        """
        prefix_caching = self._engine.table.same_as("enable_prefix_caching")
        if prefix_caching is not None and fields.get(prefix_caching) is False:
            return True
        if server.reset_cache():
            return True
        heeded = self._engine.table.engine in HEED_SALTS
        return heeded and (self._agreed is None or "cache_salt" in self._agreed.extensions)

    def _endpoint(self, server: Server, fields: Mapping[str, Value]) -> TunedEndpoint:
        table = self._engine.table
        named = {table.knobs[n].request_field or n: value for n, value in fields.items()}
        return TunedEndpoint(
            url=server.url,
            model=server.model,
            api_key=self._api_key,
            prompts="token_ids" if self._agreed is None else self._agreed.prompts,
            extensions=EXTENSIONS if self._agreed is None else self._agreed.extensions,
            tokenizer=self._tokenizer,
            # Another word in each process: a server that outlives us knows our earlier loads.
            cache_salt=f"{os.getpid()}-{next(self._loads)}",
            fields=named,
        )

    def _short_load(
        self,
        endpoint: TunedEndpoint,
        requests: Sequence[LoadRequest],
        command: MeasureCommand,
        slo: Slo,
        screening: Screening,
    ) -> dict[str, Any] | None:
        """The metrics of the window's beginning; None where it has too few requests.

        Its tokens are others, so that the full load finds nothing of it in the cache.
        """
        first = [r for r in requests if r.arrival_s <= screening.seconds]
        if len(first) < _FEWEST_SHORT or len(first) == len(requests):
            return None
        assert self._up is not None
        metrics = self._load(
            endpoint, self._up.server, in_other_tokens(first), command, slo, "short load"
        )
        self._up.server.reset_cache()
        return {**metrics, "requests": len(first)}

    def _load(
        self,
        endpoint: TunedEndpoint,
        server: Server,
        requests: Sequence[LoadRequest],
        command: MeasureCommand,
        slo: Slo,
        phase: str,
        time_limit: float | None = None,
    ) -> dict[str, Any]:
        watch = ServerWatch(server.metrics_url, self._api_key)
        salt = f"{endpoint.cache_salt}-{phase.replace(' ', '-')}"
        salted = dataclasses.replace(endpoint, cache_salt=salt)
        with watch:
            result = self._offer(salted, requests, slo, command.drain_limit, phase, time_limit)
        seen = watch.figures()
        engine, notes = dict(seen.engine), list(result.notes)
        if engine["prefix_hit_rate"] is None:
            engine["prefix_hit_rate"] = result.cached_share
        if seen.problem is not None:
            notes.insert(0, f"what the engine did is not known in full: {seen.problem}")
        metrics = compute_metrics(
            result.records,
            slo,
            duration=result.duration,
            config=command.config,
            load_delivered=result.delivered,
            load_note=result.note,
            engine=engine,
            speculation=seen.speculation,
            seed=command.seed,
            resamples=RESAMPLES if phase == FULL else 0,
        )
        metrics["server"] = {
            "started_in_s": server.started_in_s,
            "facts": dict(server.facts),
            "notes": notes,
        }
        self._folder.write_part(command.trial, result.records, [])
        return metrics

    def _offer(
        self,
        endpoint: TunedEndpoint,
        requests: Sequence[LoadRequest],
        slo: Slo | None,
        drain_limit: float,
        phase: str | None = None,
        time_limit: float | None = None,
    ) -> HttpLoadResult:
        def tell(done: LoadProgress) -> None:
            if phase is not None:
                self._on_progress(Progress(phase, done.left, done.total))

        result = run_http_load(
            endpoint,
            requests,
            slo=slo,
            time_limit=time_limit,
            drain_limit=drain_limit,
            on_progress=tell,
            stop=self._stop,
        )
        if self._stop.is_set() or result.interrupted:
            self.close()
            raise Interrupted("stopped; what was measured is kept")
        return result

    def _hopeless(self, short: dict[str, Any], slo: Slo, screening: Screening) -> CutShort | None:
        """What is told if a short load is enough; None if the full one is worth its time."""
        rival = screening.rival
        if rival is None:
            return None
        behind = rival.worth - self._worth(short, slo)
        if behind <= math.log(HOPELESS):
            return None
        # As far behind as if it had had the full load.
        short["short_load"] = {
            "requests": short["requests"],
            "expected_worth": rival.worth - behind,
        }
        by = f"{math.exp(min(behind, 7.0)):.3g} times"
        return CutShort(
            short,
            f"no full load: in the first {screening.seconds:.0f} s it was {by} worse than trial "
            f"{rival.trial} in its own, missed limits counted",
        )

    def _worth(self, metrics: Mapping[str, Any], slo: Slo) -> float:
        # With the least value that JSON can hold in place of minus infinity.
        values = quantities(metrics, slo, self._objective)
        return max(-1e9, worth_of(values, slo, self._objective))

    def _failed(self, failure: Failure) -> Failed:
        """The failure as an answer; the server is gone.

        Raises:
            EnvironmentMissing: it has nothing to do with the configuration.
        """
        self.close()
        kind = _KINDS.get(failure.kind)
        if kind is None:
            raise EnvironmentMissing(
                f"{failure.reason}; what was measured is kept: put that right and go on with "
                f"autotune run --resume {self._folder.path}"
            )
        return Failed(kind, failure.reason)


def _why(metrics: Mapping[str, Any]) -> str:
    notes = metrics["server"]["notes"]
    return str(notes[-1]) if notes else "none was whole in time"
