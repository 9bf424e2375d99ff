"""Traffic on the real engine in virtual time: what is predicted schedules as what is measured.

The engine, its scheduler and its block pool are those that serve; only the executor is replaced, by
one that makes tokens up and moves a virtual clock on by what a step costs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autotune.predict.load_times import NO_TIMES, LoadTimes
from autotune.predict.pace import STEADY, Pace
from autotune.predict.step_cost import StepWork
from autotune.records import Outcome, RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.block_groups import BlockGroup
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.output import RequestOutput
from engine.request import FinishReason, Request, SamplingParams
from engine.step_record import StepRecord

_NO_TOKENS: Sequence[int] = ()
_NONE: list[int] = []


class Cost(Protocol):
    """What a step costs; `autotune.predict.step_cost.StepCost` is one."""

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device."""
        ...

    def host_seconds(self, work: StepWork) -> float:
        """Seconds on the host during which the device idles."""
        ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """How decodes differ from one token a sequence and step, and prompts from running here.

    `tokens_per_step` is what a decode yields on the mean and `verify_tokens` what it computes
    (speculation). `prompt_share` is the part of a prompt's time that is spent in these steps; the
    rest is spent before, one prompt after another, on a device of the same speed (disaggregation).
    """

    tokens_per_step: float = 1.0
    verify_tokens: float = 1.0
    prompt_share: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether steps cost what their batches cost."""
        return self == PLAIN


PLAIN = Decoding()


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a load would measure; times are seconds since it began, as those of a real load.

    `steps` are empty unless they were asked for.
    """

    records: list[RequestRecord]
    steps: list[StepRecord]
    duration: float


def replay(
    requests: Sequence[LoadRequest],
    config: EngineConfig,
    cost: Cost,
    cache: CacheShape,
    *,
    drain_limit: float,
    outputs: Mapping[str, Sequence[int]] | None = None,
    times: LoadTimes = NO_TIMES,
    pace: Pace = STEADY,
    decoding: Decoding = PLAIN,
    keep_steps: bool = False,
) -> Replayed:
    """Offer requests to an engine whose steps take what `cost` says.

    A request that arrives during a step is seen at the next, as in a real load. Requests that are
    unfinished `drain_limit` seconds after the last arrival are recorded as timed out.

    Args:
        requests: what to send; ids must differ.
        config: the knobs.
        cost: seconds of a step.
        cache: the KV cache.
        drain_limit: in seconds.
        outputs: the tokens that requests got when they were measured, by id: a prompt that goes on
            from an earlier answer finds it in the cache only if the answer is the same.
        times: what whoever sends requests and steps the engine takes between.
        pace: how much slower than their cost steps are, and when.
        decoding: what speculation or disaggregation change.
        keep_steps: whether to record the steps, which takes time.
    """
    clock = _VirtualClock()
    how = (cost, clock, outputs or {}, cache.groups, pace)
    executor = _CostExecutor(*how) if decoding.is_plain else _ChangedExecutor(*how, decoding)
    engine = Engine(config, executor, cache, clock=clock)
    run = _Replay(requests, engine, clock, drain_limit, times)
    if decoding.prompt_share < 1:
        run.after_prompts(cost, 1 - decoding.prompt_share)
    steps: list[StepRecord] = []
    if keep_steps:
        engine.on_step = steps.append
    run.go()
    return Replayed(run.records(), steps, run.ended_at)


class _VirtualClock:
    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _CostExecutor:
    """Moves the clock on by what a batch costs, and makes tokens up."""

    def __init__(
        self,
        cost: Cost,
        clock: _VirtualClock,
        outputs: Mapping[str, Sequence[int]],
        groups: Sequence[BlockGroup],
        pace: Pace,
    ) -> None:
        self._cost = cost
        self._clock = clock
        self._outputs = outputs
        self._groups = groups
        self._pace = pace

    def execute(self, batch: Batch) -> BatchResult:
        """The made-up result of a batch."""
        slower = self._pace.at(self._clock.now)
        device, host = (slower * seconds for seconds in self.seconds(batch))
        self._clock.now += device + host
        return BatchResult(self.tokens(batch), device, host)

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """Seconds of a batch on the device and on the host."""
        work = StepWork.of_batch(batch, self._groups)
        return self._cost.device_seconds(work), self._cost.host_seconds(work)

    def tokens(self, batch: Batch) -> list[list[int]]:
        """A token for each sequence that samples: the recorded one, if there is one."""
        if not self._outputs:
            return [[0] if s.samples else _NONE for s in batch.sequences]
        return [[self._token(s.request, 0)] if s.samples else [] for s in batch.sequences]

    def _token(self, request: Request, ahead: int) -> int:
        known = self._outputs.get(request.request_id, _NO_TOKENS)
        index = request.num_output_tokens + ahead
        return known[index] if index < len(known) else 0


