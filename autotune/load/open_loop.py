"""Open-loop load: arrivals never wait for completions.

A sender thread hands each request over at its intended time; this thread steps the engine and
stamps tokens as they come out. TTFT counts from the intended send, so a late generator can make a
result worse but never better ("coordinated omission"), and a load that could not be delivered is
said to be so.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autotune.load.quiet import quiet_interpreter
from autotune.load.sender import Sender, in_order, judge_delivery
from autotune.records import Outcome, RequestRecord
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.output import RequestOutput
from engine.request import FinishReason, Request, SamplingParams
from engine.step_record import StepRecord

# Sent a little after the threads are up, so that the first requests are not late.
_LEAD_S = 0.02
# How often a sleeping loop looks at the stop event, and how often progress is told.
POLL_S = 0.05
PROGRESS_S = 0.2
GREEDY = SamplingParams(temperature=0.0)


class LoadTarget(Protocol):
    """What a load needs of an engine; `engine.engine.Engine` is one."""

    on_step: Callable[[StepRecord], None] | None

    @property
    def has_unfinished(self) -> bool:
        """Whether a further step is needed."""
        ...

    def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        arrival: float | None = None,
    ) -> Request:
        """Take in a request; called from the sender's thread."""
        ...

    def abort(self, request_id: str) -> None:
        """Let the next step take a request out."""
        ...

    def next_wakeup(self) -> float | None:
        """When the next step has something to do; None: on an add."""
        ...

    def step(self) -> list[RequestOutput]:
        """Compute one batch."""
        ...


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is: requests sent, left and in all, and seconds since it began."""

    sent: int
    left: int
    total: int
    elapsed: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a load measured; times are seconds since it began.

    Each request that was sent has one record, in the order of the intended sends. `delivered` is
    false if sends were later than `judge_delivery` allows, or if not all were made; `note` says
    what happened. `interrupted` tells that it was stopped from outside.
    """

    records: list[RequestRecord]
    steps: list[StepRecord]
    duration: float
    delivered: bool
    note: str | None
    interrupted: bool = False


@dataclass(slots=True)
class _InFlight:
    request: LoadRequest
    token_times: list[float] = field(default_factory=list)
    last: Request | None = None
    reason: str | None = None
    outcome: Outcome | None = None


def run_load(
    engine: LoadTarget,
    requests: Sequence[LoadRequest],
    *,
    slo: Slo | None = None,
    time_limit: float | None = None,
    drain_limit: float = 60.0,
    on_progress: Callable[[LoadProgress], None] | None = None,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sampling: SamplingParams = GREEDY,
) -> LoadResult:
    """Send the requests at their times, step the engine until all have left, and report.

    Every output has the length that its request asks for: end tokens are ignored.

    Args:
        engine: idle, and stepped by nobody else meanwhile; its `on_step` is taken over and given
            back.
        requests: what to send, in any order; ids must differ.
        slo: tells how late a send may be (`judge_delivery`).
        time_limit: seconds after which nothing more is sent.
        drain_limit: requests unfinished so many seconds after the last arrival are aborted and
            recorded as timed out.
        on_progress: called from this thread now and then.
        stop: ends the load early when set; Ctrl-C does the same. What was measured is returned.
        clock: the engine's clock, in seconds.
        sampling: how tokens are chosen; its lengths and end tokens are replaced.

    Raises:
        ValueError: two requests have one id.
        Exception: whatever a step raised; the engine is left without requests.
    """
    ordered = in_order(requests)
    previous = engine.on_step
    try:
        with quiet_interpreter():
            load = _Load(
                engine, ordered, clock, drain_limit, stop, on_progress, sampling, time_limit
            )
            engine.on_step = load.steps.append
            load.run()
    finally:
        engine.on_step = previous
    return load.result(slo)


