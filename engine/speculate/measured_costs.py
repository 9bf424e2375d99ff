"""What steps and drafting take on this machine, measured when a model is loaded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.block_groups import BlockGroup
from engine.block_tables import BlockTables
from engine.config import EngineConfig
from engine.request import Request, RequestState, SamplingParams
from engine.speculate.cost_curves import ladder
from engine.speculate.cost_grid import CostGrid, DraftCorrections, VerifyCorrections
from engine.speculate.draft import Draft
from engine.speculate.proposer import Proposer

# Seconds that measuring may take, roughly; what it does not come to is extrapolated.
BUDGET = 4.0
# Runs of a step, as far as there is time; of drafting; and of catching up with a prompt.
_MOST_RUNS = 8
_DRAFT_RUNS = 3
_CATCH_UP_RUNS = 3
# At least so many, of which the first does not count: one alone may take half as long again, by
# which drafts seemed to pay for 64 sequences that do not (36 instead of 24 ms, one load of four).
_LEAST_RUNS = 2
# Sequences up to which every power of two is measured, with drafts of many lengths.
_FEW = 16
# Tokens of the sequences that are measured; longer ones are learned from.
_CONTEXT = 256
# Tokens that they get meanwhile.
_ADVANCES = 7


class MeasuredRunner(Protocol):
    """Executes steps that are measured."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        ...

    @property
    def groups(self) -> tuple[BlockGroup, ...]:
        """The groups of layers that have block tables of their own."""
        ...

    def execute(self, batch: Batch) -> BatchResult:
        """Run a step."""
        ...


