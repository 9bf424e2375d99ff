"""The engine: takes requests in, steps the scheduler and an executor, hands outputs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

from engine.batch import Batch, BatchResult, Executor
from engine.block_groups import ONE_GROUP, BlockGroup, mean_visible_tokens
from engine.blocks import BlockPool
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError, EngineError, RequestRefused
from engine.output import Detokenizer, RequestOutput
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.step_record import StepRecord


class CacheShape(NamedTuple):
    """What a KV cache holds: its blocks, and the longest sequence (tokens) it is to serve.

    `groups` are the model's layers by what they see; blocks serve all of them.
    """

    num_blocks: int
    max_model_len: int
    groups: tuple[BlockGroup, ...] = ONE_GROUP


class Engine:
    """Serves requests with one executor; one `step` computes one batch.

    `add` and `abort` may be called from any thread while another steps: they leave a note that
    the next step reads, so they never wait for a step. Everything else belongs to the stepping
    thread.

    Every request that `add` took leaves exactly once, in an output with a `finish_reason`:
    finished, aborted or refused.

    Args:
        config: the knobs.
        executor: runs batches; it must have room for the blocks of `cache`.
        cache: the KV cache that the executor has.
        eos_token_ids: tokens that end a sequence unless it ignores them.
        vocab_size: refuse prompts with token ids beyond it; None does not check.
        clock: seconds; a simulator passes a virtual one that its executor moves on by the
            seconds that it reports.
        detokenizer: makes text of tokens and finds stop texts; None leaves texts empty and
            refuses requests with stop texts.
        rebuild_cache: replaces the executor's KV cache by one for the given config and tells its
            shape. If it raises, the executor must still serve the old shape; contents may be lost.
        apply_live: tells the executor of changed live knobs.
        on_step: receives each step's record; records are not kept here.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        cache: CacheShape,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        vocab_size: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        detokenizer: Detokenizer | None = None,
        rebuild_cache: Callable[[EngineConfig], CacheShape] | None = None,
        apply_live: Callable[[EngineConfig], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self.executor = executor
        self.clock = clock
        self.on_step = on_step
        self.scheduler = Scheduler(
            config,
            _pool(config, cache),
            cache.max_model_len,
            eos_token_ids=eos_token_ids,
            vocab_size=vocab_size,
        )
        self._groups = cache.groups
        self._detokenizer = detokenizer
        self._rebuild_cache = rebuild_cache
        self._apply_live = apply_live
        self._inbox: SimpleQueue[Request | str] = SimpleQueue()
        self._unfinished: dict[str, Request] = {}
        # Last outputs of requests that left otherwise than by a step's tokens.
        self._departures: list[RequestOutput] = []

    @property
    def config(self) -> EngineConfig:
        """The knobs in force; `reconfigure` changes them."""
        return self.scheduler.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and output together."""
        return self.scheduler.max_model_len

    @property
    def pool(self) -> BlockPool:
        """The KV cache's blocks."""
        return self.scheduler.pool

    @property
    def num_unfinished(self) -> int:
        """Requests added whose last output has not been handed out."""
        return len(self._unfinished)

    @property
    def has_unfinished(self) -> bool:
        """Whether a further `step` is needed."""
        return bool(self._unfinished)

    def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        arrival: float | None = None,
        priority: int = 0,
    ) -> Request:
        """Take in a request; whether it is refused shows in the outputs of the next step.

        Args:
            request_id: unique among unfinished requests.
            token_ids: the prompt; copied.
            sampling: how tokens are chosen; `SamplingParams()` by default.
            arrival: seconds on the engine's clock; now by default.
            priority: the lower is served first under the policy `priority`.

        Raises:
            RequestRefused: the id is in use.
        """
        request = Request(
            request_id,
            list(token_ids),
            sampling or SamplingParams(),
            self.clock() if arrival is None else arrival,
            priority,
        )
        # One atomic operation, so that two threads cannot both take an id.
        if self._unfinished.setdefault(request_id, request) is not request:
            raise RequestRefused(
                f"request id {request_id!r} is in use; ids of unfinished requests must differ"
            )
        self._inbox.put(request)
        return request

    def abort(self, request_id: str) -> None:
        """Let the next step take this request out; an id that is not in use is ignored."""
        self._inbox.put(request_id)

    def abort_all(self) -> None:
        """Take every request out; their outputs come with the next step."""
        self._read_inbox()
        for request in list(self._unfinished.values()):
            if self.scheduler.abort(request.request_id) is not None:
                self._depart(request)

    def next_wakeup(self) -> float | None:
        """When the next step will have something to do, on the engine's clock; None: on an add.

        Later than now only while dynamic batching waits for a full batch.
        """
        now = self.clock()
        if self._departures or not self._inbox.empty():
            return now
        return self.scheduler.next_wakeup(now)

    def step(self) -> list[RequestOutput]:
        """Compute one batch and return what each request got from it.

        Returns without computing if nothing can run yet (see `next_wakeup`).

        Raises:
            Exception: whatever the executor raised. The requests of its batch are aborted, their
                `refusal` says why, and the next step hands out their outputs; the others go on.
        """
        clock = self.clock
        start = clock()
        self._read_inbox()
        scheduler = self.scheduler
        pool = scheduler.pool
        hits_before = pool.hit_tokens
        schedule_start = clock()
        batch = scheduler.schedule(schedule_start)
        schedule_end = clock()
        if not batch.sequences:
            return self._take_departures()
        blocks_used, blocks_cached = pool.num_used, pool.num_cached
        queue_length, running = len(scheduler.waiting), len(scheduler.running)
        hit_tokens = pool.hit_tokens - hits_before
        try:
            result = self.executor.execute(batch)
            _check_result(batch, result)
        except Exception as error:
            self._give_up(batch, error)
            raise
        update_start = clock()
        scheduler.update(batch, result)
        update_end = clock()
        outputs = self._take_departures()
        outputs += self._outputs(batch, result)
        if self.on_step is not None:
            num_tokens = batch.num_tokens
            elapsed = clock() - start
            self.on_step(
                StepRecord(
                    start=start,
                    prefill_tokens=num_tokens - batch.num_decodes,
                    prefill_sequences=len(batch.sequences) - batch.num_decodes,
                    decode_sequences=batch.num_decodes,
                    kv_tokens_read=self._kv_tokens_read(batch),
                    device_seconds=result.device_seconds,
                    # A virtual clock's sums may round below the executor's own account.
                    host_seconds=max(result.host_seconds, elapsed - result.device_seconds),
                    scheduler_seconds=schedule_end - schedule_start + update_end - update_start,
                    queue_length=queue_length,
                    running=running,
                    blocks_used=blocks_used,
                    blocks_cached=blocks_cached,
                    blocks_total=pool.num_blocks,
                    preemptions=batch.num_preemptions,
                    prefix_hit_tokens=hit_tokens,
                    drafted_tokens=result.drafted_tokens,
                    accepted_tokens=result.accepted_tokens,
                )
            )
        return outputs

    def reconfigure(self, **knobs: object) -> EngineConfig:
        """Change `live` and `cache` knobs between two steps and return the config in force.

        For `cache` knobs the KV cache is rebuilt: running requests are computed again, those that
        the new cache can never hold are refused, and what was cached is forgotten. The rest goes
        on as it was. Requests taken in earlier stay in, even if a live limit would now refuse
        them.

        Raises:
            ConfigError: a bad value, a contradiction, or a knob that needs the model loaded again.
            EnvironmentLacks: no memory for the new cache.

        Whatever is raised, the old config stays in force and every request goes on; after a failed
        rebuild the running ones are computed again.
        """
        old = self.config
        new = old.replace(**knobs)
        heavy = [
            name
            for name, knob in KNOBS.items()
            if knob.reload == "weights" and getattr(old, name) != getattr(new, name)
        ]
        if heavy:
            raise ConfigError(
                f"{', '.join(heavy)} cannot change in a loaded engine: load the model again with "
                "the new value"
            )
        needed = old.reload_needed(new)
        if needed is None:
            return new
        apply_live = self._apply_live
        if apply_live is not None:
            apply_live(new)
        if needed == "cache":
            try:
                self._replace_cache(new)
            except Exception:
                if apply_live is not None:
                    apply_live(old)
                raise
        self.scheduler.config = new
        return new

    def clear_prefix_cache(self) -> None:
        """Forget what was cached, for instance between two measurements."""
        self.pool.clear_prefix_cache()

    def _replace_cache(self, config: EngineConfig) -> None:
        if self._rebuild_cache is None:
            raise ConfigError("this engine cannot rebuild its KV cache; make a new engine")
        self._read_inbox()
        # The old cache's memory may have to go before the new one's is taken, so its contents
        # are given up first; if the rebuild fails, they are computed again in the old shape.
        self.scheduler.preempt_all()
        self.pool.clear_prefix_cache()
        shape = self._rebuild_cache(config)
        self._groups = shape.groups
        for request in self.scheduler.replace_pool(_pool(config, shape), shape.max_model_len):
            self._depart(request)

    def _read_inbox(self) -> None:
        while True:
            try:
                note = self._inbox.get_nowait()
            except Empty:
                return
            if isinstance(note, str):
                request = self.scheduler.abort(note)
                if request is not None:
                    self._depart(request)
                continue
            if note.sampling.stop and self._detokenizer is None:
                note.state = RequestState.FINISHED
                note.finish_reason = FinishReason.REFUSED
                note.refusal = "stop texts need a tokenizer, and this engine has none"
            if note.state is not RequestState.FINISHED and self.scheduler.add(note):
                if self._detokenizer is not None:
                    self._detokenizer.add(note)
            else:
                self._departures.append(RequestOutput(note, [], "", note.finish_reason))

    def _depart(self, request: Request) -> None:
        """Note the last output of a request that was taken out."""
        text = "" if self._detokenizer is None else self._detokenizer.finish(request)
        self._departures.append(RequestOutput(request, [], text, request.finish_reason))

    def _kv_tokens_read(self, batch: Batch) -> int:
        if self.pool.uniform:
            return batch.num_kv_tokens
        groups = self._groups
        seen = (mean_visible_tokens(groups, s.end, s.num_tokens) for s in batch.sequences)
        return round(sum(seen))

    def _take_departures(self) -> list[RequestOutput]:
        outputs, self._departures = self._departures, []
        for output in outputs:
            del self._unfinished[output.request.request_id]
        return outputs

    def _give_up(self, batch: Batch, error: Exception) -> None:
        reason = f"the step that computed it failed: {type(error).__name__}: {error}"
        for sequence in batch.sequences:
            if self.scheduler.finish(sequence.request, FinishReason.ABORT, reason):
                self._depart(sequence.request)

    def _outputs(self, batch: Batch, result: BatchResult) -> list[RequestOutput]:
        """The outputs of the step's requests, after `Scheduler.update`."""
        outputs: list[RequestOutput] = []
        detokenizer = self._detokenizer
        logprobs = result.logprobs
        for i, sequence in enumerate(batch.sequences):
            if not sequence.samples:
                continue
            request = sequence.request
            # A sequence that sampled had all its tokens computed: those after `end` are new.
            tokens = request.token_ids[sequence.end :]
            text = ""
            if detokenizer is not None:
                text, tokens = self._text(detokenizer, request, tokens, sequence.end)
            chosen = logprobs[i] if logprobs else None
            if chosen is not None:
                chosen = chosen[: len(tokens)]
            reason = request.finish_reason
            if reason is not None:
                del self._unfinished[request.request_id]
            outputs.append(RequestOutput(request, tokens, text, reason, chosen))
        return outputs

    def _text(
        self, detokenizer: Detokenizer, request: Request, tokens: list[int], end: int
    ) -> tuple[str, list[int]]:
        """The new text, and the new tokens up to a stop text; finishes the request at one."""
        ended_by_token = request.finish_reason is FinishReason.STOP
        delta = detokenizer.append(request, tokens[:-1] if ended_by_token else tokens)
        if delta.stop_at is not None:
            tokens = tokens[: delta.stop_at]
            del request.token_ids[end + delta.stop_at :]
            if not self.scheduler.finish(request, FinishReason.STOP):
                request.finish_reason = FinishReason.STOP  # the step's tokens had ended it too
        if request.finish_reason is None:
            return delta.text, tokens
        return delta.text + detokenizer.finish(request), tokens


def _pool(config: EngineConfig, cache: CacheShape) -> BlockPool:
    windows = [group.window for group in cache.groups]
    return BlockPool(cache.num_blocks, config.block_size, config.enable_prefix_caching, windows)


def _check_result(batch: Batch, result: BatchResult) -> None:
    """Refuse a result that does not answer the batch, before anything is recorded.

    Raises:
        EngineError: a sequence is missing, or one that samples got no token or the reverse.
    """
    if len(result.tokens) != len(batch.sequences):
        raise EngineError(
            f"the executor returned tokens for {len(result.tokens)} of {len(batch.sequences)} "
            "sequences"
        )
    for sequence, tokens in zip(batch.sequences, result.tokens, strict=True):
        if bool(tokens) is not sequence.samples:
            raise EngineError(
                f"the executor returned {len(tokens)} tokens for request "
                f"{sequence.request.request_id!r}, which "
                f"{'samples' if sequence.samples else 'does not sample'} in this step"
            )
