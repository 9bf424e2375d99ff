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
from typing import Protocol

from autotune.predict.decoding import PLAIN, Decoding, DecodingPlay
from autotune.predict.drafting import DraftProfile, check_drafts
from autotune.predict.load_times import NO_TIMES, LoadTimes
from autotune.predict.pace import STEADY, Pace
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.step_totals import StepTotals, step_record
from autotune.predict.token_moments import TokenMoments, record_of
from autotune.predict.virtual_speculation import VirtualSpeculation
from autotune.records import Outcome, RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.request import FinishReason, Request, SamplingParams
from engine.scheduler import Scheduler
from engine.steady_run import Decoders, advance_in_order
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

    def decode_line(self, sequences: int) -> DecodeLine | None:
        """Seconds, of device and host, of steps that decode so many sequences and do nothing else.

        By the cached tokens that these see; None if they are to be asked one by one.
        """
        ...


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
        decoding: how decodes differ from one token a sequence and step; of drafts see below.
        drafts: how drafts fare, where the config has a `speculative_method`.
        outputs: tokens that requests get, by id; made up for others.
        on_step: receives each step's record; steps are then played one by one.
        seed: of what speculation accepts.

    Raises:
        UnknownDrafts: the config drafts, and nothing is known of its drafts.
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
        drafts: DraftProfile | None = None,
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
        self._even = None if pace.factors else pace.mean
        self._play = None if decoding.is_plain else DecodingPlay(decoding)
        self._speculation: VirtualSpeculation | None = None
        known = check_drafts(config, drafts)
        if known is not None:
            self._speculation = VirtualSpeculation(config, known, cost, self._tokens, seed)
        self._outputs = outputs or {}
        self._on_step = on_step
        self._stamps = self._play is not None or self._speculation is not None
        self._fast = on_step is None and not self._stamps and pool.uniform
        # Whether requests may find in the cache what others generated.
        self._in_order = bool(self._outputs) and config.enable_prefix_caching
        self._lines: dict[int, DecodeLine | None] = {}
        self._moments = TokenMoments()
        self._records: list[RequestRecord] = []
        self._decoders: Decoders | None = None  # None while requests are as the scheduler knows
        self._alone = 0  # sequences of the step before, if all decoded and nobody came since
        self._sent = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether requests run or wait."""
        return bool(self._moments.unfinished)

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
        moments = self._moments
        if load.request_id in moments.unfinished:
            raise ValueError("request ids of a load must differ")
        request = Request(load.request_id, list(load.token_ids), _sampling(load.output_tokens), due)
        request.num_received_tokens = received_tokens
        self._alone = 0  # who waits may have changed
        if due > self.now and not moments.unfinished:
            self.now = due
        self._sent += 1
        if not self.scheduler.add(request):
            self.departures.append(self.now)
            self._records.append(record_of(load, request, (), "refused", request.refusal))
            return
        moments.enter(load, request)

    def run(self, until: float = math.inf) -> None:
        """Take all steps that begin before `until`; the last may end after it."""
        scheduler, unfinished = self.scheduler, self._moments.unfinished
        while unfinished and self.now < until:
            steps = self._steady_steps()
            if steps > 1:
                self._run_steady(steps, until)
                continue
            decoders = self._decoders
            if decoders is not None and not self._in_order and decoders.begin_step():
                batched = self._step_beside(decoders)
            else:
                self._settle()
                drafting = self._draft()
                hits = scheduler.pool.hit_tokens
                batch = scheduler.schedule(self.now)
                batched = bool(batch.sequences)
                if batched:
                    self._step(batch, scheduler.pool.hit_tokens - hits, drafting)
            if not batched:
                wakeup = scheduler.next_wakeup(self.now)
                assert wakeup is not None
                assert wakeup > self.now, "a request that can never run"
                self.now = min(wakeup, until)

    def give_up(self, reason: str) -> None:
        """Take out all that is unfinished, as timed out."""
        self._settle()
        for request in self._moments.requests():
            self.scheduler.abort(request.request_id)
            if self._speculation is not None:
                self._speculation.forget(request)
            self._leave(request, "timed_out", reason)

    def take_records(self) -> list[RequestRecord]:
        """Records of the requests that left since they were last taken."""
        taken, self._records = self._records, []
        return taken

    def _steady_steps(self) -> int:
        """How many of the next steps decode the running requests and do nothing else; 0 unknown."""
        if not self._fast:
            return 0
        if self._decoders is None:
            self._decoders = Decoders(self.scheduler, self._tokens)
        return self._decoders.steady_steps(self._alone)

    def _steady_ends(self, steps: int, until: float) -> list[float] | None:
        """When the step after each of the next ones can begin, of up to `_steady_steps` of them.

        None begins at or after `until`, but for the first. None if the cost is to be asked for each
        step.
        """
        decoders = self._decoders
        assert decoders is not None
        count, now, pace = decoders.count, self.now, self._pace
        line = self._line(count)
        if line is None:
            return None
        scale = self._even
        if scale is None:
            scale, until = pace.at(now), min(until, pace.holds_until(now))
        gap, seen = self._times.gap_of(count), decoders.seen
        return line.ends(now, seen, count, steps, until=until, scale=scale, gap=gap)

    def _settle(self) -> None:
        """Bring the requests up to date, for the scheduler to look at them."""
        if self._decoders is not None:
            self._decoders.settle()
            self._decoders = None

    def _draft(self) -> float:
        """Let requests have drafts for the next step; the seconds that it takes."""
        if self._speculation is None:
            return 0.0
        return self._speculation.prepare(self.scheduler.running, self.scheduler.config)

    def _step(self, batch: Batch, hit_tokens: int, drafting: float) -> None:
        """Take a step that the scheduler chose, before which drafting took some seconds."""
        work = StepWork.of_batch(batch, self._groups)
        play, speculation, moments = self._play, self._speculation, self._moments
        if speculation is not None:
            work = speculation.profile.verified(work)
        if play is None:
            device, host = self._cost.device_seconds(work), self._cost.host_seconds(work)
        else:
            device, host = play.seconds(batch, self._cost, self._groups)
        if speculation is not None:
            tokens = speculation.yielded(batch)
        elif play is not None:
            tokens = play.tokens(batch, self._tokens)
        else:
            tokens = self._sampled(batch.sequences)
        slower = self._even or self._pace.at(self.now)
        device, host, drafting = slower * device, slower * host, slower * drafting
        result = BatchResult(tokens, device, host)
        start, end = self.now, self.now + device + host + drafting
        if self._on_step is not None:
            record = step_record(
                batch, result, start, drafting, self.scheduler, self._groups, hit_tokens
            )
            self._on_step(record)
        host += drafting
        self.totals.count(work, device, host, hit_tokens, self.scheduler.pool.num_used)
        if batch.num_preemptions:
            self.totals.preemptions += batch.num_preemptions
            moments.close_preempted()
        finished = self.scheduler.update(batch, result)
        if speculation is not None:
            self.totals.count_drafts(batch, result, end - start, drafting)
            speculation.observe(batch, result)
        moments.ends.append(end)
        if self._stamps:
            for sequence, got in zip(batch.sequences, tokens, strict=True):
                moments.stamp(sequence.request, len(got))
        elif moments.num_open < len(moments.unfinished):
            sampled = [s.request for s in batch.sequences if s.samples]
            moments.open_from(len(moments.ends) - 1, sampled)
        for request in finished:
            if speculation is not None:
                speculation.forget(request)
            self._leave(request, "finished", None)
        count = len(batch.sequences)
        self.now = end + self._times.gap_of(count)
        self._alone = count if batch.num_decodes == count else 0

    def _step_beside(self, decoders: Decoders) -> bool:
        """Take a step of the decodes and of prompts beside them; False if there is nothing to do.

        It is what `Scheduler.schedule` would choose where nobody is preempted.
        """
        scheduler, moments = self.scheduler, self._moments
        decodes, seen = decoders.count, decoders.seen
        hits = scheduler.pool.hit_tokens
        chunks: list[ScheduledSequence] = []
        scheduler.add_prompts(chunks, decoders.prompts, decodes, self.now)
        if not chunks and not decodes:
            return False
        work = StepWork.of_chunks(chunks, decodes, seen)
        slower = self._even or self._pace.at(self.now)
        device = slower * self._cost.device_seconds(work)
        host = slower * self._cost.host_seconds(work)
        end = self.now + device + host
        pool = scheduler.pool
        self.totals.count(work, device, host, pool.hit_tokens - hits, pool.num_used)
        if moments.num_open < decodes:  # the last chunk of a prompt, a single token, is a decode
            due = [r for r in scheduler.running if r.num_pending_tokens == 1]
            moments.open_from(len(moments.ends), due)
        moments.ends.append(end)
        decoders.tick()
        self._finish(decoders.completed())
        if chunks:
            tokens = self._sampled(chunks)
            finished = scheduler.update(Batch(chunks, 0), BatchResult(tokens, device, host))
            moments.open_from(len(moments.ends) - 1, [s.request for s in chunks if s.samples])
            for request in finished:
                self._leave(request, "finished", None)
            decoders.end_step(chunks)
        self.now = end + self._times.gap_of(decodes + len(chunks))
        self._alone = 0 if chunks else decodes
        return True

    def _run_steady(self, steps: int, until: float) -> None:
        """Take several steps of decodes alone."""
        decoders, moments, totals = self._decoders, self._moments, self.totals
        assert decoders is not None
        count, seen = decoders.count, decoders.seen
        slower = self._even or self._pace.at(self.now)
        gap = self._times.gap_of(count)
        ends = self._steady_ends(steps, until)
        if ends is None:  # played one by one, though nothing need be scheduled
            ends = [self.now + slower * self._seconds_of_decodes(count, seen) + gap]
        steps = len(ends)
        began, self.now = self.now, ends[-1]
        if moments.num_open < count:  # the last chunk of a prompt, a single token, looks as decodes
            moments.open_from(len(moments.ends), self.scheduler.running)
        moments.ends += [end - gap for end in ends] if gap else ends
        if self._in_order:
            self._settle()
            finished = advance_in_order(self.scheduler, steps, self._tokens)
            used = self.scheduler.pool.num_used
        else:
            decoders.advance(steps)
            used = self.scheduler.pool.num_used
            finished = decoders.completed()
        host = steps * slower * self._cost.host_seconds(StepWork.of_decodes(count, seen))
        totals.steps += steps
        totals.sequences += steps * count
        totals.host_seconds += host
        totals.device_seconds += max(0.0, self.now - began - steps * gap - host)
        totals.peak_blocks = max(totals.peak_blocks, used)
        self._finish(finished)
        self._alone = 0

    def _line(self, sequences: int) -> DecodeLine | None:
        lines = self._lines
        if sequences not in lines:
            lines[sequences] = self._cost.decode_line(sequences)
        return lines[sequences]

    def _seconds_of_decodes(self, sequences: int, seen: int) -> float:
        work = StepWork.of_decodes(sequences, seen)
        return self._cost.device_seconds(work) + self._cost.host_seconds(work)

    def _sampled(self, sequences: Sequence[ScheduledSequence]) -> list[list[int]]:
        """The token that each sequence of a step gets, if it gets one."""
        return [[self._token(s.request)] if s.samples else _NONE for s in sequences]

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

    def _finish(self, requests: Sequence[Request]) -> None:
        """Let requests leave that got their last token."""
        for request in requests:
            self.scheduler.finish(request, FinishReason.LENGTH)
            self._leave(request, "finished", None)

    def _leave(self, request: Request, outcome: Outcome, reason: str | None) -> None:
        record = self._moments.leave(request, outcome, reason)
        if outcome == "finished":
            self.departures.append(record.token_times[-1])
        self._records.append(record)


@functools.lru_cache(maxsize=4096)
def _sampling(length: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=length, min_tokens=0, ignore_eos=True)
