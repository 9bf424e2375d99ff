"""Tokens that come of drawn drafts are distributed as the model's own, jointly over positions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.speculate.draft import Draft
from engine.speculate.rejection import accept_drawn
from engine.uniform import ACCEPTANCE, REDRAW, stream_seed, uniform, uniforms
from kernels import sampling
from tests.engine.speculate.chances import chi_squared

VOCABULARY = 5
SAMPLES = 100_000
FEWER = 30_000  # as many as show what must not be, below
DEPTH = 3
# Distributions [n, vocabulary] behind histories int64 [n, tokens].
Model = Callable[[Tensor], Tensor]


def model(seed: int, sharpness: float = 1.5, penalty: float = 0.0, **filters: float) -> Model:
    """Random logits by the last two tokens, penalised for each token of the history."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator) * sharpness
    filtered = processed(table.reshape(-1, VOCABULARY), **filters).reshape(table.shape)

    def distributions(histories: Tensor) -> Tensor:
        if not penalty:
            return filtered[histories[:, -1], histories[:, -2]]
        counts = torch.nn.functional.one_hot(histories[:, 2:], VOCABULARY).sum(1)
        logits = table[histories[:, -1], histories[:, -2]] - penalty * counts
        return processed(logits, **filters)

    return distributions


def processed(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    count = len(logits)
    parameters = sampling.DrawParameters(
        [temperature] * count, [top_k] * count, [top_p] * count, [min_p] * count, [0.0] * count
    )
    return sampling.probabilities(logits, parameters)


@pytest.fixture(autouse=True)
def no_collecting() -> Iterator[None]:
    """Looking for cycles among hundreds of thousands of drafts takes longer than all the rest."""
    gc.disable()
    yield
    gc.enable()


def exact_joint(target: Model, start: list[int], depth: int = DEPTH) -> np.ndarray:
    """Probability of each sequence of `depth` tokens behind `start`; float64 [vocabulary, ...]."""
    histories = torch.tensor([start])
    joint = torch.ones(1, dtype=torch.float64)
    for _ in range(depth):
        joint = (joint.unsqueeze(1) * target(histories).double()).flatten()
        tokens = torch.arange(VOCABULARY).repeat(len(histories)).unsqueeze(1)
        histories = torch.cat([histories.repeat_interleave(VOCABULARY, 0), tokens], 1)
    return joint.reshape([VOCABULARY] * depth).numpy()


def draw_drafts(
    proposer: Model, histories: Tensor, seeds: list[int], limits: list[int]
) -> list[Draft]:
    """A draft for each history, drawn from the proposer with the drafts' own stream."""
    streams = [stream_seed(seed, 99) for seed in seeds]
    longest = max(limits)
    grown, steps = histories, []
    for _ in range(longest):
        q = proposer(grown)
        chance = torch.from_numpy(uniforms(streams, [grown.shape[1]] * len(streams)))
        steps.append(q)
        grown = torch.cat([grown, sampling.draw_from(q, chance).unsqueeze(1)], 1)
    tokens = grown[:, histories.shape[1] :].tolist()
    q_all = torch.stack(steps, 1) if steps else torch.empty(len(seeds), 0, VOCABULARY)
    drawn = zip(tokens, q_all.unbind(), limits, strict=True)
    return [Draft(t, probabilities=q).first(k) for t, q, k in drawn]


def verify(
    target: Model, histories: Tensor, drafts: list[Draft], seeds: list[int]
) -> list[list[int]]:
    """What `accept_drawn` makes of the drafts, with the target's distributions at all rows."""
    longest = max(len(draft) for draft in drafts)
    padded = np.zeros((len(drafts), longest), dtype=np.int64)
    padded[np.arange(longest) < np.array([[len(d)] for d in drafts])] = [
        token for d in drafts for token in d.token_ids
    ]
    grown = torch.cat([histories, torch.from_numpy(padded)], 1)
    length = histories.shape[1]
    each = [target(grown[:, : length + i]) for i in range(longest + 1)]
    probabilities = torch.stack(each, 1).reshape(-1, VOCABULARY)
    rows = [(draft, i * (longest + 1)) for i, draft in enumerate(drafts)]
    return accept_drawn(probabilities, rows, seeds, [length] * len(drafts))


def sampled_joint(
    target: Model,
    propose: Callable[[Tensor, list[int], list[int]], list[Draft]],
    most: int,
    samples: int = FEWER,
) -> tuple[np.ndarray, float]:
    """Counts of the first tokens generated, and how many of the drafted were accepted."""
    rng = np.random.default_rng(7)
    start = [1, 3]
    outputs: list[list[int]] = [[] for _ in range(samples)]
    seeds = rng.integers(1 << 62, size=samples).tolist()
    drafted = accepted = 0
    for done in range(DEPTH):
        # Those with equally many tokens at once; all have at least `done`.
        some = [i for i, output in enumerate(outputs) if len(output) == done]
        if not some:
            continue
        limits = rng.integers(most + 1, size=len(some)).tolist()
        histories = torch.from_numpy(np.array([start + outputs[i] for i in some]))
        own = [seeds[i] for i in some]
        drafts = propose(histories, own, limits)
        verified = verify(target, histories, drafts, own)
        for i, draft, tokens in zip(some, drafts, verified, strict=True):
            outputs[i] += tokens
            drafted += len(draft)
            accepted += len(tokens) - 1
    counts = np.zeros([VOCABULARY] * DEPTH, dtype=np.int64)
    np.add.at(counts, tuple(np.array([o[:DEPTH] for o in outputs]).T), 1)
    return counts, accepted / max(1, drafted)


FILTERS: dict[str, dict[str, float]] = {
    "plain": {},
    "top_k": {"top_k": 2, "temperature": 2.5, "sharpness": 3.0},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "penalty": 0.8},
}


