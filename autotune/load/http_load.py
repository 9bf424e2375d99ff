"""Open-loop load on a server: the same load as `open_loop` offers, over HTTP.

Three threads: one hands each request over at its time, one runs the connections and stamps what
comes, and the caller's reads whole answers, so that reading delays no stamp. TTFT counts from the
intended send, as it does in process.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autotune.load.answer import Answer, read_answer
from autotune.load.endpoint import Endpoint
from autotune.load.http_connection import Exchange, HttpClient
from autotune.load.http_notes import load_notes
from autotune.load.loop_thread import CLOSE_S, finish, room_for_connections, running_loop
from autotune.load.open_loop import GREEDY, POLL_S, PROGRESS_S, LoadProgress, LoadResult
from autotune.load.quiet import quiet_interpreter
from autotune.load.sender import Sender, in_order, judge_delivery
from autotune.records import Outcome, RequestRecord
from autotune.slo import Slo
from autotune.workload.materialise import LoadRequest
from engine.request import SamplingParams

_LEAD_S = 0.05


@dataclass(frozen=True, slots=True)
class HttpLoadResult(LoadResult):
    """A load over HTTP; there are no `steps`. `notes` say what a reader of the figures must know.

    `cached_share` is the share of the prompts' tokens that the server found in its prefix cache,
    None where it does not tell.
    """

    notes: list[str] = field(default_factory=list)
    cached_share: float | None = None


def run_http_load(
    endpoint: Endpoint,
    requests: Sequence[LoadRequest],
    *,
    slo: Slo | None = None,
    time_limit: float | None = None,
    drain_limit: float = 60.0,
    on_progress: Callable[[LoadProgress], None] | None = None,
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sampling: SamplingParams = GREEDY,
) -> HttpLoadResult:
    """Send the requests at their times, wait until all answers have come, and report.

    A request that the server refuses or loses is a record like every other, with its reason; the
    load goes on. Answers have the length that their request asks for where the server ignores end
    tokens when told to; elsewhere some are shorter.

    Args:
        endpoint: the server.
        requests: what to send, in any order; ids must differ.
        slo: tells how late a send may be (`judge_delivery`).
        time_limit: seconds after which nothing more is sent.
        drain_limit: answers that are not whole so many seconds after the last arrival are cut off
            and recorded as timed out.
        on_progress: called from this thread now and then.
        stop: ends the load early when set; Ctrl-C does the same. What was measured is returned.
        clock: in seconds.
        sampling: how tokens are chosen; its lengths and end tokens are replaced.

    Raises:
        ValueError: two requests have one id.
        BadInput: texts are to be sent and there is no tokenizer.
    """
    ordered = in_order(requests)
    room_for_connections()
    # Made before the load: making thousands of them while sending would delay the sends.
    exchanges = [
        Exchange(number, endpoint.message(endpoint.body(request, sampling)))
        for number, request in enumerate(ordered)
    ]
    load = _Load(endpoint, ordered, exchanges, drain_limit, stop, on_progress, clock)
    with quiet_interpreter(), running_loop() as (loop, errors):
        load.run(loop, errors, time_limit)
    return load.result(slo)


class _Load:
    """One load while it runs."""

    def __init__(
        self,
        endpoint: Endpoint,
        requests: Sequence[LoadRequest],
        exchanges: Sequence[Exchange],
        drain_limit: float,
        stop: threading.Event | None,
        on_progress: Callable[[LoadProgress], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.endpoint = endpoint
        self.requests = requests
        self.exchanges = exchanges
        self.drain_limit = drain_limit
        self.stop = stop
        self.on_progress = on_progress
        self.clock = clock
        self.interrupted = False
        self.answers: dict[int, Answer] = {}
        self.sends: list[float] = []
        self.start = 0.0
        # What the other threads say: an answer's end, or None to look again.
        self.ended: queue.SimpleQueue[Exchange] = queue.SimpleQueue()

    def run(
        self,
        loop: asyncio.AbstractEventLoop,
        errors: list[BaseException],
        time_limit: float | None,
    ) -> None:
        """Send, and read what comes, until the last answer is there or time is up."""
        client = HttpClient(self.endpoint.url, clock=self.clock, on_end=self.ended.put)
        numbers = {request.request_id: n for n, request in enumerate(self.requests)}

        def hand_over(request: LoadRequest, _due: float) -> None:
            loop.call_soon_threadsafe(client.begin, self.exchanges[numbers[request.request_id]])

        self.start = self.clock() + _LEAD_S
        sender = Sender(
            self.requests, hand_over, self.start, self.clock, threading.Event(), time_limit
        )
        sender.start()
        try:
            self._wait(sender, errors)
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            sender.cancel()
            self.sends = sender.sends
            while not self.ended.empty():
                self._read(self.ended.get())
            finish(client.close(), loop, CLOSE_S)
        if sender.error is not None or errors:
            raise sender.error or errors[0]
        outcome: Outcome = "failed" if self.interrupted else "timed_out"
        reason = f"not finished {self.drain_limit:g} s after the last arrival"
        if self.interrupted:
            reason = "the load was interrupted"
        for number in range(len(self.sends)):
            if number not in self.answers:
                answer = self._read(self.exchanges[number])
                if answer.outcome != "finished":
                    answer.outcome, answer.reason = outcome, reason

    def result(self, slo: Slo | None) -> HttpLoadResult:
        """The records, with times relative to the load's beginning."""
        sends = [
            (handed_over if exchange.send is None else exchange.send) - self.start
            for exchange, handed_over in zip(self.exchanges, self.sends, strict=False)
        ]
        intended = [request.arrival_s for request in self.requests]
        delivered, note = judge_delivery(intended, sends, slo, interrupted=self.interrupted)
        records = [self._record(number, send) for number, send in enumerate(sends)]
        answers = [self.answers[number] for number in range(len(sends))]
        ends = [e.ended for e in self.exchanges[: len(sends)] if e.ended is not None]
        return HttpLoadResult(
            records=records,
            steps=[],
            duration=max(0.0, max(ends, default=self.start) - self.start),
            delivered=delivered,
            note=note,
            interrupted=self.interrupted,
            notes=load_notes(answers, records),
            cached_share=_cached_share(answers, records),
        )

    def _wait(self, sender: Sender, errors: list[BaseException]) -> None:
        """Read answers until all have come, or the drain limit is over, or a stop."""
        next_progress = self.start
        while True:
            # Looked at before the queue: what was handed over by then has an end of its own.
            all_sent = sender.finished
            with contextlib.suppress(queue.Empty):
                self._read(self.ended.get(timeout=POLL_S))
            if self.stop is not None and self.stop.is_set():
                self.interrupted = True
                return
            now, sent = self.clock(), len(sender.sends)
            if all_sent:
                last = self.requests[sent - 1].arrival_s if sent else 0.0
                over = now > self.start + last + self.drain_limit
                if over or errors or len(self.answers) == sent:
                    return
            if self.on_progress is not None and now >= next_progress:
                next_progress = now + PROGRESS_S
                elapsed = max(0.0, now - self.start)
                self.on_progress(LoadProgress(sent, len(self.answers), len(self.requests), elapsed))

    def _read(self, exchange: Exchange) -> Answer:
        answer = read_answer(exchange, self.endpoint.tokenizer)
        exchange.pieces.clear()
        exchange.content = b""
        self.answers[exchange.number] = answer
        return answer

    def _record(self, number: int, send: float) -> RequestRecord:
        request, answer = self.requests[number], self.answers[number]
        # Subtracting the start rounds, which must not put a send before its intention or a token
        # before its send.
        send = max(send, request.arrival_s)
        told = answer.input_tokens
        return RequestRecord(
            request_id=request.request_id,
            intended_send=request.arrival_s,
            send=send,
            token_times=tuple(max(send, stamp - self.start) for stamp in answer.token_times),
            input_tokens=len(request.token_ids) if told is None else told,
            output_tokens=len(answer.token_times),
            asked_output_tokens=request.output_tokens,
            outcome=answer.outcome,
            reason=answer.reason,
            cached_tokens=answer.cached_tokens or 0,
            session_id=request.session_id,
            output_token_ids=answer.token_ids,
        )


def _cached_share(answers: Sequence[Answer], records: Sequence[RequestRecord]) -> float | None:
    told = [
        (answer.cached_tokens, record.input_tokens)
        for answer, record in zip(answers, records, strict=True)
        if answer.cached_tokens is not None
    ]
    total = sum(tokens for _, tokens in told)
    return sum(cached for cached, _ in told) / total if total else None
