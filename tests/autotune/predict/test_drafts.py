"""How drafts fare in virtual time, and what loads and texts tell of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from autotune.predict.apply import NotPredictable
from autotune.predict.draft_knowledge import DraftKnowledge
from autotune.predict.draft_traces import LONGEST, traces
from autotune.predict.drafting import (
    DraftCost,
    DraftProfile,
    Trace,
    UnknownDrafts,
    given_profile,
)
from autotune.predict.measured_drafts import draft_cost, measured_drafts
from autotune.predict.replay import Replayed, replay
from autotune.predict.step_cost import StepWork
from autotune.predict.step_times import DecodeLine
from autotune.predict.virtual_drafts import VirtualChains, VirtualProposer, verified
from autotune.profiling.evidence import LoadEvidence
from autotune.records import RequestRecord
from autotune.workload.materialise import LoadRequest
from engine.batch import Batch, ScheduledSequence
from engine.config import EngineConfig
from engine.engine import CacheShape
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.proposer import ChainProposer
from engine.step_record import StepRecord

DRAFT_MODEL = EngineConfig(
    speculative_method="draft_model",
    speculative_model="small",
    num_speculative_tokens=4,
    speculative_adaptive=False,
)
COST = DraftCost(base=1e-3, sequence=2e-4, depth=3e-3, depth_sequence=1e-4)


@dataclasses.dataclass(frozen=True)
class RowsCost:
    base: float = 0.02
    row: float = 1e-4

    def decode_line(self, sequences: int) -> DecodeLine | None:
        return None

    def device_seconds(self, work: StepWork) -> float:
        return self.base + self.row * work.rows

    def host_seconds(self, work: StepWork) -> float:
        return 0.0


def made_up(request: Request, first: int, count: int) -> list[int]:
    return [7] * count


def request(name: str, generated: int = 1) -> Request:
    one = Request(name, [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=400), 0.0)
    one.token_ids += [7] * generated
    return one


def played(config: EngineConfig, drafts: DraftProfile, count: int = 30) -> Replayed:
    requests = [LoadRequest(str(i), 0.05 * i, (i, 1, 2) * 5, 120) for i in range(count)]
    return replay(
        requests,
        config,
        RowsCost(),
        CacheShape(4000, 512),
        drain_limit=1e3,
        drafts=drafts,
        keep_steps=True,
    )


def within(measured: float, chance: float, trials: int) -> bool:
    """Within 4.5 standard deviations of a share."""
    return abs(measured - chance) < 4.5 * math.sqrt(chance * (1 - chance) / trials) + 1e-12


@pytest.mark.parametrize("run", [None, 5.0])
def test_drafts_are_found_and_right_as_often_as_the_profile_says(run: float | None) -> None:
    profile = DraftProfile((0.8, 0.6), share=0.4, run=run)
    proposer = VirtualProposer(profile, made_up, seed=1)
    requests = [request(str(i)) for i in range(500)]
    found = [[d is not None for d in proposer.propose(requests, [4] * 500)] for _ in range(60)]
    # Of a chain of 500 requests; turns of one request hang together.
    spread = math.sqrt(1 if run is None else 2 * run)
    share = float(np.mean(found))
    assert abs(share - 0.4) < 4.5 * spread * math.sqrt(0.24 / 30_000)
    again = [
        b for one, two in itertools.pairwise(found) for a, b in zip(one, two, strict=True) if a
    ]
    assert within(float(np.mean(again)), 0.4 if run is None else 0.8, len(again))

    right = []
    for _ in range(40):
        for one, draft in zip(requests, proposer.propose(requests, [4] * 500), strict=True):
            if draft is not None:
                assert len(draft) == 4
                got = verified(ScheduledSequence(one, 3, 5, True, draft), made_up)
                assert set(got) == {7}
                right.append(len(got) - 1)
    counts = np.array(right)
    for depth, chance in enumerate((0.8, 0.6, 0.6, 0.6)):
        reached = counts >= depth
        assert within(float((counts[reached] > depth).mean()), chance, int(reached.sum()))


def test_chances_of_a_request_are_its_own() -> None:
    """What others are asked, and in which order, changes nothing."""
    profile = DraftProfile((0.6,), share=0.5, run=3.0)
    alone, together = (VirtualProposer(profile, made_up, seed=3) for _ in range(2))
    one = request("a")
    others = [request(str(i)) for i in range(9)]
    for _ in range(50):
        (draft,) = alone.propose([one], [5])
        both = together.propose([*others, one], [2] * 9 + [5])
        assert both[-1] == draft


def test_a_trace_is_followed_and_goes_round() -> None:
    trace = Trace((2, 0, -1, 9))
    profile = DraftProfile(traces={"a": trace})
    proposer = VirtualProposer(profile, made_up, seed=0)

    def lengths(name: str, generated: int) -> tuple[int, int] | None:
        one = request(name, generated)
        (draft,) = proposer.propose([one], [4])
        proposer.forget(one)
        if draft is None:
            return None
        got = verified(ScheduledSequence(one, 0, 5, True, draft), made_up)
        return len(draft), len(got) - 1

    expected = [(4, 2), (4, 0), None, (4, 4), (4, 0), None, (4, 4), (4, 0)]
    assert [lengths("a", n) for n in range(8)] == expected
    assert lengths("a request without a trace", 3) == (4, 4)


def test_drafting_takes_what_it_costs() -> None:
    assert COST.seconds(0, 4) == 0.0
    assert COST.seconds(3, 2) == pytest.approx(1e-3 + 6e-4 + 2 * (3e-3 + 3e-4))
    assert DraftCost(prompt_token=1e-5).seconds(1, 4, 300) == pytest.approx(3e-3)
    profile = DraftProfile(cost=DraftCost(base=1.0, prompt_token=0.5), costs_device=True)
    proposer = VirtualProposer(profile, made_up, seed=0)
    one = request("a")
    proposer.propose([one], [0])
    assert proposer.clock() == 0.0
    proposer.propose([one], [2])
    assert proposer.clock() == 1.0 + 3 * 0.5  # its prompt is computed once
    proposer.propose([one], [2])
    assert proposer.clock() == 2.0 + 3 * 0.5
    one.num_preemptions += 1
    proposer.propose([one], [2])
    assert proposer.clock() == 3.0 + 6 * 0.5


@pytest.mark.parametrize("drafted", [1, 3, 8])
def test_tokens_of_a_step_are_as_played(drafted: int) -> None:
    profile = DraftProfile((0.9, 0.7, 0.5), share=0.6)
    config = EngineConfig(
        speculative_method="ngram",
        num_speculative_tokens=drafted,
        speculative_adaptive=False,
    )
    drafts = played(config, profile).totals.drafts
    assert drafts.tokens_per_step == pytest.approx(profile.tokens_per_step(drafted), rel=0.05)


def test_what_was_played_is_measured() -> None:
    """Chances within their sampling error, costs but for rounding."""
    config = DRAFT_MODEL
    truth = DraftProfile((0.8, 0.7, 0.6, 0.5), cost=COST, costs_device=True)
    found = measured_drafts(played(config, truth).steps, config)
    assert found is not None
    assert found.share == 1.0
    assert found.costs_device
    assert found.breadth == 1.0
    assert found.acceptance == pytest.approx(truth.acceptance, abs=0.06)
    for sequences, depth in ((1, 4), (8, 4), (20, 4)):
        seconds = COST.seconds(sequences, depth)
        assert found.cost.seconds(sequences, depth) == pytest.approx(seconds, rel=0.02)
    assert 0.05 < found.error < 0.3
    again = played(config, found).totals.drafts.tokens_per_step
    assert again == pytest.approx(played(config, truth).totals.drafts.tokens_per_step, rel=0.05)


# Of one request alone, only those chains go on that are sure of themselves.
@pytest.mark.parametrize(("count", "near"), [(1, 0.2), (30, 0.12)])
def test_what_adaptive_lengths_verified_tells_nearly_as_much(count: int, near: float) -> None:
    """Tokens that are not verified were expected to be wrong; that is no high acceptance."""
    config = DRAFT_MODEL.replace(speculative_adaptive=True)
    cheap = dataclasses.replace(COST, depth=1e-3)
    truth = DraftProfile((0.75, 0.7, 0.65), cost=cheap, costs_device=True, knows=True)
    requests = [LoadRequest(str(i), 0.0, (i, 1, 2), 300) for i in range(count)]
    cache = CacheShape(4000, 512)
    play = functools.partial(replay, requests, cost=RowsCost(), cache=cache, drain_limit=1e3)
    found = measured_drafts(play(config=config, drafts=truth, keep_steps=True).steps, config)
    assert found is not None
    assert found.knows
    assert found.acceptance[:3] == pytest.approx((0.75, 0.7, 0.65), abs=near)
    again, before = (
        statistics.fmean(play(config=config, drafts=drafts, seed=s).duration for s in range(5, 13))
        for drafts in (found, truth)
    )
    assert again == pytest.approx(before, rel=0.1)


def test_who_knows_its_chances_is_right_as_often_as_it_says() -> None:
    profile = DraftProfile((0.7,), costs_device=True, knows=True)
    proposer = VirtualProposer(profile, made_up, seed=0)
    requests = [request(str(i)) for i in range(200)]
    told: list[float] = []
    right: list[bool] = []
    for _ in range(30):
        for one, draft in zip(requests, proposer.propose(requests, [3] * 200), strict=True):
            assert draft is not None
            assert draft.chances is not None
            got = verified(ScheduledSequence(one, 3, 4, True, draft), made_up)
            told += draft.chances
            right += [place < len(got) - 1 for place in range(3)]
    chances, accepted = np.array(told), np.array(right)
    for low, high in ((0.0, 0.2), (0.2, 0.6), (0.6, 0.9), (0.9, 1.0)):
        these = (chances >= low) & (chances <= high)
        assert these.sum() > 500
        assert accepted[these].mean() == pytest.approx(chances[these].mean(), abs=0.04)
    firsts = accepted.reshape(-1, 3)[:, 0]
    assert within(float(firsts.mean()), 0.7, len(firsts))


def test_a_model_that_drafts_stops_where_it_is_told() -> None:
    floor = 0.05
    profile = DraftProfile((0.5,), costs_device=True, knows=True)
    proposer = VirtualChains(profile, made_up, seed=0)
    assert isinstance(proposer, ChainProposer)
    proposer.floor = floor
    drafts = proposer.propose([request(str(i)) for i in range(300)], [9] * 300)
    lengths = set()
    for draft in drafts:
        assert draft is not None
        assert draft.chances is not None
        assert all(chance >= floor for chance in draft.chances[:-1])
        assert len(draft) == 9 or draft.chances[-1] < floor
        lengths.add(len(draft))
    assert len(lengths) > 4


def test_prompts_that_a_draft_model_computes_are_told_from_its_drafts() -> None:
    config = DRAFT_MODEL
    cost = dataclasses.replace(COST, prompt_token=2e-5)
    steps = played(config, DraftProfile((0.7,), cost=cost, costs_device=True)).steps
    found = draft_cost(steps, costs_device=True, adaptive=False)
    assert found is not None
    assert found.seconds(1, 4, 1000) - found.seconds(1, 4) == pytest.approx(0.02, rel=0.15)


def test_looking_up_takes_as_long_whatever_is_found() -> None:
    config = EngineConfig(speculative_method="ngram", speculative_adaptive=False)
    cost = DraftCost(base=2e-5, sequence=3e-5)
    truth = DraftProfile((0.6,), share=0.5, cost=cost)
    found = measured_drafts(played(config, truth).steps, config)
    assert found is not None
    assert not found.costs_device
    assert found.share == pytest.approx(0.5, abs=0.05)
    assert found.cost.seconds(10, 4) == pytest.approx(cost.seconds(10, 4), rel=0.05)


def test_few_drafts_tell_nothing() -> None:
    config = DRAFT_MODEL
    steps = played(config, DraftProfile((0.7,), costs_device=True), count=1).steps
    assert measured_drafts(steps[:5], config) is None
    assert draft_cost(steps[:5], costs_device=True, adaptive=False) is None


def reference(prompt: Sequence[int], output: Sequence[int], low: int, high: int) -> list[int]:
    """Right tokens by position: longest match first, of several the latest; written anew."""
    found = []
    for generated in range(len(output)):
        known = [*prompt, *output[:generated]]
        start = None
        for size in range(high, low - 1, -1):
            ends = [e for e in range(size, len(known)) if known[e - size : e] == known[-size:]]
            if ends and size <= len(known):
                start = ends[-1]
                break
        if start is None:
            found.append(-1)
            continue
        grown, right = list(known), 0
        while right < LONGEST and generated + right < len(output):
            token = grown[start + right]
            if token != output[generated + right]:
                break
            grown.append(token)
            right += 1
        found.append(right)
    return found


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 3), (1, 4)])
def test_traces_are_what_looking_up_by_hand_finds(low: int, high: int) -> None:
    rng = random.Random(high)
    config = EngineConfig(speculative_method="ngram", prompt_lookup_min=low, prompt_lookup_max=high)
    texts = []
    for number in range(12):
        stem = [rng.randrange(5) for _ in range(12)]
        output = [rng.choice(stem) if rng.random() < 0.2 else stem[i % 12] for i in range(40)]
        texts.append((str(number), stem, output))
    found = traces(texts, config)
    for name, prompt, output in texts:
        assert list(found[name].right) == reference(prompt, output, low, high)
    rights = [r for trace in found.values() for r in trace.right]
    assert {0} < set(rights)
    assert -1 in rights or low == 1
    assert max(rights) > 4


def test_traces_of_suffixes_know_the_answers_before() -> None:
    config = EngineConfig(speculative_method="suffix")
    rng = random.Random(0)
    answer = [rng.randrange(1000) for _ in range(30)]
    texts = [(name, [2000 + i], answer) for i, name in enumerate("ab")]
    found = traces(texts, config)
    assert set(found["a"].right) == {-1}
    assert found["b"].right[2:6] == (24, 24, 24, 24)
    chances = found["b"].chances[2]
    assert len(chances) == 24
    assert all(one >= other > 0 for one, other in itertools.pairwise(chances))
    proposer = VirtualProposer(DraftProfile(traces=found), made_up, seed=0)
    (draft,) = proposer.propose([request("b", 2)], [4])
    assert draft is not None
    assert list(draft.chances or ()) == list(chances[:4])


def test_traces_of_many_answers_are_those_of_the_first() -> None:
    config = EngineConfig(speculative_method="ngram")
    texts = [(str(i), [1, 2], [1, 2] * 10) for i in range(50)]
    assert list(traces(texts, config, most_decodes=45)) == ["0", "1", "2"]


def evidence(steps: Sequence[StepRecord] = (), texts: int = 8) -> LoadEvidence:
    prompts = {str(i): (i, 5, 6, 7) for i in range(texts)}
    requests = [
        RequestRecord(
            name,
            0.0,
            0.0,
            tuple(0.1 * n for n in range(1, 21)),
            4,
            20,
            20,
            "finished",
            output_token_ids=(8, 9) * 10,
        )
        for name in prompts
    ]
    return LoadEvidence(requests, steps, prompts)


def test_knowledge_is_of_texts_and_of_loads_that_drafted() -> None:
    plain = EngineConfig()
    drafting = DRAFT_MODEL
    steps = played(drafting, DraftProfile((0.8,), cost=COST, costs_device=True)).steps
    knowledge = DraftKnowledge.of([(plain, evidence()), (drafting, evidence(steps, 0))])
    cost = RowsCost()
    assert knowledge.profile(plain, cost) is None
    looked_up = knowledge.profile(EngineConfig(speculative_method="ngram"), cost)
    assert looked_up is not None
    assert len(looked_up.traces) == 8
    # Alternating answers are foreseen from their fifth token on.
    assert looked_up.traces["3"].right[:6] == (-1, -1, -1, -1, 16, 15)
    longer = drafting.replace(num_speculative_tokens=9)
    measured = knowledge.profile(longer, cost)
    assert measured is not None
    assert measured.acceptance[0] == pytest.approx(0.8, abs=0.05)
    assert knowledge.profile(drafting.replace(speculative_model="another"), cost) is None
    assert knowledge.profile(EngineConfig(speculative_method="suffix"), cost) is not None


def test_a_guess_is_wide_and_costs_a_part_of_a_step() -> None:
    knowledge = DraftKnowledge.of([(EngineConfig(), evidence(texts=0))], guesses=True)
    for method in ("ngram", "suffix", "draft_model", "medusa"):
        model = None if method in ("ngram", "suffix") else "small"
        config = EngineConfig(speculative_method=method, speculative_model=model)
        guess = knowledge.profile(config, RowsCost())
        assert guess is not None
        values = [guess.drawn((0, n)).tokens_per_step(4) for n in range(200)]
        assert np.quantile(values, 0.95) > 1.25 * np.quantile(values, 0.05)
        assert guess.costs_device == (model is not None)
        if model is not None:
            assert 0.05 < guess.cost.seconds(1, 4) / 0.0201 < 0.9
    assert knowledge.profile(EngineConfig(), RowsCost()) is None


def test_drawn_profiles_lie_around_the_profile() -> None:
    profile = DraftProfile((0.8, 0.6), share=0.5, cost=COST, error=0.2)
    assert profile.drawn((1, 2)) == profile.drawn((1, 2)) != profile.drawn((1, 3))
    logits = [
        math.log(p / (1 - p)) for p in (profile.drawn((0, n)).acceptance[0] for n in range(400))
    ]
    assert np.mean(logits) == pytest.approx(math.log(4), abs=4.5 * 0.2 / 20)
    assert np.std(logits) == pytest.approx(0.2, rel=0.15)
    sure = given_profile((0.8,), 0.0)
    assert sure.drawn((0, 1)) == sure
    traced = DraftProfile(traces={str(i): Trace((i,)) for i in range(9)}, error=0.1)
    drawn = traced.drawn((0, 1)).traces
    assert set(drawn) == set(traced.traces)
    assert len(set(drawn.values())) < 9


def test_chances_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DraftProfile((1.2,))
    with pytest.raises(ValueError, match="between 0 and 1"):
        DraftProfile(())


def test_drafts_of_which_nothing_is_known_are_not_played() -> None:
    config = EngineConfig(speculative_method="suffix")
    one = LoadRequest("a", 0.0, (1,), 3)
    with pytest.raises(UnknownDrafts, match=r"suffix on this traffic") as raised:
        replay([one], config, RowsCost(), CacheShape(8, 64), drain_limit=1.0)
    assert isinstance(raised.value, NotPredictable)


def test_a_tree_is_verified_as_a_whole() -> None:
    """Depths yield tokens; of each there are several to verify."""
    profile = DraftProfile((1.0,), deepest=2, breadth=3.0)
    config = EngineConfig(
        speculative_method="ngram", num_speculative_tokens=8, speculative_adaptive=False
    )
    one = LoadRequest("a", 0.0, (1, 2, 3), 10)
    cost = RowsCost(0.0, 1.0)
    shape = CacheShape(64, 512)
    found = replay([one], config, cost, shape, drain_limit=99.0, drafts=profile)
    drafting = profile.seconds(1, 2)
    assert found.records[0].token_times[1] - found.records[0].token_times[0] == pytest.approx(
        1 + 2 * 3 + drafting
    )
    assert found.totals.steps == 4


def test_the_work_of_verifying_is_counted_alike() -> None:
    """From a batch, from its record, and from what is asked about."""
    config = EngineConfig(speculative_method="ngram", speculative_adaptive=False)
    works = []
    steps = played(config, DraftProfile((0.7,), share=0.7), count=6).steps
    for step in steps:
        work = StepWork.of(step)
        assert work.prompt_tokens == step.prefill_tokens
        works.append(work)
    alone = next(w for w in works if w.drafted and not w.prefill_sequences)
    same = StepWork.of_decodes(alone.decode_sequences, alone.decode_kv_tokens, alone.drafted)
    assert same == alone
    plain = StepWork.of_decodes(4, 400)
    assert plain.verifying(3.0) == StepWork.of_decodes(4, 400, 8)
    assert plain.verifying(3.0).drafted_pairs == 8 * 100
    one = request("a", 5)
    draft = Draft([7, 7, 7])
    batch_work = StepWork.of_decodes(1, 11, 3)

    sequence = ScheduledSequence(one, 7, 4, True, draft)
    assert StepWork.of_batch(Batch([sequence], 1)) == batch_work