class MeasuredCosts:
    """Costs from measured points, corrected by what steps and drafts take later.

    Args:
        steps: seconds of steps, by their sequences and the drafted tokens for each on average.
        drafting: seconds of drafting, by sequences and tokens for each.
        catch_up_per_token: seconds for each token that the proposer lacks before it can draft.
        tries_cost: that a try of drafts costs more than the step, so that it is not to be hoped
            that steps that were not tried take less than they seem to.
    """

    def __init__(
        self,
        steps: CostGrid,
        drafting: CostGrid,
        catch_up_per_token: float = 0.0,
        *,
        tries_cost: bool = False,
    ) -> None:
        self._catch_up_per_token = catch_up_per_token
        self._tries_cost = tries_cost
        self._steps = steps
        self._drafting = drafting
        self._verify_corrections = VerifyCorrections()
        self._draft_corrections = DraftCorrections()

    def verify_seconds(self, num_sequences: int, num_tokens: int) -> float:
        """See `SpeculationCosts`."""
        drafted = num_tokens - num_sequences
        seconds, plain_share = self._expected(num_sequences, drafted)
        return seconds * self._verify_corrections.factor(num_sequences, drafted, plain_share)

    def draft_seconds(self, num_sequences: int, num_drafted: int) -> float:
        """See `SpeculationCosts`."""
        seconds = self._drafting.seconds(num_sequences, num_drafted)
        return seconds * self._draft_corrections.factor(num_sequences)

    def uncertainty(self, num_sequences: int) -> float:
        """See `UncertainCosts`."""
        return self._verify_corrections.uncertainty(num_sequences)

    def hope(self, num_sequences: int) -> float:
        """See `UncertainCosts`."""
        return self._verify_corrections.hope(num_sequences)

    def catch_up_seconds(self, num_tokens: int) -> float:
        """See `SpeculationCosts`."""
        return num_tokens * self._catch_up_per_token

    def learn_verify(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """See `LearningCosts`."""
        drafted = num_tokens - num_sequences
        expected, plain_share = self._expected(num_sequences, drafted)
        ratio = seconds / expected
        self._verify_corrections.learn(num_sequences, drafted, ratio, plain_share)

    def learn_draft(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        """See `LearningCosts`."""
        expected = self._drafting.seconds(num_sequences, num_drafted)
        self._draft_corrections.learn(num_sequences, expected, seconds)

    def _expected(self, num_sequences: int, num_drafted: int) -> tuple[float, float]:
        """Seconds of a step as measured, and the share of them that it takes without drafts."""
        seconds = self._steps.seconds(num_sequences, num_drafted / num_sequences)
        if self._tries_cost or not num_drafted:
            return seconds, 1.0
        return seconds, min(1.0, self._steps.seconds(num_sequences, 0.0) / seconds)


def measure_costs(
    runner: MeasuredRunner,
    proposer: Proposer,
    config: EngineConfig,
    max_model_len: int,
    *,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> MeasuredCosts | None:
    """Run steps of some sizes, and draft for as many; None if no sequence has room for a draft.

    Writes to the first blocks of the cache, so no request may have any; `runner` must have been
    warmed up. `budget` in seconds of `clock`, beside what the very first draft takes, for which
    kernels may have to be compiled: the smallest steps are measured in any case.
    """
    tokens = min(config.num_speculative_tokens, max_model_len - 2)
    if tokens < 1:
        return None
    end = clock() + budget
    measuring = _Measuring(runner, proposer, config, max_model_len, tokens, clock, end)
    counts = list(_sequence_counts(config.max_num_seqs))
    for place, count in enumerate(counts):
        # Small rows leave the larger ones more than their share.
        if not measuring.row(count, 1.0 / (len(counts) - place)):
            break
    return MeasuredCosts(
        measuring.steps,
        measuring.drafting,
        measuring.catch_up(),
        tries_cost=proposer.costs_device,
    )


def _sequence_counts(most: int) -> Iterator[int]:
    """1, 2, 4, 8, 16, 64, 256, ... up to `most` and with it: few decide whether drafts pay."""
    count = 1
    while count < most:
        yield count
        count *= 2 if count < _FEW else 4
    yield most


def _typical(taken: Sequence[float]) -> float:
    """The middle one, of two the lesser.

    What steps take beside each other is told better by it than by the least of each: of steps of 8
    on two Zen 3 cores, the ratios of four runs' middles spread by 5% (of eight 2%), of their least
    by 6%, however many there are.
    """
    return statistics.median_low(taken)


class _Measuring:
    def __init__(
        self,
        runner: MeasuredRunner,
        proposer: Proposer,
        config: EngineConfig,
        max_model_len: int,
        tokens: int,
        clock: Callable[[], float],
        end: float,
    ) -> None:
        self._runner = runner
        self._proposer = proposer
        self._config = config
        self._max_model_len = max_model_len
        self._tokens = tokens  # of a draft
        self._clock = clock
        self._end = end
        self._per_token = 0.0  # seconds, of the last row's largest step
        self.steps = CostGrid()
        self.drafting = CostGrid()

    def row(self, count: int, share: float) -> bool:
        """Measure steps and drafting of `count` sequences; False if there was no time for it.

        Each step is run twice, of the first row at least once, and more often in `share` of the
        time that is left.
        """
        first = not self._per_token
        now, end = self._clock(), self._end
        until = now + (end - now) * share
        sizes = self._drafted_tokens(count)
        # A token of larger steps takes no longer than one of those before.
        turn = self._per_token * (count * len(sizes) + sum(sizes))
        if not first and now + _LEAST_RUNS * turn > end:
            return False
        requests = self._requests(count)
        try:
            self._steps_of(requests, sizes, until, 1 if first else _LEAST_RUNS)
            self._drafting_of(requests, first)
        finally:
            for request in requests:
                request.state = RequestState.FINISHED
                self._proposer.forget(request)
        return True

    def _steps_of(
        self, requests: list[Request], sizes: list[int], until: float, least: int
    ) -> None:
        """Measure steps with so many drafted tokens, at least so often."""
        count = len(requests)
        taken: dict[int, list[float]] = {drafted: [] for drafted in sizes}
        # In turns, so that whatever else the machine does for a while meets all sizes alike.
        for place in range(_MOST_RUNS):
            if place >= least and self._clock() + sum(map(_typical, taken.values())) > until:
                break
            for drafted in sizes:
                seconds = self._execute(self._batch(requests, drafted))
                # The first of several does not count: its code and data are yet to be fetched.
                if place == 1:
                    taken[drafted].clear()
                taken[drafted].append(seconds)
        for drafted in sizes:
            self.steps.add(count, drafted / count, _typical(taken[drafted]))
        self._per_token = _typical(taken[sizes[-1]]) / (count + sizes[-1])

    def _drafted_tokens(self, count: int) -> list[int]:
        """Numbers of drafted tokens in a step: none, a single one, and some for each.

        Of many sequences fewer, as their steps take longer, the more so the more tokens they have.
        """
        room = self._config.max_num_batched_tokens - count
        few = count <= _FEW
        sizes = {count * size for size in (ladder(self._tokens) if few else (0, 1, self._tokens))}
        if few:
            sizes.add(1)
        return sorted(size for size in sizes if size <= room)

    def _execute(self, batch: Batch) -> float:
        result = self._runner.execute(batch)
        return result.device_seconds + result.host_seconds

    def _drafting_of(self, requests: list[Request], first: bool) -> None:
        proposer, clock, tokens = self._proposer, self._clock, self._tokens
        sizes = sorted({1, min(2, tokens), tokens}) if proposer.costs_device else [tokens]
        # What was drafted for before is taken up first, which does not count.
        taken: dict[int, list[float]] = {size: [] for size in sizes}
        for place, size in enumerate([1, *sizes * _DRAFT_RUNS]):
            if place > len(sizes) and not first and clock() > self._end:
                break
            if proposer.costs_device or not place:
                self._advance(requests)
            start = clock()
            proposer.propose(requests, [size] * len(requests))
            seconds = clock() - start
            if place:
                taken[size].append(seconds)
            elif first:
                self._end += seconds
        for size in sizes:
            self.drafting.add(len(requests), size, _typical(taken[size]))

    def catch_up(self) -> float:
        """Seconds a token of what is computed for requests that are met for the first time."""
        proposer, clock = self._proposer, self._clock
        if not proposer.costs_device:
            return 0.0
        taken = []
        # Unlike what was drafted for before, so that nothing is found.
        for token in range(1, 1 + _CATCH_UP_RUNS):
            (request,) = self._requests(1)
            request.token_ids[:] = [token] * len(request.token_ids)
            start = clock()
            proposer.propose([request], [1])
            taken.append(clock() - start)
            request.state = RequestState.FINISHED
            proposer.forget(request)
        more = _typical(taken) - self.drafting.seconds(1, 1)
        return max(0.0, more / len(request.token_ids))

    def _advance(self, requests: Sequence[Request]) -> None:
        """Compute a step that gives each request another token: some proposers draft from it."""
        self._execute(self._batch(requests, 0))
        if len(requests[0].token_ids) + 1 < self._max_model_len:
            for request in requests:
                request.token_ids.append(0)
                request.num_computed_tokens += 1

    def _batch(self, requests: Sequence[Request], drafted: int) -> Batch:
        count = len(requests)
        if self._proposer.costs_device:  # drafts for all, of a length that pays
            each, more = divmod(drafted, count)
            sizes = [each] * (count - more) + [each + 1] * more
        else:  # whole ones, where something is found
            whole, rest = divmod(drafted, self._tokens)
            sizes = [0] * (count - whole) + [self._tokens] * whole
            if rest:
                sizes[count - whole - 1] = rest
        sequences = []
        for request, size in zip(requests, sizes, strict=True):  # those with more come last
            start = len(request.token_ids) - 1
            draft = Draft([0] * size) if size else None
            sequences.append(ScheduledSequence(request, start, 1 + size, True, draft))
        return Batch(sequences, count)

    def _requests(self, count: int) -> list[Request]:
        block_size, tokens = self._config.block_size, self._tokens
        context = max(1, min(_CONTEXT, self._max_model_len - tokens - _ADVANCES))
        pages = -(-min(context + tokens + _ADVANCES, self._max_model_len) // block_size)
        num_blocks, num_groups = self._runner.num_blocks, len(self._runner.groups)
        requests = []
        for index in range(count):
            tables = BlockTables([[group % num_blocks] * pages for group in range(num_groups)])
            request = Request(
                f"costs {index}",
                [0] * context,
                SamplingParams(temperature=0.0),
                0.0,
                tables=tables,
            )
            request.num_computed_tokens = context - 1
            requests.append(request)
        return requests
