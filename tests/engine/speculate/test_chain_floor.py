"""Where chains that promise little end: by what going on costs, in the proposer's own terms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.proposer import ChainProposer
from engine.speculate.speculator import Speculator
from tests.engine.speculate.oracle_world import Roofline, World

MODEL = Roofline(token=0.05, slack=0.2, draft_step=0.5)
CONFIG = EngineConfig(
    speculative_method="draft_model", speculative_model="draft", num_speculative_tokens=8
)
STEPS = 600


@dataclass
class ChainWorld(World):
    """One whose chains end where `floor` says, or else the policy; they cost what is drafted."""

    floor: float | None = None
    lengths: DraftLengths | None = None

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        assert self.lengths is not None
        floor = self.lengths.floor if self.floor is None else self.floor
        drafts: list[Draft | None] = []
        for draft in super().propose(requests, limits):
            assert draft is not None
            assert draft.chances is not None
            going_on = itertools.takewhile(lambda chance: chance >= floor, draft.chances)
            drafts.append(draft.first(1 + sum(1 for _ in going_on)))
        return drafts

    def drafting_seconds(self, limits: Sequence[int], drafts: Sequence[Draft | None]) -> float:
        sizes = [len(draft) for draft in drafts if draft is not None]
        return self.costs.draft_seconds(len(sizes), max(sizes))


def doubting(chance: float) -> float:
    """The odds are told to be a sixth of what they are."""
    return chance / (chance + 6.0 * (1.0 - chance))


def rate(floor: float | None, seed: int, doubts: bool) -> tuple[float, float]:
    """Tokens a second and the last floor, where tokens are easy or hard to guess."""
    world = ChainWorld(MODEL, lambda request, depth: 0.0, seed=seed, floor=floor)
    world.chance = lambda request, depth: world.random.choice((0.97, 0.97, 0.5))
    world.tells = doubting if doubts else lambda chance: chance
    world.lengths = DraftLengths(MODEL, costs_device=True)
    tokens = world.run(world.lengths, CONFIG, world.requests(1), STEPS)
    return tokens, world.lengths.floor


@pytest.mark.parametrize("doubts", [False, True])
def test_it_is_about_as_good_as_the_best_fixed_one(doubts: bool) -> None:
    seeds = range(3)
    fixed = [
        sum(rate(floor, seed, doubts)[0] for seed in seeds) for floor in (0.0, 0.03, 0.1, 0.3, 0.6)
    ]
    own = sum(rate(None, seed, doubts)[0] for seed in seeds)
    assert own > 0.96 * max(fixed)
    assert own > 1.04 * min(fixed)


def test_a_proposer_that_doubts_is_let_go_on_longer() -> None:
    told, doubted = (rate(None, 0, doubts)[1] for doubts in (False, True))
    # A token costs 0.5 to draft and 0.25 to verify, of the 3 seconds or so that one takes.
    assert 0.1 < told < 0.5
    assert doubted < told / 2


def test_without_adaptive_lengths_chains_go_on() -> None:
    lengths = DraftLengths(MODEL, costs_device=True)
    one = Request("0", [1, 2], SamplingParams(), 0.0)
    lengths.floor = 0.3
    limits = lengths.limits([one], CONFIG.replace(speculative_adaptive=False))
    assert limits == [8]
    assert lengths.floor == 0.0


class _Chains:
    """Remembers the floor that it was asked with."""

    costs_device = True

    def __init__(self) -> None:
        self.floor = 0.0
        self.asked: list[float] = []

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        self.asked.append(self.floor)
        return [Draft([7] * limit, chances=[0.9] * limit) if limit else None for limit in limits]

    def clear(self) -> None: ...

    def forget(self, request: Request) -> None: ...


def test_a_proposer_of_chains_is_told_before_it_drafts() -> None:
    chains = _Chains()
    assert isinstance(chains, ChainProposer)
    lengths = DraftLengths(MODEL, costs_device=True)
    one = Request("0", [1, 2], SamplingParams(), 0.0)
    one.num_computed_tokens = 1
    speculator = Speculator(chains, lengths, lambda: 0.0)
    for _ in range(6):
        speculator.prepare([one], CONFIG)
        assert chains.asked[-1] == lengths.floor
    assert max(chains.asked) > 0.0