@pytest.mark.parametrize("name", FILTERS)
def test_joint_distribution_of_drawn_drafts(name: str) -> None:
    """Target and proposer are filtered alike and disagree, also on which tokens are possible."""
    knobs = FILTERS[name]
    target = model(seed=1, **knobs)
    proposer = model(seed=2, **knobs)
    samples = SAMPLES if name == "all" else FEWER
    counts, share = sampled_joint(target, partial(draw_drafts, proposer), 3, samples)
    assert 0.05 < share < 0.9
    assert chi_squared(counts, exact_joint(target, [1, 3])) > 1e-3


@pytest.mark.parametrize("case", ["almost", "disjoint", "certain"])
def test_joint_distribution_of_extreme_proposers(case: str) -> None:
    target: Model = model(seed=1, penalty=0.5, top_k=3)

    def proposer(histories: Tensor) -> Tensor:
        p = target(histories)
        if case == "almost":  # by rounding alone
            return (p * (1 + 1e-6 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))).float()
        if case == "disjoint":
            impossible = (p == 0).float()
            return impossible / impossible.sum(1, keepdim=True)
        return torch.nn.functional.one_hot(histories[:, -1], VOCABULARY).float()

    most = 1 if case == "disjoint" else 2
    counts, share = sampled_joint(target, partial(draw_drafts, proposer), most)
    if case == "almost":
        assert share > 0.999
    if case == "disjoint":
        assert share == 0.0
    assert chi_squared(counts, exact_joint(target, [1, 3])) > 1e-3


def test_joint_distribution_of_drafts_without_chance() -> None:
    """They count as certain: accepted with p(x), else drawn from p without x."""
    target = model(seed=1)

    def propose(histories: Tensor, seeds: list[int], limits: list[int]) -> list[Draft]:
        last = histories[:, -1].tolist()
        return [Draft([token] * k) for token, k in zip(last, limits, strict=True)]

    counts, share = sampled_joint(target, propose, 2, SAMPLES)
    assert share > 0.1
    assert chi_squared(counts, exact_joint(target, [1, 3])) > 1e-3


