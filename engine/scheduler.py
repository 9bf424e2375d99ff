"""Chooses what each step computes: continuous batching with chunked prefill and preemption.

Pure Python over token counts and block ids, so that an engine on a device and a simulator in
virtual time schedule alike.

Progress is guaranteed: requests have a total order (`Request.rank`), the lowest is served first
and never preempted for another, and admission control lets in only what fits the cache alone.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from engine.admission import refusal_at_entry, refusal_for_size
from engine.batch import Batch, BatchResult, ScheduledSequence, chunk_size
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.priority_preemption import give_way
from engine.request import FinishReason, Request, RequestState
from engine.speculate.scheduling import add_drafts, keep_accepted
from engine.waiting_queue import WaitingQueue, rank

_RUNNING = RequestState.RUNNING
_rank = attrgetter("rank")


class Scheduler:
    """Schedules requests on the blocks of one pool; one `schedule` and one `update` a step.

    `schedule` may be called again without `update` when a step did not happen: progress is
    recorded by `update` alone.

    Args:
        config: the knobs; assign `config` to change live ones, from the next `schedule` on.
        pool: the KV cache's blocks.
        max_model_len: most tokens of a sequence, prompt and output together.
        eos_token_ids: tokens that end a sequence unless it ignores them.
        vocab_size: refuse prompts with token ids beyond it; None does not check.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
    ) -> None:
        self.pool = pool
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size
        self.running: list[Request] = []  # in rank order
        self.waiting = WaitingQueue()
        self._requests: dict[str, Request] = {}
        self._entered = 0
        # The head of the queue and the blocks available when it last did not fit.
        self._blocked: tuple[Request, int] | None = None
        self._config = config
        self.config = config

    @property
    def config(self) -> EngineConfig:
        """The knobs in force."""
        return self._config

    @config.setter
    def config(self, config: EngineConfig) -> None:
        policy = config.scheduling_policy
        if policy != self._config.scheduling_policy:
            for request in self._requests.values():
                request.rank = rank(request, policy, request.rank[1])
            self.running.sort(key=_rank)
            self.waiting.rebuild()
        self._config = config
        self._blocked = None
        self.pool.enable_prefix_caching = config.enable_prefix_caching

    @property
    def num_unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def add(self, request: Request) -> bool:
        """Let a new request wait, or refuse it.

        Returns whether it was let in. If not, it is FINISHED as REFUSED and `refusal` says why.
        """
        reason = (
            f"request id {request.request_id!r} is in use; ids of unfinished requests must differ"
            if request.request_id in self._requests
            else refusal_at_entry(
                request,
                self._config,
                self.pool,
                self.max_model_len,
                self.vocab_size,
                len(self.waiting),
            )
        )
        if reason is not None:
            request.state = RequestState.FINISHED
            request.finish_reason = FinishReason.REFUSED
            request.refusal = reason
            return False
        self._entered += 1
        request.rank = rank(request, self._config.scheduling_policy, self._entered)
        request.state = RequestState.WAITING
        request.tables = self.pool.new_tables(request.cache_salt)
        self._requests[request.request_id] = request
        self.waiting.push(request)
        return True

    def schedule(self, now: float) -> Batch:
        """Choose the next step; an empty batch means that nothing can run yet (`next_wakeup`).

        Decodes come first, then prompts that are being computed, then waiting requests. `now` is
        in seconds on the clock of `Request.arrival`; only dynamic batching looks at it.
        """
        config = self._config
        running = self.running
        num_preemptions = 0
        while len(running) > config.max_num_seqs:  # the limit was lowered
            self._preempt_last()
            num_preemptions += 1
        if config.scheduling_policy == "priority" and config.batching_mode == "continuous":
            num_preemptions += give_way(
                self.waiting.peek(),
                running,
                self.pool,
                config.max_num_seqs,
                self._reserve(),
                self._preempt_last,
            )

        sequences: list[ScheduledSequence] = []
        prefills: list[Request] = []
        room = config.max_num_batched_tokens  # bounds what a prompt can be given
        drafted = False
        # Preemption takes the last request of the list: this one or one that is yet to come.
        for request in running:
            num_tokens = len(request.token_ids)
            if num_tokens > request.tables.capacity:
                while not self._grow(request, room - len(sequences)):
                    num_preemptions += 1
                    if self._preempt_last() is request:
                        break
                if request.state is not _RUNNING:
                    break
            computed = request.num_computed_tokens
            if num_tokens - computed == 1:
                sequences.append(ScheduledSequence(request, computed, 1, True))
                drafted |= request.draft is not None
            else:
                prefills.append(request)
                reserved = request.tables.capacity - computed
                room -= min(reserved, chunk_size(config, num_tokens - computed, room))
        num_decodes = len(sequences)
        self.add_prompts(sequences, prefills, num_decodes, now)
        if drafted:
            longest = self.max_model_len
            add_drafts(sequences, num_decodes, config, self.pool, longest, self._reserve())
        return Batch(sequences, num_decodes, num_preemptions)

    def add_prompts(
        self,
        sequences: list[ScheduledSequence],
        prefills: list[Request],
        num_decodes: int,
        now: float,
    ) -> None:
        """Give prompts the tokens that the decodes of a step leave.

        First to `prefills`, those running ones that are not computed yet, then to waiting requests
        as far as seats and blocks last; appends to the step's `sequences`. A part of `schedule`.
        """
        budget = self._config.max_num_batched_tokens - num_decodes
        for request in prefills:
            if budget > 0:
                budget -= self._append_chunk(sequences, request, budget)
        if len(self.running) < self._config.max_num_seqs and self._admits(now):
            self._admit(sequences, budget, now)

    def update(self, batch: Batch, result: BatchResult) -> list[Request]:
        """Take in what a step produced; returns the requests that finished by it.

        Requests that left while the step ran are passed over.
        """
        pool = self.pool
        block_size = pool.block_size
        has_windows = not pool.uniform
        eos = self.eos_token_ids
        finished: list[Request] = []
        for sequence, tokens in zip(batch.sequences, result.tokens, strict=True):
            request = sequence.request
            if request.state is not _RUNNING:
                continue
            start = sequence.start
            end = start + sequence.num_tokens
            token_ids = request.token_ids
            verified = sequence.draft is not None
            request.draft = None
            if not verified:
                if end // block_size != start // block_size:
                    pool.register(request.tables, token_ids, end)
                request.num_computed_tokens = end
                if has_windows:
                    pool.give_up_before(request.tables, end)
            for token in tokens:
                token_ids.append(token)
                sampling = request.sampling
                if (
                    (token in eos and not sampling.ignore_eos)
                    or (sampling.stop_token_ids and token in sampling.stop_token_ids)
                ) and len(token_ids) - request.num_prompt_tokens >= sampling.min_tokens:
                    request.finish_reason = FinishReason.STOP
                elif len(token_ids) >= request.max_total_tokens:
                    request.finish_reason = FinishReason.LENGTH
                else:
                    continue
                request.state = RequestState.FINISHED
                finished.append(request)
                break
            else:
                if verified:
                    keep_accepted(request, pool, start, start + len(tokens))
        if finished:
            for request in finished:
                pool.free(request.tables)
                del self._requests[request.request_id]
            self.running[:] = [r for r in self.running if r.state is _RUNNING]
        return finished

    def finish(self, request: Request, reason: FinishReason, refusal: str | None = None) -> bool:
        """Take an unfinished request out, for instance at a stop text; False if it had finished."""
        if self._requests.get(request.request_id) is not request:
            return False
        del self._requests[request.request_id]
        state = request.state
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.refusal = refusal
        if state is _RUNNING:
            self.running.remove(request)
            self.pool.free(request.tables)
        else:
            self.waiting.forget()
        return True

    def abort(self, request_id: str) -> Request | None:
        """Take out the request with this id; None if no unfinished one has it."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, FinishReason.ABORT)
        return request

    def next_wakeup(self, now: float) -> float | None:
        """When `schedule` will have something to run, in seconds; None if nothing waits or runs.

        Later than `now` only while dynamic batching waits for a full batch; a new request may
        bring it forward.
        """
        if self.running:
            return now
        if not self.waiting:
            return None
        config = self._config
        if config.batching_mode != "dynamic" or len(self.waiting) >= config.max_num_seqs:
            return now
        return max(now, min(r.arrival for r in self.waiting) + config.max_queue_delay)

    def preempt_all(self) -> None:
        """Send every running request back to the queue, to be computed again."""
        while self.running:
            self._preempt_last()

    def replace_pool(self, pool: BlockPool, max_model_len: int) -> list[Request]:
        """Go on with another KV cache; returns the requests that it can never hold, as refused.

        Running requests are preempted and computed again.
        """
        self.preempt_all()
        self.pool = pool
        self.max_model_len = max_model_len
        for request in self._requests.values():
            request.tables = pool.new_tables(request.cache_salt)
        self._blocked = None
        refused: list[Request] = []
        for request in list(self._requests.values()):
            reason = refusal_for_size(request, pool, max_model_len)
            if reason is not None:
                self.finish(request, FinishReason.REFUSED, reason)
                refused.append(request)
        return refused

    def check_integrity(self) -> None:
        """Check that blocks and requests agree.

        Raises:
            BlockPoolCorrupt: they do not.
        """
        self.pool.check_integrity(r.tables for r in self.running)
        assert self.running == sorted(self.running, key=_rank)
        assert len(self.running) + len(self.waiting) == len(self._requests)
        assert all(not r.tables.capacity and not r.num_computed_tokens for r in self.waiting)

    def _admits(self, now: float) -> bool:
        mode = self._config.batching_mode
        if mode == "continuous":
            return True
        if self.running:
            return False
        wakeup = self.next_wakeup(now)
        return wakeup is not None and wakeup <= now

    def _admit(self, sequences: list[ScheduledSequence], budget: int, now: float) -> None:
        """Move waiting requests to the running ones while seats, blocks and tokens last."""
        config = self._config
        pool = self.pool
        running = self.running
        # A static batch is chosen at once, even if its prompts take several steps.
        whole_batch = config.batching_mode != "continuous"
        while len(running) < config.max_num_seqs and (budget > 0 or whole_batch):
            request = self.waiting.peek()
            if request is None or self._is_blocked(request):
                return
            num_tokens = len(request.token_ids)
            prefix = pool.match_prefix(request.tables, request.token_ids)
            start = prefix.num_blocks * pool.block_size
            if request.num_received_tokens > start and not request.num_preemptions:
                start = request.num_received_tokens
            pending = num_tokens - start
            # A recomputed sequence may have outgrown a step; chunks are then the only way.
            if not config.enable_chunked_prefill and (
                budget < pending <= config.max_num_batched_tokens
            ):
                return
            end = start + chunk_size(config, pending, budget)
            if not pool.allocate(request.tables, prefix, num_tokens, self._reserve(), end):
                self._blocked = (request, pool.num_available)
                return
            self._start(request, start, now)
            if budget > 0:
                budget -= self._append_chunk(sequences, request, budget)

    def _start(self, request: Request, num_cached_tokens: int, now: float) -> None:
        self.waiting.pop()
        request.state = _RUNNING
        request.num_computed_tokens = num_cached_tokens
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.num_cached_tokens = num_cached_tokens
        insort(self.running, request, key=_rank)

    def _append_chunk(
        self, sequences: list[ScheduledSequence], request: Request, budget: int
    ) -> int:
        """Schedule the next tokens of a prompt, at most `budget`; returns how many."""
        start = request.num_computed_tokens
        pending = len(request.token_ids) - start
        room = request.tables.capacity - start
        num_tokens = min(chunk_size(self._config, pending, budget), room)
        if num_tokens:
            sequences.append(ScheduledSequence(request, start, num_tokens, num_tokens == pending))
        return num_tokens

    def _grow(self, request: Request, room: int) -> bool:
        """Give a running request the blocks for its next tokens; False if it needs others' blocks.

        Where layers have windows, a prompt gets them chunk by chunk, for at most `room` tokens;
        rather than let others be preempted it is content with a smaller chunk.
        """
        num_tokens = len(request.token_ids)
        if self.pool.uniform:
            return self.pool.extend(request.tables, num_tokens)
        start = request.num_computed_tokens
        pending = num_tokens - start
        chunk = 1 if pending == 1 else chunk_size(self._config, pending, room)
        return not chunk or self.pool.extend(request.tables, num_tokens, start + 1, start + chunk)

    def _is_blocked(self, request: Request) -> bool:
        """Whether the head of the queue did not fit and no block has come free since.

        Spares looking up a long prompt's prefix at every step while the cache is full.
        """
        head, available = self._blocked or (None, 0)
        return head is request and self.pool.num_available <= available

    def _reserve(self) -> int:
        """Blocks to leave free at an admission; none if nothing else could make room."""
        return int(self._config.watermark * self.pool.num_blocks) if self.running else 0

    def _preempt_last(self) -> Request:
        """Send the running request of highest rank back to the queue; its blocks are given up."""
        request = self.running.pop()
        self.pool.free(request.tables)
        request.num_computed_tokens = 0
        request.draft = None
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.waiting.push(request)
        return request
