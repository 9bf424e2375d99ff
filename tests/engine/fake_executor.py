"""An executor that computes nothing but forgets nothing: its KV cache holds the tokens themselves.

Every step writes the tokens of its sequences to their slots, once for each group of layers, beside
a hash of all tokens up to there, as the keys of a real model depend on them. Then each new token
reads what its groups let it see back through the block tables and checks it. The next token is a
hash of all tokens, so any wrong block, wrong position, stale content or missing computation shows.

Drafted tokens are written behind the others, as those of a tree depend on the branch they are on;
of an accepted branch they are moved to where they belong.
"""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.block_groups import BlockGroup
from engine.block_tables import BlockTables
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.output import RequestOutput
from engine.request import Request, SamplingParams
from engine.speculate.accepted import accepted_places
from engine.speculate.draft import Draft

VOCABULARY = 50


def next_token(context: Sequence[int]) -> int:
    return zlib.crc32(bytes(context)) % VOCABULARY


def expected_output(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def _hash(before: int, token: bytes) -> int:
    return zlib.crc32(token, before)


class VirtualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSpeculator:
    """Drafts chains or trees of which some first part is right; remembers what it was told.

    Deterministic: a request's draft depends on its tokens alone. Every third request or so gets
    none.
    """

    def __init__(self, longest: int, *, trees: bool = False) -> None:
        self.longest = longest
        self.trees = trees
        self.forgotten: list[str] = []
        self.observed = 0

    def prepare(self, running: Sequence[Request], config: EngineConfig) -> float:
        for request in running:
            if request.num_pending_tokens == 1:
                request.draft = self.draft(request.token_ids)
        return 0.0

    def clear(self) -> None:
        """Nothing is kept."""

    def draft(self, token_ids: Sequence[int]) -> Draft | None:
        chance = random.Random(next_token(token_ids) + len(token_ids))
        if chance.random() < 0.3:
            return None
        right, length = chance.randint(0, self.longest), chance.randint(1, self.longest)
        if not self.trees:
            tokens = expected_output(token_ids, length)
            return Draft([t if i < right else (t + 1) % VOCABULARY for i, t in enumerate(tokens)])
        # Each token follows one that came before; of the right path one may be among them.
        tokens, parents = [], []
        contexts = [list(token_ids)]
        for _ in range(length):
            parent = chance.randint(-1, len(tokens) - 1)
            token = next_token(contexts[parent + 1])
            while (parent, token) in zip(parents, tokens, strict=True) or chance.random() < 0.3:
                token = chance.randrange(VOCABULARY)
            parents.append(parent)
            tokens.append(token)
            contexts.append([*contexts[parent + 1], token])
        return Draft(tokens, parents)

    def observe(self, batch: Batch, result: BatchResult) -> None:
        for sequence, tokens in zip(batch.sequences, result.tokens, strict=True):
            if sequence.draft is not None:
                self.observed += len(tokens) - 1

    def forget(self, request: Request) -> None:
        self.forgotten.append(request.request_id)


class FakeExecutor:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        clock: VirtualClock | None = None,
        windows: Sequence[int] = (0,),
    ) -> None:
        self.clock = clock
        self.windows = tuple(windows)
        self.batches: list[list[tuple[str, int, int, bool]]] = []
        self.fail_next: BaseException | None = None
        self.fail_at_launch = False
        self.pipelined = False
        self.keep_batches = True
        self.speculator: FakeSpeculator | None = None
        self.reshape(num_blocks, block_size)

    def reshape(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)

    @staticmethod
    def prefix_hashes(sequence: ScheduledSequence) -> list[int]:
        """For each position a hash of all tokens up to it."""
        tokens = sequence.request.token_ids[: sequence.known]
        hashes = list(accumulate((bytes([token]) for token in tokens), _hash, initial=0))[1:]
        draft = sequence.draft
        if draft is not None:
            last = sequence.known - 1
            for i, token in enumerate(draft.token_ids):
                parent = i - 1 if draft.parents is None else draft.parents[i]
                hashes.append(_hash(hashes[last + 1 + parent], bytes([token])))
        return hashes

    def launch(self, batch: Batch) -> Deferred:
        """What is computed of the batch as it is now, but as late as can be."""
        if self.fail_at_launch and self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        return Deferred(self, as_packed(batch))

    def execute(self, batch: Batch) -> BatchResult:
        if self.fail_next is not None and not (self.pipelined and self.fail_at_launch):
            error, self.fail_next = self.fail_next, None
            raise error
        size = self.block_size
        tokens: list[list[int]] = []
        if self.keep_batches:
            self.batches.append(
                [(s.request.request_id, s.start, s.num_tokens, s.samples) for s in batch.sequences]
            )
        # All writes come before all reads, as on a device: a slot that two sequences write in
        # one step is a fault that must show.
        hashes = [self.prefix_hashes(s) for s in batch.sequences]
        for s, known in zip(batch.sequences, hashes, strict=True):
            for group, table in enumerate(s.request.tables.groups):
                for position in range(s.start, s.end):
                    slot = table[position // size] * size + position % size
                    self.slots[slot] = (group, known[position])
        for s, known in zip(batch.sequences, hashes, strict=True):
            for group, (table, window) in enumerate(
                zip(s.request.tables.groups, self.windows, strict=True)
            ):
                first = max(0, s.start - window + 1) if window else 0
                for position in range(first, s.end):
                    slot = table[position // size] * size + position % size
                    assert self.slots[slot] == (group, known[position]), "a wrong slot was read"
            if not s.samples:
                tokens.append([])
                continue
            tokens.append(self.choose(s))
        seconds = 0.001 + 1e-5 * batch.num_tokens
        if self.clock is not None:
            self.clock.now += seconds
        return BatchResult(tokens, device_seconds=seconds)

    def choose(self, sequence: ScheduledSequence) -> list[int]:
        """The accepted tokens, moved to where they belong, and one more."""
        context = sequence.request.token_ids[: sequence.known]
        draft = sequence.draft
        if draft is None:
            return [next_token(context)]
        chosen = [next_token(context)]
        for i in range(len(draft)):
            path = [draft.token_ids[j] for j in draft.path(i)]
            chosen.append(next_token([*context, *path]))
        places = accepted_places(draft, chosen)
        for table in sequence.request.tables.groups:
            slots = [
                table[position // self.block_size] * self.block_size + position % self.block_size
                for position in range(sequence.known, sequence.end)
            ]
            moved = [self.slots[slots[place]] for place in places]
            for slot, content in zip(slots, moved, strict=False):
                self.slots[slot] = content
        return [chosen[row] for row in (0, *(place + 1 for place in places))]


class Deferred:
    """A step that the device does when it is waited for."""

    def __init__(self, executor: FakeExecutor, batch: Batch) -> None:
        self.executor = executor
        self.batch = batch

    def wait(self) -> BatchResult:
        return FakeExecutor.execute(self.executor, self.batch)


def as_packed(batch: Batch) -> Batch:
    """The batch with copies of what a step's inputs are made of at its launch."""
    sequences = []
    for s in batch.sequences:
        request = copy.copy(s.request)
        request.token_ids = list(request.token_ids)
        request.tables = BlockTables([list(table) for table in request.tables.groups])
        sequences.append(ScheduledSequence(request, s.start, s.num_tokens, s.samples, s.draft))
    return Batch(sequences, batch.num_decodes, batch.num_preemptions)


def make_engine(
    num_blocks: int = 64,
    max_model_len: int = 256,
    *,
    resize: Callable[[EngineConfig], int] | None = None,
    eos: frozenset[int] = frozenset(),
    windows: Sequence[int] = (0,),
    pipelined: bool = False,
    **knobs: object,
) -> tuple[Engine, FakeExecutor]:
    """An engine in virtual time whose cache can be rebuilt; `resize` chooses the new blocks."""
    config = EngineConfig.from_mapping({"block_size": 8, **knobs})
    clock = VirtualClock()
    executor = FakeExecutor(num_blocks, config.block_size, clock, windows)
    executor.pipelined = pipelined
    groups = tuple(BlockGroup(window, (i,)) for i, window in enumerate(windows))

    def rebuild(new: EngineConfig) -> CacheShape:
        blocks = num_blocks if resize is None else resize(new)
        executor.reshape(blocks, new.block_size)
        return CacheShape(blocks, new.max_model_len or max_model_len, groups)

    engine = Engine(
        config,
        executor,
        CacheShape(num_blocks, max_model_len, groups),
        eos_token_ids=eos,
        vocab_size=VOCABULARY,
        clock=clock,
        rebuild_cache=rebuild,
    )
    return engine, executor


def greedy(max_tokens: int | None = 8, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **others)  # type: ignore[arg-type]


def run(engine: Engine, max_steps: int = 100_000) -> dict[str, list[RequestOutput]]:
    """Step until nothing is left; every output by request."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            return outputs
        wakeup = engine.next_wakeup()
        assert wakeup is not None
        clock = engine.clock
        assert isinstance(clock, VirtualClock)
        clock.now = max(clock.now, wakeup)
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    raise AssertionError("the engine did not come to an end")


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def assert_idle(engine: Engine) -> None:
    pool: BlockPool = engine.pool
    assert engine.num_unfinished == engine.scheduler.num_unfinished == 0
    assert pool.num_used == 0
    engine.scheduler.check_integrity()