def test_dropping_by_value_would_be_noticed() -> None:
    """What must not be done, and that few samples show it: unlikely drafts are dropped."""
    target = model(seed=1)
    proposer = model(seed=2)

    def propose(histories: Tensor, seeds: list[int], limits: list[int]) -> list[Draft]:
        drafts = draw_drafts(proposer, histories, seeds, [1] * len(limits))
        kept = [float(d.probabilities[0, d.token_ids[0]]) > 0.15 for d in drafts]
        return [d if keep else d.first(0) for d, keep in zip(drafts, kept, strict=True)]

    counts, _ = sampled_joint(target, propose, most=1)
    assert chi_squared(counts, exact_joint(target, [1, 3])) < 1e-6


def exactly(draft: Draft, rows: Tensor, seed: int, position: int) -> tuple[int, int, float]:
    """The rule written out: how many are accepted, and the chances of the next draw."""
    count = 0
    for i, token in enumerate(draft.token_ids):
        p = float(rows[i, token])
        q = float(draft.probabilities[i, token])
        if q == 0 or uniform(stream_seed(seed, ACCEPTANCE), position + i) >= p / q:
            break
        count += 1
    left = rows[count].double()
    if count < len(draft):
        left = (left - draft.probabilities[count].double()).clamp(min=0)
    sums = left.cumsum(0)
    u = uniform(stream_seed(seed, REDRAW), position + count)
    more = int(torch.searchsorted(sums, u * sums[-1:], right=True))
    # Not as a share of what is left, which may be next to nothing: masses are rounded as they are.
    return count, more, float((sums - u * sums[-1]).abs().min())


def test_the_rule_written_out() -> None:
    """Rows in any order with gaps, lengths from 0, seeds of any sign; and again the same."""
    rng = np.random.default_rng()
    vocabulary = 11
    lengths = [3, 0, 1, 5, 0, 2] * 20
    table = torch.softmax(torch.randn(600, vocabulary) * 2, 1)
    firsts = (rng.permutation(600 // 6)[: len(lengths)] * 6).tolist() * 2
    firsts = firsts[: len(lengths)]
    drafts = []
    for length in lengths:
        q = torch.softmax(torch.randn(length, vocabulary) * 2, 1)
        tokens = torch.multinomial(q, 1)[:, 0].tolist() if length else []
        drafts.append(Draft(tokens, probabilities=q))
    rows = list(zip(drafts, firsts, strict=True))
    seeds = rng.integers(-(1 << 62), 1 << 62, size=len(lengths)).tolist()
    positions = rng.integers(1, 9000, size=len(lengths)).tolist()
    got = accept_drawn(table, rows, seeds, positions)
    assert got == accept_drawn(table, rows, seeds, positions)
    assert {len(tokens) for tokens in got} >= {1, 2, 3}
    for (draft, first), seed, position, tokens in zip(rows, seeds, positions, got, strict=True):
        count, more, margin = exactly(draft, table[first:], seed, position)
        assert tokens[:-1] == draft.token_ids[:count]
        assert tokens[-1] == more or margin < 1e-6
    # One by one as together.
    for i in range(0, len(rows), 7):
        assert accept_drawn(table, rows[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) == [
            got[i]
        ]
    assert accept_drawn(table, [], [], []) == []


def test_rows_of_nan_give_tokens_and_leave_others_alone() -> None:
    good = torch.softmax(torch.randn(3, 6), 1)
    q = torch.softmax(torch.randn(2, 6), 1)
    draft = Draft([1, 2], probabilities=q)
    broken = Draft([3, 4], probabilities=torch.full((2, 6), float("nan")))
    bad = torch.full((3, 6), float("nan"))
    rows = [(broken, 0), (draft, 3), (Draft([5], probabilities=q[:1]), 6)]
    got = accept_drawn(torch.cat([bad, good, bad]), rows, [1, 2, 3], [9, 9, 9])
    assert got[1] == accept_drawn(good, [(draft, 0)], [2], [9])[0]
    assert all(0 <= token < 6 for tokens in got for token in tokens)


def test_a_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="tree"):
        accept_drawn(torch.ones(3, 4), [(Draft([1, 2], parents=[-1, -1]), 0)], [0], [1])
