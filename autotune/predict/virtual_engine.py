"""An engine in virtual time: the real scheduler and block pool, with steps that cost what is said.

What is predicted is scheduled as what is measured is. Only the executor is missing: tokens are made
up, and the clock moves on by what a step costs. Runs of steps in which nothing but the lengths
changes are taken at once (`engine.steady_run`), so that a simulated request costs about what its
arrival and its end do.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autotune.predict.decoding import PLAIN, Decoding, DecodingPlay
from autotune.predict.load_times import NO_TIMES, LoadTimes
from autotune.predict.pace import STEADY, Pace
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.records import Outcome, RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.attention_work import attention_work
from engine.batch import Batch, BatchResult
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.steady_run import advance, steady_steps
from engine.step_record import StepRecord

_NO_TOKENS: Sequence[int] = ()
_NONE: list[int] = []
_NO_BATCH = Batch([], 0)


class Cost(Protocol):
    """What a step costs; `autotune.predict.step_cost.StepCost` is one."""

    def device_seconds(self, work: StepWork) -> float:
        """Seconds on the device."""
        ...

    def host_seconds(self, work: StepWork) -> float:
        """Seconds on the host during which the device idles."""
        ...

    def decode_line(self, sequences: int) -> DecodeLine | None:
        """Seconds, of device and host, of steps that decode so many sequences and do nothing else.

        By the cached tokens that these see; None if they are to be asked one by one.
        """
        ...


@dataclass(slots=True)
class StepTotals:
    """What the steps of an engine come to; times in seconds."""

    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefill_tokens: int = 0
    sequences: int = 0
    device_seconds: float = 0.0
    host_seconds: float = 0.0
    peak_blocks: int = 0
    blocks_total: int = 0

    def to_metrics(self) -> dict[str, float | int | None]:
        """By the keys that `bench` has under `engine`."""
        prompts = self.prefix_hit_tokens + self.prefill_tokens
        total = self.device_seconds + self.host_seconds
        return {
            "steps": self.steps,
            "preemptions": self.preemptions,
            "prefix_hit_rate": self.prefix_hit_tokens / prompts if prompts else None,
            "kv_blocks_total": self.blocks_total if self.steps else None,
            "kv_peak_usage": self.peak_blocks / self.blocks_total if self.steps else None,
            "mean_batch": self.sequences / self.steps if self.steps else None,
            "host_share": self.host_seconds / total if total > 0 else None,
            "device_share": self.device_seconds / total if total > 0 else None,
        }


@dataclass(slots=True, eq=False)
class _Progress:
    """Where a request stands: in which steps it got its tokens.

    While it decodes it gets one in every step, so that `opened` and the last step tell all; what
    lies before a preemption is in `segments`.
    """

    load: LoadRequest
    request: Request
    opened: int = -1
    preemptions: int = 0
    segments: list[tuple[int, int]] = field(default_factory=list)
    stamps: list[float] | None = None  # of an engine whose steps yield several tokens


class VirtualEngine:
    """One engine of its own clock, fed with requests in the order of their arrivals.

    `send` what has arrived, then `run` until the next arrival. Times are seconds since the load
    began.

    Args:
        config: the knobs.
        cost: seconds of a step.
        cache: the KV cache.
        times: what whoever sends requests and steps the engine takes between.
        pace: how much slower than their cost steps are, and when.
        decoding: how decodes differ from one token a sequence and step.
        outputs: tokens that requests get, by id; made up for others.
        on_step: receives each step's record; steps are then played one by one.
        seed: of what speculation accepts.
    """

    def __init__(
        self,
        config: EngineConfig,
        cost: Cost,
        cache: CacheShape,
        *,
        times: LoadTimes = NO_TIMES,
        pace: Pace = STEADY,
        decoding: Decoding = PLAIN,
        outputs: Mapping[str, Sequence[int]] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        seed: int = 0,
    ) -> None:
        windows = [group.window for group in cache.groups]
        pool = BlockPool(cache.num_blocks, config.block_size, config.enable_prefix_caching, windows)
        self.scheduler = Scheduler(config, pool, cache.max_model_len)
        self.now = 0.0
        self.totals = StepTotals(blocks_total=cache.num_blocks)
        self.departures: list[float] = []
        """When each request that finished did, in order."""
        self._groups = cache.groups
        self._cost = cost
        self._times = times
        self._pace = pace
        self._play = None if decoding.is_plain else DecodingPlay(decoding, seed)
        self._outputs = outputs or {}
        self._on_step = on_step
        self._fast = on_step is None and self._play is None
        self._lines: dict[int, DecodeLine | None] = {}
        self._ends: list[float] = []  # of each step
        self._progress: dict[str, _Progress] = {}
        self._closed: dict[str, _Progress] = {}  # those that do not get a token every step
        self._open: dict[str, _Progress] = {}
        self._records: list[RequestRecord] = []
        self._previous = _NO_BATCH
        self._sent = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether requests run or wait."""
        return bool(self._progress)

    def outstanding(self, at: float) -> int:
        """Requests sent and not finished at a moment that `run` has reached."""
        return self._sent - bisect_right(self.departures, at)

    def cached_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of a prompt whose keys and values are in the cache."""
        pool = self.scheduler.pool
        return pool.match_prefix(pool.new_tables(), token_ids).num_blocks * pool.block_size

    def send(self, load: LoadRequest, due: float, *, received_tokens: int = 0) -> None:
        """Take in a request that is due at a moment, not before the one sent last.

        `received_tokens` of its prompt were computed elsewhere.
        """
        if load.request_id in self._progress:
            raise ValueError("request ids of a load must differ")
        request = Request(load.request_id, list(load.token_ids), _sampling(load.output_tokens), due)
        request.num_received_tokens = received_tokens
        self._previous = _NO_BATCH  # who waits may have changed
        if not self.has_unfinished and due > self.now:
            self.now = due
        self._sent += 1
        progress = _Progress(load, request)
        if self._play is not None:
            progress.stamps = []
        if not self.scheduler.add(request):
            self.departures.append(self.now)
            self._records.append(_record(progress, (), "refused", request.refusal))
            return
        self._progress[load.request_id] = self._closed[load.request_id] = progress

    def run(self, until: float = math.inf) -> None:
        """Take all steps that begin before `until`; the last may end after it."""
        scheduler = self.scheduler
        while self._progress and self.now < until:
            steps = steady_steps(scheduler, self._previous) if self._fast else 0
            if steps > 1:
                self._run_steady(steps, until)
                continue
            hits = scheduler.pool.hit_tokens
            batch = scheduler.schedule(self.now)
            if not batch.sequences:
                wakeup = scheduler.next_wakeup(self.now)
                assert wakeup is not None
                assert wakeup > self.now, "a request that can never run"
                self.now = min(wakeup, until)
                continue
            self._step(batch, scheduler.pool.hit_tokens - hits)

    def give_up(self, reason: str) -> None:
        """Take out all that is unfinished, as timed out."""
        for progress in list(self._progress.values()):
            self.scheduler.abort(progress.request.request_id)
            self._leave(progress, "timed_out", reason)

    def take_records(self) -> list[RequestRecord]:
        """Records of the requests that left since they were last taken."""
        taken, self._records = self._records, []
        return taken

    def _step(self, batch: Batch, hit_tokens: int) -> None:
        work = StepWork.of_batch(batch, self._groups)
        play = self._play
        if play is None:
            device, host = self._cost.device_seconds(work), self._cost.host_seconds(work)
            tokens = [[self._token(s.request)] if s.samples else _NONE for s in batch.sequences]
        else:
            device, host = play.seconds(batch, self._cost, self._groups)
            tokens = play.tokens(batch, self._tokens)
        slower = self._pace.at(self.now)
        device, host = slower * device, slower * host
        start, end = self.now, self.now + device + host
        if self._on_step is not None:
            self._on_step(self._step_record(batch, start, device, host, hit_tokens))
        self._count(batch, work, device, host, hit_tokens)
        if batch.num_preemptions:
            self._close_preempted()
        finished = self.scheduler.update(batch, BatchResult(tokens, device, host))
        index = len(self._ends)
        self._ends.append(end)
        if play is not None:
            for sequence, got in zip(batch.sequences, tokens, strict=True):
                stamps = self._progress[sequence.request.request_id].stamps
                assert stamps is not None
                stamps.extend([end] * len(got))
        elif self._closed:
            self._open_from(index, [s.request for s in batch.sequences if s.samples])
        for request in finished:
            self._leave(self._progress[request.request_id], "finished", None)
        self.now = end + self._times.gap_of(len(batch.sequences))
        self._previous = batch

    def _run_steady(self, steps: int, until: float) -> None:
        running = self.scheduler.running
        count = len(running)
        line = self._line(count)
        seen = sum([r.num_computed_tokens for r in running]) + count
        slower = self._pace.at(self.now)
        gap = self._times.gap_of(count)
        if line is None:  # played one by one, though nothing need be scheduled
            ends = [self.now + slower * self._seconds_of_decodes(count, seen) + gap]
        else:
            ends = line.ends(
                self.now,
                seen,
                count,
                steps,
                until=min(until, self._pace.holds_until(self.now)),
                scale=slower,
                gap=gap,
            )
        steps = len(ends)
        began, self.now = self.now, ends[-1]
        if len(self._open) < count:  # the last chunk of a prompt, a single token, looks as decodes
            self._open_from(len(self._ends), running)
        self._ends += [end - gap for end in ends] if gap else ends
        in_order = bool(self._outputs)
        finished = advance(self.scheduler, steps, self._tokens, in_order=in_order)
        totals = self.totals
        totals.steps += steps
        totals.sequences += steps * count
        busy = self.now - began - steps * gap
        host = steps * slower * self._cost.host_seconds(_decodes(count, seen))
        totals.host_seconds += host
        totals.device_seconds += max(0.0, busy - host)
        used = self.scheduler.pool.num_used
        totals.peak_blocks = max(totals.peak_blocks, used)
        for request in finished:
            self.scheduler.finish(request, FinishReason.LENGTH)
            self._leave(self._progress[request.request_id], "finished", None)
        self._previous = _NO_BATCH

    def _line(self, sequences: int) -> DecodeLine | None:
        if sequences not in self._lines:
            self._lines[sequences] = self._cost.decode_line(sequences)
        return self._lines[sequences]

    def _seconds_of_decodes(self, sequences: int, seen: int) -> float:
        work = _decodes(sequences, seen)
        return self._cost.device_seconds(work) + self._cost.host_seconds(work)

    def _tokens(self, request: Request, first: int, count: int) -> Sequence[int]:
        """What a request generates: what it got when it was measured, or something of its own."""
        if not self._outputs:
            return [-request.rank[1]] * count
        known = self._outputs.get(request.request_id, _NO_TOKENS)
        if len(known) >= first + count:
            return known[first : first + count]
        made_up = -request.rank[1]  # like no other's
        return [*known[first:], *itertools.repeat(made_up, count - len(known[first:]))]

    def _token(self, request: Request) -> int:
        if not self._outputs:
            return -request.rank[1]
        return self._tokens(request, request.num_output_tokens, 1)[0]

    def _open_from(self, index: int, sampled: Sequence[Request]) -> None:
        """Note who gets the first of a row of tokens in the step of this number."""
        for request in sampled:
            progress = self._closed.pop(request.request_id, None)
            if progress is not None:
                self._open[request.request_id] = progress
                progress.opened = index
                progress.preemptions = request.num_preemptions

    def _close_preempted(self) -> None:
        index = len(self._ends)
        for key, progress in list(self._open.items()):
            if progress.request.num_preemptions != progress.preemptions:
                progress.segments.append((progress.opened, index))
                self._closed[key] = self._open.pop(key)

    def _leave(self, progress: _Progress, outcome: Outcome, reason: str | None) -> None:
        key = progress.load.request_id
        del self._progress[key]
        times: tuple[float, ...]
        if progress.stamps is not None:
            times = tuple(progress.stamps)
        else:
            segments = progress.segments
            if self._open.pop(key, None) is not None:
                segments.append((progress.opened, len(self._ends)))
            self._closed.pop(key, None)
            ends = self._ends
            if len(segments) == 1:
                times = tuple(ends[segments[0][0] : segments[0][1]])
            else:
                times = tuple(end for first, last in segments for end in ends[first:last])
        if outcome == "finished":
            self.departures.append(times[-1])
        self._records.append(_record(progress, times, outcome, reason))

    def _count(
        self, batch: Batch, work: StepWork, device: float, host: float, hit_tokens: int
    ) -> None:
        totals = self.totals
        totals.steps += 1
        totals.preemptions += batch.num_preemptions
        totals.prefix_hit_tokens += hit_tokens
        totals.prefill_tokens += int(work.rows) - work.decode_sequences
        totals.sequences += work.sequences
        totals.device_seconds += device
        totals.host_seconds += host
        totals.peak_blocks = max(totals.peak_blocks, self.scheduler.pool.num_used)

    def _step_record(
        self, batch: Batch, start: float, device: float, host: float, hit_tokens: int
    ) -> StepRecord:
        pool, running = self.scheduler.pool, self.scheduler.running
        work = attention_work(batch, self._groups, uniform=pool.uniform)
        reserved = sum([r.tables.capacity - r.num_computed_tokens for r in running])
        return StepRecord(
            start=start,
            prefill_tokens=batch.num_prefill_tokens,
            prefill_sequences=len(batch.sequences) - batch.num_decodes,
            decode_sequences=batch.num_decodes,
            kv_tokens_read=work.kv_tokens,
            device_seconds=device,
            host_seconds=host,
            scheduler_seconds=0.0,
            queue_length=len(self.scheduler.waiting),
            running=len(running),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_total=pool.num_blocks,
            preemptions=batch.num_preemptions,
            prefix_hit_tokens=hit_tokens,
            drafted_tokens=0,
            accepted_tokens=0,
            prefill_kv_tokens_read=work.prefill_kv_tokens,
            prefill_pairs=work.prefill_pairs,
            sampled_sequences=sum([s.samples for s in batch.sequences]),
            used_tokens=pool.num_used * pool.block_size - (reserved - batch.num_tokens),
        )


def _decodes(sequences: int, seen: float) -> StepWork:
    return StepWork(sequences, 0, sequences, sequences, seen, 0, 0)


def _record(
    progress: _Progress, times: tuple[float, ...], outcome: Outcome, reason: str | None
) -> RequestRecord:
    load, request = progress.load, progress.request
    return RequestRecord(
        request_id=load.request_id,
        intended_send=load.arrival_s,
        send=load.arrival_s,
        token_times=times,
        input_tokens=len(load.token_ids),
        output_tokens=len(times),
        asked_output_tokens=load.output_tokens,
        outcome=outcome,
        reason=reason,
        cached_tokens=request.num_cached_tokens,
        preemptions=request.num_preemptions,
        session_id=load.session_id,
        first_scheduled=request.first_scheduled,
    )


@functools.lru_cache(maxsize=4096)
def _sampling(length: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=length, min_tokens=0, ignore_eos=True)


__all__ = ["Cost", "FinishReason", "RequestState", "StepTotals", "VirtualEngine"]
