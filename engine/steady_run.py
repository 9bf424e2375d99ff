"""Steps in which nothing but lengths changes, counted instead of played.

A simulator spends most of its steps on decodes: the same requests, a token each, step after step.
What the scheduler would do with them is known beforehand and is the same for each, so it is counted
once for all. A request is touched when it begins to decode, when it leaves, and when somebody else
is to look at it (`Decoders.settle`). What can be told of the pool is at every moment what as many
calls of `schedule` and `update` would leave.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter

from engine.batch import ScheduledSequence
from engine.request import Request, RequestState
from engine.scheduler import Scheduler

# Tokens from `first` on of what a request generates: (request, first, count).
Tokens = Callable[[Request, int, int], Sequence[int]]

_rank = attrgetter("rank")
_LONG = 1 << 30


class Decoders:
    """The running requests of a scheduler, of which those that decode get a token in every step.

    Made when the requests are as the scheduler left them, and good as long as nobody else changes
    who runs; `settle` ends it. Counted without stop tokens: requests run to their length. For pools
    of one group without window.

    `count` requests decode; `prompts` are those whose prompts are yet to be computed, in the order
    of their ranks.

    Args:
        scheduler: whose requests run.
        tokens: what requests generate; unlike any other's.
    """

    __slots__ = (
        *("_clock", "_leaving", "_phases", "_pool", "_scheduler", "_size", "_sum", "_tokens"),
        *("count", "prompts"),
    )

    def __init__(self, scheduler: Scheduler, tokens: Tokens) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._size = scheduler.pool.block_size
        self._tokens = tokens
        self._clock = 0  # steps taken
        self._sum = 0  # of tokens computed, less the clock for each
        # By the clock's value, modulo the block size, at which requests begin another block.
        self._phases = [0] * self._size
        self._leaving: list[tuple[int, tuple[int, int], Request]] = []
        self.count = 0
        self.prompts: list[Request] = []
        for request in scheduler.running:
            if request.num_pending_tokens == 1:
                self._leaving.append(self._joined(request))
            else:
                self.prompts.append(request)
        heapify(self._leaving)

    @property
    def seen(self) -> int:
        """Cached tokens that the next step's decodes see together."""
        return self._sum + self.count * (self._clock + 1)

    def steady_steps(self, alone: int) -> int:
        """How many of the next steps decode just the running requests.

        The last of them may finish requests; arrivals end the run earlier. 0 where that cannot be
        told. `alone` are the sequences of the step before, if all of them decoded, or else 0.
        """
        scheduler, count, available = self._scheduler, self.count, self._pool.num_available
        config = scheduler.config
        if self.prompts or not count:
            return 0
        if scheduler.waiting:
            # Whoever waits did not get in last time. Unless something else was computed then, they
            # will not now: the same seats and tokens are left, and no more blocks. Without chunks a
            # prompt may come to fit a step as others' answers, with which it begins, are cached.
            told = config.enable_chunked_prefill and config.scheduling_policy != "priority"
            if alone != count or not told:
                return 0
        elif count > config.max_num_seqs:
            return 0
        if count > config.max_num_batched_tokens:
            return 0
        steps = min(_LONG, self._leaving[0][0] - self._clock)
        if count * (-(-steps // self._size) + 1) > available:
            # Preemptions are the scheduler's.
            while steps and self._growth(steps) > available:
                steps //= 2
        return steps

    def advance(self, steps: int) -> None:
        """Take `steps` steps, at most `steady_steps`; `completed` is to be called after it."""
        self._pool.set_aside(self._growth(steps))
        self._clock += steps

    def completed(self) -> list[Request]:
        """The requests that the last step gave their last token, in the order of their ranks.

        They are to be finished at once, with `Scheduler.finish`.
        """
        leaving, clock, size = self._leaving, self._clock, self._size
        finished: list[Request] = []
        while leaving and leaving[0][0] == clock:
            request = heappop(leaving)[2]
            computed = request.max_total_tokens - 1
            self._phases[(clock - computed) % size] -= 1
            self._sum -= computed - clock
            self.count -= 1
            self._let_go(request, computed)
            finished.append(request)
        return finished

    def begin_step(self) -> bool:
        """Set aside the blocks for a step that computes prompts as well (`Scheduler.add_prompts`).

        False, and nothing happened, if the scheduler must do more than admit who waits.
        """
        scheduler = self._scheduler
        config, running = scheduler.config, scheduler.running
        if config.batching_mode != "continuous" and not running:
            return False  # a whole batch is chosen, also those that are given no tokens yet
        if len(running) > config.max_num_seqs:
            return False
        if config.scheduling_policy == "priority" and scheduler.waiting:
            return False
        growth = self._phases[self._clock % self._size]
        if growth > self._pool.num_available:
            return False
        self._pool.set_aside(growth)
        return True

    def end_step(self, chunks: Sequence[ScheduledSequence]) -> None:
        """Take in what became of the prompts that were computed in the step that `tick` counted."""
        prompts = self.prompts
        for sequence in chunks:
            request = sequence.request
            runs = request.state is RequestState.RUNNING
            if runs and request.num_pending_tokens != 1:
                if request not in prompts:
                    insort(prompts, request, key=_rank)
                continue
            if prompts and request in prompts:
                prompts.remove(request)
            if runs:
                heappush(self._leaving, self._joined(request))

    def settle(self) -> None:
        """Bring all requests up to date; this is of no use any more then."""
        for step, _, request in self._leaving:
            computed = request.max_total_tokens - 1 - (step - self._clock)
            more = computed - request.num_computed_tokens
            if more:
                request.token_ids += self._tokens(request, request.num_output_tokens, more)
            self._own_blocks(request, computed)
            request.num_computed_tokens = computed
        self._leaving = []
        self.count = 0

    def tick(self) -> None:
        """Count the step that `begin_step` began; `completed` is to be called after it."""
        self._clock += 1

    def _joined(self, request: Request) -> tuple[int, tuple[int, int], Request]:
        computed, clock = request.num_computed_tokens, self._clock
        self.count += 1
        self._sum += computed - clock
        self._phases[(clock - computed) % self._size] += 1
        # The last token of a prompt may have its block before it is computed.
        over = len(request.tables.groups[0]) - -(-computed // self._size)
        if over:
            self._pool.set_aside(-over)
        return (clock + request.max_total_tokens - computed - 1, request.rank, request)

    def _growth(self, steps: int) -> int:
        """Blocks that the next steps take."""
        rounds, rest = divmod(steps, self._size)
        growth = rounds * self.count
        if rest:
            phases, first = self._phases, self._clock % self._size
            growth += sum(phases[first : first + rest])
            if first + rest > self._size:
                growth += sum(phases[: first + rest - self._size])
        return growth

    def _let_go(self, request: Request, computed: int) -> None:
        """Settle a request that leaves: what it generated, nobody will ask for.

        So the blocks that were set aside for it are not handed out first. Its last ones are the
        first to be cached, as in `BlockPool.free`.
        """
        pool, size = self._pool, self._size
        owned = len(request.tables.groups[0])
        over = -(-computed // size) - owned  # blocks set aside for it
        if pool.enable_prefix_caching:
            unnamed = max(0, computed // size - owned)
            pool.retire_aside(unnamed)
            over -= unnamed
            self._name(request, min(computed, owned * size))
        if over:
            pool.set_aside(-over)

    def _own_blocks(self, request: Request, computed: int) -> None:
        """Hand out what was set aside for a request, and make it findable."""
        self._pool.take_aside(request.tables, computed)
        self._name(request, computed)

    def _name(self, request: Request, computed: int) -> None:
        """Make the blocks findable that the first tokens fill."""
        pool, size, tables = self._pool, self._size, request.tables
        full = computed // size
        if pool.enable_prefix_caching and full > tables.num_registered:
            prompt = min(full, request.num_prompt_tokens // size)
            if len(tables.digests) < prompt:
                tables.digest(request.token_ids, size, prompt - 1)
            tables.name_as_unlike_any(full - 1, request.rank[1])
            pool.register(tables, request.token_ids, computed)


def advance_in_order(scheduler: Scheduler, steps: int, tokens: Tokens) -> list[Request]:
    """Take `steps` steps, at most `Decoders.steady_steps`; returns those that the last completed.

    For requests that may generate what others have as well, so that it matters whose block is found
    first: blocks are taken and made findable in the order in which single steps would do it. The
    requests are yet to be finished with `Scheduler.finish`, in this order: until then the blocks in
    use are those of the last step.
    """
    pool, size = scheduler.pool, scheduler.pool.block_size
    events: list[tuple[int, int, int]] = []  # step, taking before registering, place
    running = scheduler.running
    for place, request in enumerate(running):
        length = len(request.token_ids)
        grows = max(0, request.tables.capacity - length + 1)
        events += [(step, 0, place) for step in range(grows, steps, size)]
        fills = -length % size
        events += [(step, 1, place) for step in range(fills, steps, size)]
        request.token_ids.extend(tokens(request, length - request.num_prompt_tokens, steps))
    events.sort()
    for step, registers, place in events:
        request = running[place]
        end = len(request.token_ids) - steps + step
        if registers:
            pool.register(request.tables, request.token_ids, end)
        else:
            pool.extend(request.tables, end)
    for request in running:
        request.num_computed_tokens = len(request.token_ids) - 1
    return [r for r in running if r.num_computed_tokens + 1 >= r.max_total_tokens]
