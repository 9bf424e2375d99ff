"""A world whose chances and costs are known: requests are served for ever, by a given policy."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.draft_lengths import DraftLengths

WRONG = -1


@dataclass
class Roofline:
    """A step takes its fixed part, and beyond some tokens grows with them.

    Drafting takes `look_up` for each request, or `draft_step` and more for each token of a model.
    """

    fixed: float = 10.0
    token: float = 0.25
    slack: float = 0.02
    look_up: float = 0.0
    draft_step: float = 0.0
    draft_request: float = 0.0

    def verify_seconds(self, num_sequences: int, num_tokens: int) -> float:
        return max(self.fixed, self.token * num_tokens) + self.slack * num_tokens

    def catch_up_seconds(self, num_tokens: int) -> float:
        return 0.0

    def draft_seconds(self, num_sequences: int, num_drafted: int) -> float:
        one = self.draft_step + self.draft_request * num_sequences
        return self.look_up * num_sequences + one * num_drafted


# The chance of (request, depth from 1) given that what comes before it is accepted.
Chance = Callable[[int, int], float]


@dataclass
class World:
    """`found` is the share of asked requests for which there is a draft.

    With `tells` the proposer says how good it thinks each token: its true chance, distorted.
    """

    costs: Roofline
    chance: Chance
    found: float = 1.0
    tells: Callable[[float], float] | None = None
    seed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    drafted: dict[int, int] = field(default_factory=dict)
    asked: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def requests(self, count: int) -> list[Request]:
        return [Request(str(i), [0, 0], SamplingParams(), 0.0) for i in range(count)]

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for request, limit in zip(requests, limits, strict=True):
            self.asked += limit > 0
            if not limit or self.random.random() >= self.found:
                drafts.append(None)
                continue
            begin = len(request.token_ids)
            chances = [self.chance(int(request.request_id), d + 1) for d in range(limit)]
            right = 0
            while right < limit and self.random.random() < chances[right]:
                right += 1
            # The token at a position is the position.
            tokens = [begin + d if d < right else WRONG for d in range(limit)]
            claims = None
            if self.tells is not None:
                claims, path = [], 1.0
                for chance in chances:
                    path *= self.tells(chance)
                    claims.append(path)
            drafts.append(Draft(tokens, chances=claims))
        return drafts

    def drafting_seconds(self, limits: Sequence[int], drafts: Sequence[Draft | None]) -> float:
        return self.costs.draft_seconds(sum(limit > 0 for limit in limits), max(limits))

    def play(
        self, requests: Sequence[Request], drafts: Sequence[Draft | None]
    ) -> tuple[Batch, BatchResult]:
        sequences, results = [], []
        for request, draft in zip(requests, drafts, strict=True):
            start = len(request.token_ids) - 1
            draft = draft if draft else None
            new = 0 if draft is None else len(draft)
            sequences.append(ScheduledSequence(request, start, 1 + new, True, draft))
            right = 0
            while draft is not None and right < new and draft.token_ids[right] != WRONG:
                right += 1
            got = list(range(start + 1, start + 2 + right))
            request.token_ids.extend(got)
            results.append(got)
            self.tokens += len(got)
            key = int(request.request_id)
            self.drafted[key] = self.drafted.get(key, 0) + new
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].draft is not None)
        batch = Batch([sequences[i] for i in order], len(sequences))
        results = [results[i] for i in order]
        self.seconds += self.costs.verify_seconds(len(sequences), batch.num_tokens)
        self.steps += 1
        return batch, BatchResult(results, 0.0)

    def run(
        self, lengths: DraftLengths, config: EngineConfig, requests: Sequence[Request], steps: int
    ) -> float:
        """Serve with a policy; tokens per second of these steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            limits = lengths.limits(requests, config)
            drafts: list[Draft | None] = [None] * len(requests)
            if any(limits):
                drafts = self.propose(requests, limits)
                spent = self.drafting_seconds(limits, drafts)
                self.seconds += spent
                kept = lengths.keep(requests, drafts, config, spent)
                drafts = [
                    None if draft is None or not count else draft.first(count)
                    for draft, count in zip(drafts, kept, strict=True)
                ]
            before = self.seconds
            batch, result = self.play(requests, drafts)
            lengths.observe(batch, result, self.seconds - before)
        return (self.tokens - tokens) / (self.seconds - seconds)


def adaptive_rate(world: World, count: int, config: EngineConfig, device: bool) -> float:
    """Tokens per second of the policy, from after it has seen a thousand."""
    lengths = DraftLengths(world.costs, costs_device=device)
    requests = world.requests(count)
    steps = max(60, 2000 // count)
    world.run(lengths, config, requests, steps // 2)
    return world.run(lengths, config, requests, steps)


def fixed_rate(world: World, count: int, config: EngineConfig, drafted: int) -> float:
    """Tokens per second of drafting so many tokens for everybody in every step."""
    config = config.replace(speculative_adaptive=False, num_speculative_tokens=max(drafted, 1))
    lengths = DraftLengths(world.costs if drafted else None, costs_device=False)
    if not drafted:
        return count / world.costs.verify_seconds(count, count)
    return world.run(lengths, config, world.requests(count), max(60, 3000 // count))
