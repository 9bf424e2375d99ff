"""A Chrome trace of chosen steps, by `torch.profiler`.

Recording slows the steps, so it is done on a load of its own, offered again for the trace alone.
The file opens in Perfetto (https://ui.perfetto.dev) and in chrome://tracing. Each step is a slice
named `step N` that carries its record as arguments.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from autotune.errors import BadInput
from autotune.load.open_loop import LoadTarget, run_load
from autotune.profiling.trace_steps import TraceSteps
from autotune.records import write_atomically
from autotune.workload.materialise import LoadRequest
from engine.output import RequestOutput
from engine.request import Request, SamplingParams
from engine.step_record import StepRecord

_STEP = re.compile(r"step (\d+)")


@dataclass(frozen=True, slots=True)
class Trace:
    """What was recorded: the steps' numbers, and how many events the file holds."""

    path: Path
    steps: list[int]
    events: int


def trace_load(
    engine: LoadTarget,
    requests: Sequence[LoadRequest],
    steps: TraceSteps,
    path: Path,
    *,
    drain_limit: float,
    stop: threading.Event | None = None,
) -> Trace | None:
    """Offer the requests once more and record the chosen steps; the load ends after them.

    None if it was stopped before the first of them.

    Args:
        engine: idle, and stepped by nobody else.
        requests: the load.
        steps: which steps, counted from 0.
        path: of the JSON file.
        drain_limit: seconds after the last arrival at which the load is given up.
        stop: ends the load early when set; what was recorded by then is kept.

    Raises:
        BadInput: the load had fewer steps than `steps.first`.
    """
    _warm_up()
    recorder = _Recorder(engine, steps, stop)
    previous = engine.on_step
    try:
        run_load(recorder, requests, drain_limit=drain_limit, stop=recorder.done)
    finally:
        recorder.end()
        engine.on_step = previous
    if recorder.profiler is None:
        if stop is not None and stop.is_set():
            return None
        raise BadInput(
            f"--trace-steps {steps} begins after the load's last step, {recorder.count - 1}: "
            "choose earlier steps, or a longer load"
            if recorder.count
            else "--trace: the load had no steps"
        )
    return _write(recorder.profiler, recorder.records, path)


class _Recorder:
    """A `LoadTarget` that counts the steps of another and records some of them."""

    def __init__(self, engine: LoadTarget, steps: TraceSteps, stop: threading.Event | None) -> None:
        self.on_step: Callable[[StepRecord], None] | None = None
        self.done = threading.Event()
        self.profiler: profile | None = None
        self.records: dict[int, StepRecord] = {}
        self.count = 0
        self._engine = engine
        self._steps = steps
        self._stop = stop
        self._recording = False
        self._look_at_stop()

    @property
    def has_unfinished(self) -> bool:
        """As the engine's; this is asked all the time, also while nothing is computed."""
        self._look_at_stop()
        return self._engine.has_unfinished

    def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        arrival: float | None = None,
    ) -> Request:
        """As the engine's."""
        return self._engine.add(request_id, token_ids, sampling, arrival=arrival)

    def abort(self, request_id: str) -> None:
        """As the engine's."""
        self._engine.abort(request_id)

    def next_wakeup(self) -> float | None:
        """As the engine's."""
        return self._engine.next_wakeup()

    def step(self) -> list[RequestOutput]:
        """One step of the engine, recorded if it is one of those."""
        self._engine.on_step = self._note
        if self.count in self._steps and self.profiler is None:
            self.profiler = _profiler()
            self.profiler.start()
            self._recording = True
        if not self._recording:
            return self._engine.step()
        with record_function(f"step {self.count}"):
            outputs = self._engine.step()
        if self.count > self._steps.last:
            self.end()
            self.done.set()
        return outputs

    def end(self) -> None:
        """Record no more."""
        if self._recording and self.profiler is not None:
            self._recording = False
            self.profiler.stop()

    def _look_at_stop(self) -> None:
        if self._stop is not None and self._stop.is_set():
            self.done.set()

    def _note(self, record: StepRecord) -> None:
        if self._recording:
            self.records[self.count] = record
        self.count += 1
        if self.on_step is not None:
            self.on_step(record)


def _profiler() -> profile:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, record_shapes=True, acc_events=True)


def _warm_up() -> None:
    """The first recording of a process takes its time to begin, in which requests would pile up."""
    # Else it tells stderr each time that it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _profiler():
        pass


def _write(profiler: profile, records: Mapping[int, StepRecord], path: Path) -> Trace:
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        content = json.loads(raw.read_text(encoding="utf-8", errors="replace"))
    events: list[dict[str, Any]] = content["traceEvents"]
    counters = []
    for event in events:
        named = _STEP.fullmatch(str(event.get("name")))
        # On a GPU the slice is there twice: on the host's track and, annotated, on the device's.
        record = None if named is None else records.get(int(named[1]))
        if record is None:
            continue
        event["args"] = {**event.get("args", {}), **dataclasses.asdict(record)}
        if event.get("cat") == "user_annotation":
            counters.append(_counter(event, record))
    events += counters
    # Compact: such files grow to some hundred megabytes, and are read by programs.
    write_atomically(path, json.dumps(content, separators=(",", ":")).encode())
    return Trace(path, sorted(records), len(events))


def _counter(event: Mapping[str, Any], record: StepRecord) -> dict[str, Any]:
    """A point of a curve that the viewer draws above the slices."""
    return {
        "ph": "C",
        "name": "requests",
        "ts": event["ts"],
        "pid": event["pid"],
        "args": {"running": record.running, "waiting": record.queue_length},
    }
