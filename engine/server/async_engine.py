"""The engine behind an event loop: a thread steps it, tasks read their requests' outputs."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.admission import refusal_at_entry
from engine.engine import Engine
from engine.errors import EngineError, RequestRefused, first_line
from engine.output import RequestOutput
from engine.request import Request, SamplingParams
from engine.server.limits import ServerLimits
from engine.server.refusals import Draining, EngineFailed, Overloaded, TimedOut
from engine.server.request_metrics import RequestMetrics
from engine.server.stream import Stream
from engine.step_record import StepRecord

# A device that has broken down fails every step; one that ran out of memory fails some.
_FAILED_STEPS = 3
# Departures of so many last seconds tell how fast the queue moves.
_RATE_WINDOW_S = 60.0
_RETRY_S = (1.0, 120.0)
_RETRY_UNKNOWN_S = 5.0
# How long aborted requests may take to leave, and the thread to end: a step is waited for.
_LEAVE_S = 10.0

_log = logging.getLogger(__name__)


class AsyncEngine:
    """Steps an engine in a thread of its own, and hands the outputs to streams.

    All methods are called from one event loop, the one of the first `start` or `submit`. Each step
    wakes the loop once, however many requests it served.

    A step that fails gives up the requests that it computed; the others go on. When the executor
    cannot go on, every stream raises `EngineFailed` and so does `submit`.

    Args:
        engine: nobody else steps it; its `on_step` is taken over.
        limits: how many may wait, and how long.
        failure: why no step can be computed any more, if so.
        begin_thread: called in the stepping thread before the first step.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: ServerLimits,
        failure: Callable[[], EngineError | None] = lambda: None,
        begin_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.metrics = RequestMetrics()
        self.failed: EngineFailed | None = None
        self.draining = False
        self._failure = failure
        self._begin_thread = begin_thread
        self._streams: dict[str, Stream] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ids = itertools.count()
        self._left_at: deque[float] = deque(maxlen=1024)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._empty = asyncio.Event()  # set when the last request leaves
        # Between the threads: a note, "there is something to do", and a mailbox.
        self._wake = threading.Event()
        self._closing = False
        self._mail: deque[tuple[float, list[RequestOutput]]] = deque()
        self._posted = False
        self._progress_at = time.monotonic()
        engine.on_step = self._on_step

    @property
    def num_unfinished(self) -> int:
        """Requests that have not left."""
        return len(self._streams)

    @property
    def num_running(self) -> int:
        """Requests that have a seat in the running batch."""
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return max(0, self.engine.num_unfinished - self.num_running)

    def start(self) -> None:
        """Begin to step; done by the first `submit` if not before."""
        if self._thread is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Stream:
        """Take in a request; its outputs come from the stream.

        Args:
            token_ids: the prompt; copied.
            sampling: how tokens are chosen.
            priority: the lower is served first under the policy `priority`.
            cache_salt: prefixes are shared with requests of the same salt alone.

        Raises:
            Overloaded: too many wait already.
            Draining: nothing new is taken.
            EngineFailed: the engine broke down.
            RequestRefused: the request can never be served.
        """
        self.start()
        loop = self._loop
        assert loop is not None
        sampling = self._within_limits(token_ids, sampling)
        self.admit()
        request_id = str(next(self._ids))
        if not self.engine.has_unfinished:
            self._progress_at = time.monotonic()
        request = self.engine.add(
            request_id, token_ids, sampling, priority=priority, cache_salt=cache_salt
        )
        stream = self._streams[request_id] = Stream(request, loop, self.engine.abort)
        limit = self.limits.request_timeout_s
        if limit is not None:
            self._timers[request_id] = loop.call_later(limit, self._time_out, stream)
        self._wake.set()
        return stream

    def admit(self, count: int = 1) -> None:
        """See to it that so many requests would be taken in now.

        Raises:
            Overloaded: too many wait already.
            Draining: nothing new is taken.
            EngineFailed: the engine broke down.
            RequestRefused: so many at once are never taken.
        """
        if self.failed is not None:
            raise self.failed
        if self.draining or self._closing:
            raise Draining("the server is ending and takes no new requests")
        most = self.limits.max_waiting
        seats = self.engine.config.max_num_seqs
        if count > most + seats:
            raise RequestRefused(
                f"{count} sequences at once are more than the {most + seats} that run and wait "
                "here: send fewer prompts, or a smaller n"
            )
        waiting = self.num_waiting
        if waiting + count > most + max(0, seats - self.num_running):
            self.metrics.rejected["queue_full"] += 1
            raise Overloaded(
                f"there is no room for {count} more: {waiting} of at most {most} requests wait "
                "already; try again later",
                self._retry_after_s(waiting),
            )

    def stalled_for(self) -> float:
        """Seconds since the last step ended, or since work came; 0 while there is none."""
        if not self.engine.has_unfinished:
            return 0.0
        return max(0.0, time.monotonic() - self._progress_at)

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, and wait until all requests have left, at most so many seconds.

        Those that have not by then are aborted, and their streams raise `Draining`. Returns
        whether there were none.
        """
        self.draining = True
        finished = await self._wait_until_empty(timeout_s)
        if not finished:
            text = f"the server ended {timeout_s:g} s after it was asked to, before this request"
            for stream in list(self._streams.values()):
                stream.fail(Draining(text))
            self._wake.set()
            await self._wait_until_empty(_LEAVE_S)
        return finished

    def close(self) -> None:
        """Abort what is left, and end the thread."""
        for stream in list(self._streams.values()):
            stream.fail(Draining("the server has ended"))
        self._closing = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_LEAVE_S)
            if not thread.is_alive():
                self._deliver()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if not self._streams:
            self._empty.set()

    @property
    def stepping(self) -> bool:
        """Whether the thread lives."""
        return self._thread is not None and self._thread.is_alive()

    async def _wait_until_empty(self, timeout_s: float) -> bool:
        if not self._streams or self.failed is not None:
            return not self._streams
        self._empty.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _within_limits(self, token_ids: Sequence[int], sampling: SamplingParams) -> SamplingParams:
        """The sampling with a length that is allowed; what can never be served is refused here.

        Raises:
            RequestRefused: the prompt or the output asked for is too long.
        """
        limits, engine = self.limits, self.engine
        prompt, output = limits.max_prompt_tokens, limits.max_output_tokens
        if prompt is not None and len(token_ids) > prompt:
            raise RequestRefused(
                f"the prompt of {len(token_ids)} tokens is above the server's limit of {prompt}"
            )
        if output is not None:
            if sampling.max_tokens is None:
                sampling = replace(
                    sampling, max_tokens=output, min_tokens=min(sampling.min_tokens, output)
                )
            elif sampling.max_tokens > output:
                raise RequestRefused(
                    f"max_tokens={sampling.max_tokens} is above the server's limit of {output}"
                )
        scheduler = engine.scheduler
        reason = refusal_at_entry(
            Request("", list(token_ids), sampling, 0.0),
            engine.config,
            engine.pool,
            engine.max_model_len,
            scheduler.vocab_size,
            0,
        )
        if reason is not None:
            raise RequestRefused(reason)
        return sampling

    def _retry_after_s(self, waiting: int) -> float:
        """When half of the queue will have been served, as fast as requests left of late.

        Half: so that there is room for those who come back, and work until they do.
        """
        now = time.monotonic()
        left = self._left_at
        while left and left[0] < now - _RATE_WINDOW_S:
            left.popleft()
        if not left:
            return _RETRY_UNKNOWN_S
        rate = len(left) / max(now - left[0], 1e-3)
        low, high = _RETRY_S
        return min(max(waiting / 2 / rate, low), high)

    def _time_out(self, stream: Stream) -> None:
        limit = self.limits.request_timeout_s
        stream.fail(TimedOut(f"the request took longer than the {limit:g} s that it may take here"))
        self._wake.set()

    # In the event loop.

    def _deliver(self) -> None:
        """Hand out what the thread has left in the mailbox."""
        self._posted = False  # before looking: what is put in after the look is posted again
        mail, streams, metrics = self._mail, self._streams, self.metrics
        while mail:
            now, outputs = mail.popleft()
            for output in outputs:
                request = output.request
                stream = streams.get(request.request_id)
                if stream is None:
                    continue
                if output.token_ids:
                    metrics.on_tokens(request, now, stream.last_at, len(output.token_ids))
                    if stream.first_at is None:
                        stream.first_at = now
                    stream.last_at = now
                if output.finish_reason is not None:
                    metrics.on_leave(request, now, stream.first_at, stream.last_at)
                    self._forget(request.request_id)
                stream.put(output)

    def _forget(self, request_id: str) -> None:
        del self._streams[request_id]
        timer = self._timers.pop(request_id, None)
        if timer is not None:
            timer.cancel()
        self._left_at.append(time.monotonic())
        if not self._streams:
            self._empty.set()

    def _fail_all(self) -> None:
        self._deliver()
        assert self.failed is not None
        for request_id, stream in list(self._streams.items()):
            stream.fail(self.failed)
            self.metrics.finished["error"] += 1
            self._forget(request_id)

    # In the stepping thread.

    def _on_step(self, step: StepRecord) -> None:
        self._progress_at = time.monotonic()
        self.metrics.on_step(step)

    def _run(self) -> None:
        try:
            self._begin_thread()
            self._serve()
        except BaseException as error:  # whatever it is, nobody steps any more
            self.failed = EngineFailed(f"the engine broke down: {first_line(error)}")
            foreseen = isinstance(error, EngineError)  # its sentence says it all
            _log.critical("%s", self.failed, exc_info=None if foreseen else error)
            self._post(self._fail_all)

    def _serve(self) -> None:
        engine, wake = self.engine, self._wake
        failed_steps = 0
        while True:
            # Cleared before looking: an add after the look sets it again.
            wake.clear()
            if not engine.has_unfinished:
                if self._closing:
                    return
                wake.wait()
                continue
            due = engine.next_wakeup()
            if due is not None and (wait := due - engine.clock()) > 0:
                self._progress_at = time.monotonic() + wait  # it is no stall
                wake.wait(wait)  # dynamic batching waits for a full batch
            before = self.metrics.steps
            try:
                outputs = engine.step()
            except Exception as error:
                failed_steps += 1
                if self._failure() is not None or failed_steps >= _FAILED_STEPS:
                    raise
                _log.error("a step failed, and its requests with it", exc_info=error)
                continue
            if self.metrics.steps != before:
                failed_steps = 0
            if outputs:
                self._mail.append((engine.clock(), outputs))
                if not self._posted:
                    self._posted = True
                    self._post(self._deliver)

    def _post(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop has ended, and with it everybody who would read
            self._closing = True
            self.engine.abort_all()
