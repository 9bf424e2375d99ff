"""The engine: takes requests in, steps the scheduler and an executor, hands outputs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, cast

from engine.attention_work import AttentionWork, attention_work
from engine.batch import Batch, Executor, PipelinedExecutor
from engine.block_groups import ONE_GROUP, BlockGroup
from engine.block_tables import salt_of
from engine.blocks import BlockPool
from engine.config import KNOBS, EngineConfig
from engine.errors import ConfigError, RequestRefused
from engine.launched_step import Completed, LandedStep, LaunchedStep, check_result
from engine.outbox import Outbox
from engine.output import Detokenizer, RequestOutput
from engine.request import FinishReason, Request, RequestState, SamplingParams
from engine.scheduler import Scheduler
from engine.step_record import StepRecord

if TYPE_CHECKING:  # it computes with numpy, which scheduling does without
    from engine.speculate.speculator import Speculator


class CacheShape(NamedTuple):
    """What a KV cache holds: its blocks, and the longest sequence (tokens) it is to serve.

    `groups` are the model's layers by what they see; blocks serve all of them.
    """

    num_blocks: int
    max_model_len: int
    groups: tuple[BlockGroup, ...] = ONE_GROUP


class Engine:
    """Serves requests with one executor; one `step` computes one batch.

    With a pipelined executor a step is on its way when `step` returns: the outputs are those of the
    step before, which were made while the device went on.

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
        outgrown_by: whether live knobs ask for steps beyond those that the cache was sized beside;
            it is then rebuilt.
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
        outgrown_by: Callable[[EngineConfig], bool] | None = None,
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
        self._pipelined = bool(getattr(executor, "pipelined", False))
        self._rebuild_cache = rebuild_cache
        self._apply_live = apply_live
        self._outgrown_by = outgrown_by
        self._inbox: SimpleQueue[Request | str] = SimpleQueue()
        self._outbox = Outbox(self.scheduler, detokenizer)
        self._in_flight: LaunchedStep | None = None
        self._landed: LandedStep | None = None

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
        return len(self._outbox.unfinished)

    @property
    def has_unfinished(self) -> bool:
        """Whether a further `step` is needed."""
        return bool(self._outbox.unfinished)

    def add(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        arrival: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Request:
        """Take in a request; whether it is refused shows in the outputs of the next step.

        Args:
            request_id: unique among unfinished requests.
            token_ids: the prompt; copied.
            sampling: how tokens are chosen; `SamplingParams()` by default.
            arrival: seconds on the engine's clock; now by default.
            priority: the lower is served first under the policy `priority`.
            cache_salt: prefixes are shared with requests of the same salt alone.

        Raises:
            RequestRefused: the id is in use.
        """
        request = Request(
            request_id,
            list(token_ids),
            sampling or SamplingParams(),
            self.clock() if arrival is None else arrival,
            priority,
            cache_salt=salt_of(cache_salt),
        )
        # One atomic operation, so that two threads cannot both take an id.
        if self._outbox.unfinished.setdefault(request_id, request) is not request:
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
        for request in list(self._outbox.unfinished.values()):
            if self.scheduler.abort(request.request_id) is not None:
                self._outbox.depart(request)

    def next_wakeup(self) -> float | None:
        """When the next step will have something to do, on the engine's clock; None: on an add.

        Later than now only while dynamic batching waits for a full batch.
        """
        now = self.clock()
        if self._outbox or self._in_flight or self._landed or not self._inbox.empty():
            return now
        return self.scheduler.next_wakeup(now)

    def step(self) -> list[RequestOutput]:
        """Compute one batch and return what each request got from it.

        Returns without computing if nothing can run yet (see `next_wakeup`).

        Raises:
            Exception: whatever the executor raised. The requests of its batch are aborted, their
                `refusal` says why, and the next step hands out their outputs; the others go on.
        """
        if self._landed is not None:  # an interrupt came before its outputs
            self._emit()
        start = self._land() if self._in_flight is not None else self.clock()
        self._read_inbox()
        step = self._schedule(start)
        if step is not None:
            self._launch(step)
            if not self._pipelined:
                self._land()
        if self._landed is not None:
            self._emit()
        outputs = self._outbox.take()
        speculator = self._speculator
        if speculator is not None:
            for output in outputs:
                if output.finish_reason is not None:
                    speculator.forget(output.request)
        if self._in_flight is not None:
            self._in_flight.returned = self.clock()
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

        Whatever of these is raised, the old config stays in force and every request goes on; after
        a failed rebuild the running ones are computed again. A step on its way is waited for first,
        and what its executor raises is raised as by `step`.
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
        if self._outgrown_by is not None and self._outgrown_by(new):
            needed = "cache"
        self._settle()
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
        """Forget what was cached, for instance between two measurements; drafts' sources too."""
        self._settle()
        self.pool.clear_prefix_cache()
        if self._speculator is not None:
            self._speculator.clear()

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
            self._outbox.depart(request)

    def _settle(self) -> None:
        """Wait for the step on its way, if any; its outputs come with the next step."""
        if self._in_flight is not None:
            self._land()
        if self._landed is not None:
            self._emit()

    def _read_inbox(self) -> None:
        while True:
            try:
                note = self._inbox.get_nowait()
            except Empty:
                return
            if isinstance(note, str):
                if self._landed is not None:  # what it got before comes before
                    self._emit()
                request = self.scheduler.abort(note)
                if request is not None:
                    self._outbox.depart(request)
                continue
            if note.sampling.stop and not self._outbox.finds_stops:
                note.state = RequestState.FINISHED
                note.finish_reason = FinishReason.REFUSED
                note.refusal = "stop texts need a tokenizer, and this engine has none"
            if note.state is not RequestState.FINISHED and self.scheduler.add(note):
                self._outbox.begin(note)
            else:
                self._outbox.refuse(note)

    @property
    def _speculator(self) -> Speculator | None:
        speculator: Speculator | None = getattr(self.executor, "speculator", None)
        return speculator

    def _schedule(self, start: float) -> LaunchedStep | None:
        """Choose the next batch, and note how things stand; None if nothing can run."""
        scheduler = self.scheduler
        pool = scheduler.pool
        hits_before = pool.hit_tokens
        speculator = self._speculator
        draft_seconds = 0.0
        if speculator is not None and scheduler.running:
            draft_seconds = speculator.prepare(scheduler.running, self.config)
        schedule_start = self.clock()
        batch = scheduler.schedule(schedule_start)
        schedule_end = self.clock()
        if not batch.sequences:
            return None
        return LaunchedStep(
            batch,
            start,
            schedule_end - schedule_start,
            len(scheduler.waiting),
            len(scheduler.running),
            pool.num_used,
            pool.num_cached,
            pool.num_blocks,
            pool.hit_tokens - hits_before,
            *self._attention_work(batch),
            draft_seconds,
        )

    def _launch(self, step: LaunchedStep) -> None:
        batch = step.batch
        try:
            if self._pipelined:
                step.in_flight = cast("PipelinedExecutor", self.executor).launch(batch)
            else:
                step.in_flight = Completed(self.executor.execute(batch))
        except Exception as error:
            if self._landed is not None:
                self._emit()
            self._give_up(batch, error)
            raise
        step.launched = step.returned = self.clock()
        self._in_flight = step

    def _land(self) -> float:
        """Take in the result of the step on its way; when that was done."""
        step, clock = self._in_flight, self.clock
        assert step is not None
        assert step.in_flight is not None
        asked = clock()
        try:
            result = step.in_flight.wait()
            check_result(step.batch, result)
        except Exception as error:
            self._in_flight = None
            self._give_up(step.batch, error)
            raise
        landed = clock()
        self._in_flight = None
        self.scheduler.update(step.batch, result)
        speculator = self._speculator
        if speculator is not None:
            speculator.observe(step.batch, result)
        step.scheduler_seconds += clock() - landed
        self._landed = LandedStep(step, result, step.idle_seconds(asked, result.device_seconds))
        if self._pipelined:
            self._outbox.collect(step.batch, result, having_stops=True)
        return clock()

    def _emit(self) -> None:
        """Make the landed step's outputs, as far as they are not made, and its record."""
        landed = self._landed
        assert landed is not None
        self._landed = None
        step, result = landed.step, landed.result
        self._outbox.collect(step.batch, result, having_stops=False if self._pipelined else None)
        if self.on_step is not None:
            end = self.clock() if self._in_flight is None else self._in_flight.start
            self.on_step(step.record(result, end, landed.idle_seconds))

    def _attention_work(self, batch: Batch) -> tuple[AttentionWork, int]:
        """What the step's attention does, and the tokens that lie in owned blocks after it."""
        if self.on_step is None:  # nobody asks
            return AttentionWork(), 0
        work = attention_work(batch, self._groups, uniform=self.pool.uniform)
        # Blocks that requests share are full, so that what is not filled is each request's own.
        reserved = sum([r.tables.capacity - r.num_computed_tokens for r in self.scheduler.running])
        pool = self.pool
        return work, pool.num_used * pool.block_size - (reserved - batch.num_tokens)

    def _give_up(self, batch: Batch, error: Exception) -> None:
        reason = f"the step that computed it failed: {type(error).__name__}: {error}"
        for sequence in batch.sequences:
            if self.scheduler.finish(sequence.request, FinishReason.ABORT, reason):
                self._outbox.depart(sequence.request)


def _pool(config: EngineConfig, cache: CacheShape) -> BlockPool:
    windows = [group.window for group in cache.groups]
    return BlockPool(cache.num_blocks, config.block_size, config.enable_prefix_caching, windows)