class _Load:
    """One load while it runs."""

    def __init__(
        self,
        engine: LoadTarget,
        requests: Sequence[LoadRequest],
        clock: Callable[[], float],
        drain_limit: float,
        stop: threading.Event | None,
        on_progress: Callable[[LoadProgress], None] | None,
        sampling: SamplingParams,
        time_limit: float | None,
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.clock = clock
        self.drain_limit = drain_limit
        self.stop = stop
        self.on_progress = on_progress
        self.steps: list[StepRecord] = []
        self.interrupted = False
        self.ended_at = 0.0
        self.in_flight = {request.request_id: _InFlight(request) for request in requests}
        self.left = 0
        # Made before the load: making thousands of them while sending would delay the sends.
        self.sampling = {
            length: dataclasses.replace(
                sampling, max_tokens=length, min_tokens=0, ignore_eos=True, stop=()
            )
            for length in {request.output_tokens for request in requests}
        }
        self.wake = threading.Event()
        self.start = clock() + _LEAD_S
        self.sender = Sender(requests, self._add, self.start, clock, self.wake, time_limit)
        self.next_progress = self.start

    def run(self) -> None:
        """Send, step and stamp until the last request has left."""
        self.sender.start()
        try:
            self._serve()
            if not self.interrupted:
                self._abort_rest(
                    "timed_out",
                    f"not finished {self.drain_limit:g} s after the last arrival",
                )
        except KeyboardInterrupt:
            self.interrupted = True
        except BaseException:
            self.sender.cancel()
            self._leave_engine_empty()
            raise
        if self.interrupted:
            self.sender.cancel()
            self._abort_rest("failed", "the load was interrupted")
        self.sender.cancel()
        self.ended_at = self.clock()
        if self.sender.error is not None:
            raise self.sender.error

    def result(self, slo: Slo | None) -> LoadResult:
        """The records, with times relative to the load's beginning."""
        sends = [send - self.start for send in self.sender.sends]
        intended = [request.arrival_s for request in self.requests]
        step_s = statistics.median(step.seconds for step in self.steps) if self.steps else 0.0
        delivered, note = judge_delivery(intended, sends, slo, step_s, interrupted=self.interrupted)
        return LoadResult(
            records=[
                self._record(request, send)
                for request, send in zip(self.requests, sends, strict=False)
            ],
            steps=[dataclasses.replace(s, start=s.start - self.start) for s in self.steps],
            duration=max(0.0, self.ended_at - self.start),
            delivered=delivered,
            note=note,
            interrupted=self.interrupted,
        )

    def _add(self, request: LoadRequest, due: float) -> None:
        self.engine.add(
            request.request_id,
            request.token_ids,
            self.sampling[request.output_tokens],
            arrival=due,
        )

    def _serve(self) -> None:
        """Step until every request sent has left, or the drain limit is over, or a stop."""
        while True:
            # Cleared before looking: an add after the look sets it again.
            self.wake.clear()
            all_sent = self.sender.finished
            if self.stop is not None and self.stop.is_set():
                self.interrupted = True
                return
            if self.engine.has_unfinished:
                if all_sent and self.clock() > self._drained_by():
                    return
                if not self._sleep_until_work():
                    self._step()
            elif all_sent:
                return
            else:
                # Woken by the next send; the limit is for the stop event.
                self.wake.wait(POLL_S)
            self._tell_progress()

    def _drained_by(self) -> float:
        sent = len(self.sender.sends)
        last = self.requests[sent - 1].arrival_s if sent else 0.0
        return self.start + last + self.drain_limit

    def _sleep_until_work(self) -> bool:
        """Sleep while dynamic batching waits for a full batch; whether it did."""
        due = self.engine.next_wakeup()
        wait = POLL_S if due is None else due - self.clock()
        if wait <= 0:
            return False
        self.wake.wait(min(wait, POLL_S))
        return True

    def _step(self) -> None:
        outputs = self.engine.step()
        now = self.clock()
        for output in outputs:
            flight = self.in_flight.get(output.request_id)
            if flight is None:  # not of this load
                continue
            flight.token_times += [now] * len(output.token_ids)
            if output.finish_reason is not None:
                self._leave(flight, output)

    def _leave(self, flight: _InFlight, output: RequestOutput) -> None:
        assert flight.last is None, f"request {output.request_id} left twice"
        flight.last = output.request
        self.left += 1
        match output.finish_reason:
            case FinishReason.REFUSED:
                flight.outcome, flight.reason = "refused", output.refusal
            case FinishReason.ABORT:
                # If this load did not abort it, the engine gave it up.
                flight.outcome = flight.outcome or "failed"
                flight.reason = flight.reason or output.refusal or "aborted by the engine"
            case _:
                flight.outcome, flight.reason = "finished", None

    def _abort_rest(self, outcome: Outcome, reason: str) -> None:
        for flight in self.in_flight.values():
            if flight.last is None:
                flight.outcome, flight.reason = outcome, reason
        self._leave_engine_empty()

    def _leave_engine_empty(self) -> None:
        """Abort what is unfinished and step until the aborts have come out."""
        for request_id, flight in self.in_flight.items():
            if flight.last is None:
                self.engine.abort(request_id)
        while self.engine.has_unfinished:
            self._step()

    def _tell_progress(self) -> None:
        now = self.clock()
        if self.on_progress is None or now < self.next_progress:
            return
        self.next_progress = now + PROGRESS_S
        self.on_progress(
            LoadProgress(
                len(self.sender.sends), self.left, len(self.requests), max(0.0, now - self.start)
            )
        )

    def _record(self, request: LoadRequest, send: float) -> RequestRecord:
        flight = self.in_flight[request.request_id]
        last = flight.last
        assert flight.outcome is not None, f"request {request.request_id} never left"
        # Subtracting the start rounds, which must not put a send before its intention or a token
        # before its send.
        send = max(send, request.arrival_s)
        return RequestRecord(
            request_id=request.request_id,
            intended_send=request.arrival_s,
            send=send,
            token_times=tuple(max(send, stamp - self.start) for stamp in flight.token_times),
            input_tokens=len(request.token_ids),
            output_tokens=len(flight.token_times),
            asked_output_tokens=request.output_tokens,
            outcome=flight.outcome,
            reason=flight.reason,
            cached_tokens=last.num_cached_tokens if last else 0,
            preemptions=last.num_preemptions if last else 0,
            session_id=request.session_id,
            first_scheduled=None
            if last is None or last.first_scheduled is None
            else max(send, last.first_scheduled - self.start),
            output_token_ids=tuple(last.output_token_ids) if last else (),
        )
