"""Lengths of drafts: against the best that could be chosen in worlds that are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from engine.batch import Batch, BatchResult, ScheduledSequence
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.speculate.cost_grid import CostGrid
from engine.speculate.draft import Draft
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.measured_costs import MeasuredCosts
from tests.engine.speculate.oracle_world import (
    WRONG,
    Chance,
    Roofline,
    World,
    adaptive_rate,
    fixed_rate,
)

MOST = 8
CONFIG = EngineConfig(
    speculative_method="ngram", num_speculative_tokens=MOST, max_num_batched_tokens=8192
)
FIXED = (0, 1, 2, 4, 8)
CHEAP = Roofline(look_up=0.02)
MODEL = Roofline(draft_step=1.0, draft_request=0.02)


def same(chance: float) -> Chance:
    return lambda request, depth: chance


def falling(request: int, depth: int) -> float:
    return (0.9, 0.7, 0.4, 0.2)[min(depth, 4) - 1]


def mixed(request: int, depth: int) -> float:
    return 0.95 if request % 2 else 0.1


WORLDS = {
    "sure": (CHEAP, same(0.9), False, 1.0),
    "even": (CHEAP, same(0.5), False, 1.0),
    "poor": (CHEAP, same(0.1), False, 1.0),
    "falling": (CHEAP, falling, False, 1.0),
    "mixed": (CHEAP, mixed, False, 1.0),
    "seldom found": (CHEAP, same(0.8), False, 0.3),
    "good model": (MODEL, same(0.8), True, 1.0),
    "even model": (MODEL, same(0.5), True, 1.0),
    "poor model": (MODEL, same(0.05), True, 1.0),
}


@pytest.mark.parametrize("count", [2, 6, 24, 100])
@pytest.mark.parametrize("name", WORLDS)
def test_regret_against_the_best_fixed_length(name: str, count: int) -> None:
    costs, chance, device, found = WORLDS[name]
    rate = adaptive_rate(World(costs, chance, found), count, CONFIG, device)
    rates = {k: fixed_rate(World(costs, chance, found), count, CONFIG, k) for k in FIXED}
    assert rate > 0.95 * max(rates.values()), rates
    assert rate > 0.985 * rates[0]  # never much slower than without


def test_the_gain_over_any_fixed_length_where_requests_differ() -> None:
    # Half of the requests are copied from their prompts, and the device is nearly busy.
    rate = adaptive_rate(World(CHEAP, mixed), 16, CONFIG, False)
    rates = [fixed_rate(World(CHEAP, mixed), 16, CONFIG, k) for k in range(MOST + 1)]
    assert rate > 1.2 * max(rates)


def test_lengths_differ_by_request() -> None:
    world = World(CHEAP, mixed)
    lengths, requests = DraftLengths(CHEAP, costs_device=False), world.requests(16)
    world.run(lengths, CONFIG, requests, 40)
    world.drafted.clear()
    world.run(lengths, CONFIG, requests, 40)
    good = sum(world.drafted[i] for i in range(1, 16, 2))
    poor = sum(world.drafted[i] for i in range(0, 16, 2))
    assert good > 10 * poor


@pytest.mark.parametrize("device", [False, True])
def test_acceptance_that_changes_is_followed(device: bool) -> None:
    now = [0.9]
    costs = MODEL if device else CHEAP
    world = World(costs, lambda request, depth: now[0])
    lengths, requests = DraftLengths(costs, costs_device=device), world.requests(8)

    def rate_at(chance: float, settle: int) -> float:
        now[0] = chance
        world.run(lengths, CONFIG, requests, settle)
        best = max(fixed_rate(World(costs, same(chance)), 8, CONFIG, k) for k in FIXED)
        return world.run(lengths, CONFIG, requests, 150) / best

    assert rate_at(0.9, 40) > 0.95
    assert rate_at(0.05, 100) > 0.93
    # A model that did not pay is tried seldom: it takes longer to be believed in again.
    assert rate_at(0.9, 600 if device else 100) > 0.93


def test_what_the_proposer_says_is_used_and_corrected() -> None:
    # Tokens are good or bad, and only the proposer knows which; it is far too sure of itself.
    busy = Roofline(fixed=5.0)

    def rate(tells: Callable[[float], float] | None) -> float:
        quality = random.Random(1)
        world = World(busy, lambda request, depth: quality.choice((0.95, 0.2)), tells=tells)
        return adaptive_rate(world, 16, CONFIG, False)

    silent, telling, sure = rate(None), rate(lambda c: c), rate(lambda c: c**0.2)
    assert telling > 1.05 * silent
    assert sure > 0.95 * telling


def test_costs_that_were_measured_wrongly_are_corrected() -> None:
    # Measured when the machine was idle: verifying seemed to cost nothing.
    steps, drafting = CostGrid(), CostGrid()
    for count in (1, 64):
        steps.add(count, 0.0, 10.0)
        steps.add(count, 8.0, 10.5)
        drafting.add(count, 8.0, 0.001)
    costs = Roofline(fixed=1.0, token=1.0)
    world, requests = World(costs, same(0.3)), World(costs, same(0.3)).requests(32)
    lengths = DraftLengths(MeasuredCosts(steps, drafting), costs_device=False)
    world.run(lengths, CONFIG, requests, 60)
    rate = world.run(lengths, CONFIG, requests, 100)
    assert rate > 0.97 * 32 / costs.verify_seconds(32, 32)


class Told(Roofline):
    """Costs that note which steps they are told of, by drafted tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, float]] = []

    def learn_verify(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        self.steps.append((num_tokens - num_sequences, seconds))

    def learn_draft(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        pass


@pytest.mark.parametrize("device", [False, True])
def test_a_step_right_behind_a_drafting_model_is_not_learned_from(device: bool) -> None:
    """Its caches are full of that model."""
    costs = Told()
    world = World(Roofline(), same(1.0))
    lengths, requests = DraftLengths(costs, costs_device=device), world.requests(2)
    for second, drafted in enumerate((2, 2, 0, 0)):
        drafts = world.propose(requests, [drafted] * 2)
        lengths.observe(*world.play(requests, drafts), float(second))
    plain = [seconds for tokens, seconds in costs.steps if not tokens]
    assert plain == [3.0 if device else 2.0]


def test_at_saturation_nobody_is_asked_about() -> None:
    costs = Roofline(fixed=0.0, token=1.0, slack=0.0)
    lengths = DraftLengths(costs, costs_device=False)
    requests = World(costs, same(1.0)).requests(32)
    assert lengths.limits(requests, CONFIG) == [0] * 32


def test_look_ups_that_find_nothing_are_made_seldom_where_they_cost() -> None:
    dear = Roofline(look_up=0.16)  # for 32 requests half a step
    world = World(dear, same(0.9), found=0.0)
    lengths, requests = DraftLengths(dear, costs_device=False), world.requests(32)
    world.run(lengths, CONFIG, requests, 100)
    world.asked = 0
    world.run(lengths, CONFIG, requests, 128)
    assert 0 < world.asked <= 128 * 32 / 32


def test_without_adaptation_or_costs_all_is_verified() -> None:
    fixed = CONFIG.replace(speculative_adaptive=False)
    drafts = [Draft([1, 2, 3]), None, Draft([4])]
    for costs, config in ((CHEAP, fixed), (None, CONFIG)):
        lengths = DraftLengths(costs, costs_device=False)
        requests = World(CHEAP, same(0.0)).requests(3)
        for _ in range(20):
            assert lengths.limits(requests, config) == [MOST] * 3
            assert lengths.keep(requests, drafts, config) == [3, 0, 1]
            play(lengths, requests, drafts, [0, 0, 0])


def test_a_draft_ends_before_the_request_does() -> None:
    request = Request("0", [1, 2, 3], SamplingParams(), 0.0)
    lengths = DraftLengths(CHEAP, costs_device=False)
    for total, room in ((4, 0), (5, 1), (7, 3), (100, MOST)):
        request.max_total_tokens = total
        assert lengths.limits([request], CONFIG) == [room]


def test_the_budget_of_a_step_bounds_what_is_verified() -> None:
    config = EngineConfig(
        speculative_method="ngram",
        num_speculative_tokens=MOST,
        max_num_batched_tokens=20,
        max_num_seqs=16,
    )
    free = Roofline(fixed=1.0, token=0.0, slack=0.0)
    for device in (False, True):
        lengths = DraftLengths(free, costs_device=device)
        requests = World(free, same(0.9)).requests(16)
        limits = lengths.limits(requests, config)
        drafts = [Draft([1] * limit) if limit else None for limit in limits]
        kept = lengths.keep(requests, drafts, config)
        assert sum(kept) == 4
        if device:
            assert sum(limits) == 4


def test_drafts_that_were_drawn_by_chance_are_verified_whole() -> None:
    # What is kept must not depend on the tokens: here the second is claimed to be hopeless.
    lengths = DraftLengths(MODEL, costs_device=True)
    request = World(MODEL, same(0.5)).requests(1)
    lengths.limits(request, CONFIG)
    chances = [0.5, 1e-4]
    drawn = Draft([1, 2], probabilities=torch.full((2, 4), 0.25), chances=chances)
    assert lengths.keep(request, [drawn], CONFIG) == [2]
    assert lengths.keep(request, [Draft([1, 2], chances=chances)], CONFIG) == [1]


def test_trees_are_cut_where_their_branches_are_not_worth_it() -> None:
    lengths = DraftLengths(Roofline(fixed=3.5, token=1.0, slack=0.0), costs_device=True)
    requests = World(MODEL, same(0.5)).requests(1)
    tree = Draft([5, 6, 7], [-1, 0, -1], chances=[0.9, 0.8, 0.05])
    for _ in range(50):
        lengths.limits(requests, CONFIG)
        kept = lengths.keep(requests, [tree], CONFIG)[0]
        play(lengths, requests, [tree], [2])
    assert kept == 2
    # The other branch turns out to be the right one as often as not: 7 follows the last token.
    for right in [[5, 6, 0], [7, 0]] * 200:
        lengths.limits(requests, CONFIG)
        kept = lengths.keep(requests, [tree], CONFIG)[0]
        sequence = ScheduledSequence(requests[0], 1, 4, True, tree)
        lengths.observe(Batch([sequence], 1), BatchResult([right], 0.0), None)
    assert kept == 3


def test_a_dropped_draft_is_judged_by_what_comes() -> None:
    # Nothing is verified as long as it is believed not to pay, yet it becomes known when it would.
    now = [0.0]
    costs = Roofline(fixed=5.0, token=0.5)
    world = World(costs, lambda request, depth: now[0])
    lengths, requests = DraftLengths(costs, costs_device=False), world.requests(8)
    world.run(lengths, CONFIG, requests, 200)
    world.drafted.clear()
    before = lengths.chances(requests[0])[0]
    now[0] = 0.95
    world.run(lengths, CONFIG, requests, 200)
    assert before < 0.1
    assert lengths.chances(requests[0])[0] > 0.8
    assert sum(world.drafted.values()) > 300


def test_nothing_is_told_too_poor_by_drafts_that_were_wrong_first() -> None:
    # Of dropped drafts the wrong ones are known at once: half of these are right to their ends.
    costs = Roofline(fixed=18.0, token=0.0, slack=1.2)  # too dear for those that are unknown
    world = World(costs, lambda request, depth: 0.999 if request % 2 else 0.0)
    lengths, requests = DraftLengths(costs, costs_device=False), world.requests(32)
    told = []
    for _ in range(4):
        world.run(lengths, CONFIG, requests, 1)
        told.append(lengths.chances(Request("new", [0], SamplingParams(), 0.0))[0])
    assert min(told) > 0.4
    world.run(lengths, CONFIG, requests, 40)
    assert all(world.drafted[i] > 100 for i in range(1, 32, 2))
    assert not any(world.drafted[i] for i in range(0, 32, 2))


def test_a_dropped_draft_is_judged_across_a_preemption() -> None:
    # What is computed anew gets a token that the draft foresees in a chunk.
    costs = Roofline(fixed=5.0, token=0.5)
    draft = Draft([5, 6])

    def chance_after(preempted: bool) -> float:
        lengths = DraftLengths(costs, costs_device=False)
        one, other = requests = World(costs, same(0.0)).requests(2)
        while not any(lengths.limits(requests, CONFIG)) or any(
            lengths.keep(requests, [draft, None], CONFIG)
        ):
            play(lengths, requests, [draft, None], [0, 0])
        before = lengths.chances(one)[0]
        first, second = (ScheduledSequence(r, 0, 1, samples=True) for r in (other, one))
        for token in draft.token_ids:
            batch = Batch([first, second], 1 if preempted else 2)
            lengths.observe(batch, BatchResult([[1], [token]], 0.0))
        assert lengths.chances(one)[0] > before
        return lengths.chances(one)[0]

    assert chance_after(preempted=True) == chance_after(preempted=False)


def test_the_same_events_lead_to_the_same_lengths() -> None:
    rates = {adaptive_rate(World(MODEL, falling), 5, CONFIG, True) for _ in range(2)}
    assert len(rates) == 1


def test_who_left_is_forgotten() -> None:
    world = World(CHEAP, same(0.0))
    lengths, requests = DraftLengths(CHEAP, costs_device=False), world.requests(1)
    world.run(lengths, CONFIG, requests, 60)
    # Somebody else is believed to be like those seen, but not more so than the one who was seen.
    other = world.requests(1)[0]
    poor = lengths.chances(requests[0])[0]
    lengths.forget(requests[0])
    assert lengths.chances(requests[0]) == lengths.chances(other)
    assert poor < lengths.chances(other)[0]


def play(
    lengths: DraftLengths,
    requests: Sequence[Request],
    drafts: Sequence[Draft | None],
    accepted: Sequence[int],
) -> None:
    sequences, tokens = [], []
    for request, draft, right in zip(requests, drafts, accepted, strict=True):
        new = 0 if draft is None else len(draft)
        start = len(request.token_ids) - 1
        sequences.append(ScheduledSequence(request, start, 1 + new, True, draft))
        right_tokens = [] if draft is None else list(draft.token_ids[:right])
        tokens.append([*right_tokens, WRONG])
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].draft is not None)
    batch = Batch([sequences[i] for i in order], len(sequences))
    lengths.observe(batch, BatchResult([tokens[i] for i in order], 0.0), None)