class _ChangedExecutor(_CostExecutor):
    """One whose decodes yield or compute more tokens, or whose prompts run elsewhere."""

    def __init__(
        self,
        cost: Cost,
        clock: _VirtualClock,
        outputs: Mapping[str, Sequence[int]],
        groups: Sequence[BlockGroup],
        pace: Pace,
        decoding: Decoding,
    ) -> None:
        super().__init__(cost, clock, outputs, groups, pace)
        self._decoding = decoding
        # Of each request, the tokens it is owed beyond whole ones, and what its last step yielded.
        self._owed: dict[str, float] = {}
        self._yielded: dict[str, int] = {}

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """Seconds of a batch on the device and on the host."""
        how, cost = self._decoding, self._cost
        decodes: list[ScheduledSequence] = []
        chunks: list[ScheduledSequence] = []
        for s in batch.sequences:
            # The tokens that a step yielded come back as one chunk; the factors tell what computing
            # them costs.
            if self._is_decode(s):
                decodes.append(ScheduledSequence(s.request, s.end - 1, 1, True))
            else:
                chunks.append(s)
        whole = self._work([*decodes, *chunks], len(decodes))
        device = cost.device_seconds(whole)
        if chunks and how.prompt_share < 1:
            alone = cost.device_seconds(self._work(decodes, len(decodes))) if decodes else 0.0
            device = alone + how.prompt_share * max(0.0, device - alone)
        return device, cost.host_seconds(whole)

    def _work(self, sequences: list[ScheduledSequence], num_decodes: int) -> StepWork:
        work = StepWork.of_batch(Batch(sequences, num_decodes), self._groups)
        return work.verifying(self._decoding.verify_tokens)

    def tokens(self, batch: Batch) -> list[list[int]]:
        """As many tokens for each decode as it yields on the mean, and one for each prompt."""
        rows = []
        for s in batch.sequences:
            count = 1 if s.samples else 0
            if s.samples and s.start >= s.request.num_prompt_tokens:
                key = s.request.request_id
                owed = self._owed.get(key, 0.0) + self._decoding.tokens_per_step
                count = max(1, int(owed))
                self._owed[key] = owed - count
            if s.samples:
                self._yielded[s.request.request_id] = count
            rows.append([self._token(s.request, i) for i in range(count)])
        return rows

    def _is_decode(self, sequence: ScheduledSequence) -> bool:
        return (
            sequence.start >= sequence.request.num_prompt_tokens
            and self._yielded.get(sequence.request.request_id) == sequence.num_tokens
        )


class _Replay:
    """One load in virtual time; mirrors `autotune.load.open_loop`."""

    def __init__(
        self,
        requests: Sequence[LoadRequest],
        engine: Engine,
        clock: _VirtualClock,
        drain_limit: float,
        times: LoadTimes,
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.drain_limit = drain_limit
        self.gap_seconds = times.gap
        self.requests = sorted(requests, key=lambda request: request.arrival_s)
        self.arrivals = [request.arrival_s + times.arrival for request in self.requests]
        self.stamps: dict[str, list[float]] = {r.request_id: [] for r in requests}
        if len(self.stamps) < len(requests):
            raise ValueError("request ids of a load must differ")
        self.last: dict[str, Request] = {}
        self.ended_at = 0.0

    def after_prompts(self, cost: Cost, share: float) -> None:
        """Move arrivals to when a device of prompts, that takes one after another, is done."""
        free = 0.0
        for index, request in enumerate(self.requests):
            work = StepWork.of_prompt(len(request.token_ids))
            free = max(free, self.arrivals[index]) + share * cost.device_seconds(work)
            self.arrivals[index] = free

    def go(self) -> None:
        """Send and step until the last request has left."""
        engine, clock, requests, arrivals = self.engine, self.clock, self.requests, self.arrivals
        total, sent = len(requests), 0
        drained_by = (arrivals[-1] if arrivals else 0.0) + self.drain_limit
        while True:
            while sent < total and arrivals[sent] <= clock.now:
                self._send(requests[sent], arrivals[sent])
                sent += 1
            if not engine.has_unfinished:
                if sent == total:
                    break
                clock.now = arrivals[sent]
                continue
            if sent == total and clock.now > drained_by:
                self._give_up()
                break
            wakeup = engine.next_wakeup()
            if wakeup is not None and wakeup > clock.now:  # dynamic batching waits
                clock.now = wakeup if sent == total else min(wakeup, arrivals[sent])
                continue
            self._stamp(engine.step())
        self.ended_at = clock.now

    def records(self) -> list[RequestRecord]:
        """One for each request, in the order of the intended sends."""
        return [self._record(request) for request in self.requests]

    def _send(self, request: LoadRequest, due: float) -> None:
        sampling = _sampling(request.output_tokens)
        self.engine.add(request.request_id, request.token_ids, sampling, arrival=due)

    def _stamp(self, outputs: list[RequestOutput]) -> None:
        stamps, now = self.stamps, self.clock.now
        for output in outputs:
            request = output.request
            if output.token_ids:
                stamps[request.request_id].extend([now] * len(output.token_ids))
            if output.finish_reason is not None:
                self.last[request.request_id] = request
        self.clock.now = now + self.gap_seconds

    def _give_up(self) -> None:
        engine = self.engine
        engine.abort_all()
        while engine.has_unfinished:
            self._stamp(engine.step())

    def _record(self, request: LoadRequest) -> RequestRecord:
        last = self.last[request.request_id]
        outcome: Outcome = "finished"
        reason = None
        if last.finish_reason is FinishReason.REFUSED:
            outcome, reason = "refused", last.refusal
        elif last.finish_reason is FinishReason.ABORT:
            outcome = "timed_out"
            reason = f"not finished {self.drain_limit:g} s after the last arrival"
        times = self.stamps[request.request_id]
        return RequestRecord(
            request_id=request.request_id,
            intended_send=request.arrival_s,
            send=request.arrival_s,
            token_times=tuple(times),
            input_tokens=len(request.token_ids),
            output_tokens=len(times),
            asked_output_tokens=request.output_tokens,
            outcome=outcome,
            reason=reason,
            cached_tokens=last.num_cached_tokens,
            preemptions=last.num_preemptions,
            session_id=request.session_id,
            first_scheduled=last.first_scheduled,
        )


@functools.lru_cache(maxsize=4096)
def _sampling(length: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=length, min_tokens=0, ignore_eos=True)
