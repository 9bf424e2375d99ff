"""Distributions, penalties and log-probabilities against independent references."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.request import Request, SamplingParams
from engine.sampler import Sampler, likeliest
from engine.uniform import uniform, uniforms

VOCABULARY = 40
DRAWS = 20000


def request(
    name: str,
    sampling: SamplingParams,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
) -> Request:
    made = Request(name, list(prompt), sampling, 0.0)
    made.token_ids += output
    return made


def random_logits(seed: int, rows: int = 1, columns: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2


def draw(logits: torch.Tensor, sampling: SamplingParams, count: int = DRAWS) -> torch.Tensor:
    """Tokens that `count` requests without a seed draw from the same logits [1, vocabulary]."""
    requests = [request(f"r{i}", sampling) for i in range(count)]
    sampler = Sampler(seed=11, eos_token_ids=())
    return torch.tensor(sampler.sample(logits.repeat(count, 1), requests).token_ids)


def assert_drawn_from(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-squared; cells with few expected draws are pooled."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() / probabilities.double().sum() * len(tokens)
    small = expected < 10
    observed = torch.cat([counts[~small], counts[small].sum(0, keepdim=True)])
    wanted = torch.cat([expected[~small], expected[small].sum(0, keepdim=True)])
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-4


# Warpers in vLLM's order: min-p sees the tempered distribution, top-p what top-k left.
FILTERS = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
    "hot": ({"temperature": 3.0}, [TemperatureLogitsWarper(3.0)]),
    "top_k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "top_k_then_top_p": (
        {"top_k": 8, "top_p": 0.8},
        [TopKLogitsWarper(8), TopPLogitsWarper(0.8)],
    ),
    "all": (
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        [
            TemperatureLogitsWarper(1.5),
            MinPLogitsWarper(0.05),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    knobs, warpers = FILTERS[name]
    logits = random_logits(1)
    scores = logits.clone()
    for warper in warpers:
        scores = warper(None, scores)
    probabilities = torch.softmax(scores.double(), -1)[0]
    assert_drawn_from(draw(logits, SamplingParams(**knobs)), probabilities)


def test_top_p_over_more_than_its_first_candidates() -> None:
    """A flat distribution: top-p keeps thousands of tokens."""
    logits = random_logits(2, columns=6000) * 0.1
    tokens = draw(logits, SamplingParams(top_p=0.5), 600)
    kept = TopPLogitsWarper(0.5)(None, logits)[0] > -math.inf
    assert bool(kept[tokens].all())
    assert int(kept.sum()) > 2000
    assert len(tokens.unique()) > 400


def test_mixed_rows_are_each_as_alone() -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4),
        SamplingParams(seed=4, top_p=0.6),
        SamplingParams(seed=9, top_k=3, logprobs=2),
        SamplingParams(seed=-7, min_p=0.2, repetition_penalty=1.4),
        SamplingParams(temperature=0.0, frequency_penalty=1.0, min_tokens=3),
    ]
    logits = random_logits(3, rows=len(params))
    requests = [request(str(i), p, output=(5, 5)) for i, p in enumerate(params)]
    sampler = Sampler(0, eos_token_ids=(7,))
    together = sampler.sample(logits.clone(), requests).token_ids
    backwards = sampler.sample(logits.flip(0).clone(), requests[::-1]).token_ids
    alone = [
        sampler.sample(logits[i : i + 1].clone(), [r]).token_ids[0] for i, r in enumerate(requests)
    ]
    assert together == alone == backwards[::-1]


def test_seeds() -> None:
    logits = random_logits(4)

    def tokens(name: str, seed: int | None, engine_seed: int = 0) -> list[int]:
        out = []
        for position in range(30):
            r = request(name, SamplingParams(seed=seed), output=tuple(range(position)))
            out += Sampler(engine_seed, ()).sample(logits.clone(), [r]).token_ids
        return out

    assert tokens("a", 1) == tokens("b", 1)
    assert tokens("a", 1) != tokens("a", 2)
    assert tokens("a", None) == tokens("a", None)
    assert tokens("a", None) != tokens("b", None)
    assert tokens("a", None) != tokens("a", None, engine_seed=1)


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    across_positions = [uniform(3, i) for i in range(5000)]
    across_seeds = [uniform(i, 3) for i in range(5000)]
    for numbers in (across_positions, across_seeds):
        assert stats.kstest(numbers, "uniform").pvalue > 1e-3
        assert abs(stats.pearsonr(numbers[:-1], numbers[1:]).statistic) < 0.06
        assert all(0.0 <= n < 1.0 for n in numbers)


def test_uniform_numbers_at_once_are_those_one_by_one() -> None:
    seeds = [0, -1, 2**64 - 1, 2**70 + 5, *(7919**i for i in range(60))]
    positions = [0, 1, 2**31, 131_071, *range(60)]
    assert uniforms(seeds, positions).tolist() == list(map(uniform, seeds, positions))


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(5)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.7, logprobs=0)
    r = request("a", sampling, prompt=(3, 9), output=(4, 4, 30))
    warped = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([r.token_ids]), logits.clone())
    assert Sampler(0, ()).sample(logits.clone(), [r]).token_ids == [int(warped.argmax())]
    for seed in range(200):
        logits = random_logits(seed)
        r = request("a", sampling, output=tuple(torch.randint(VOCABULARY, (12,)).tolist()))
        warped = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([r.token_ids]), logits.clone())
        assert Sampler(0, ()).sample(logits.clone(), [r]).token_ids == [int(warped.argmax())]


def test_frequency_and_presence_penalties() -> None:
    """OpenAI's formula: once per occurrence, and once; of the output alone."""
    for seed in range(100):
        logits = random_logits(seed)
        sampling = SamplingParams(temperature=0.0, frequency_penalty=0.6, presence_penalty=0.9)
        output = (*torch.randint(6, (10,)).tolist(), int(logits.argmax()))
        r = request("a", sampling, prompt=(int(logits.argsort()[0, -2]),), output=output)
        expected = logits[0].double().clone()
        for token in output:
            expected[token] -= 0.6
        for token in set(output):
            expected[token] -= 0.9
        assert Sampler(0, ()).sample(logits.clone(), [r]).token_ids == [int(expected.argmax())]


def test_logprobs_are_log_softmax_of_raw_logits() -> None:
    logits = random_logits(6, rows=3)
    params = [
        SamplingParams(temperature=0.0, logprobs=5, repetition_penalty=3.0),
        SamplingParams(logprobs=0, temperature=0.3, seed=1),
        SamplingParams(temperature=0.0),
    ]
    requests = [request(str(i), p, output=(8, 9)) for i, p in enumerate(params)]
    sampled = Sampler(0, ()).sample(logits.clone(), requests)
    expected = torch.log_softmax(logits.double(), -1)
    first, second, none = sampled.logprobs
    assert none is None
    assert first is not None
    assert second is not None
    top = expected[0].topk(5)
    assert list(first.top) == top.indices.tolist()
    assert list(first.top.values()) == pytest.approx(top.values.tolist(), abs=1e-5)
    for row, entry in ((0, first), (1, second)):
        assert entry.token_id == sampled.token_ids[row]
        assert entry.logprob == pytest.approx(float(expected[row, entry.token_id]), abs=1e-5)
    assert second.top == {}


def test_min_tokens_forbids_ends() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 7], logits[0, 8], logits[0, 9] = 9.0, 8.0, 7.0
    sampler = Sampler(0, eos_token_ids=(7,))

    def token(output: tuple[int, ...], **knobs: object) -> int:
        sampling = SamplingParams(temperature=0.0, min_tokens=2, **knobs)  # type: ignore[arg-type]
        return sampler.sample(logits.clone(), [request("a", sampling, output=output)]).token_ids[0]

    assert token(()) == 8
    assert token((), stop_token_ids=(8, 10_000)) == 9
    assert token((1, 1), stop_token_ids=(8,)) == 7
    assert token((), ignore_eos=True, stop_token_ids=(8,)) == 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.5}, {"top_k": 4, "min_p": 0.3}, {"logprobs": 3}])
def test_broken_logits_give_some_token_and_leave_others_alone(
    bad: float, knobs: dict[str, float]
) -> None:
    logits = random_logits(8, rows=2)
    sampling = SamplingParams(seed=3, **knobs)  # type: ignore[arg-type]
    good = Sampler(0, ()).sample(logits[1:].clone(), [request("b", sampling)]).token_ids
    logits[0] = bad
    requests = [request("a", sampling), request("b", sampling)]
    tokens = Sampler(0, ()).sample(logits, requests).token_ids
    assert 0 <= tokens[0] < VOCABULARY
    assert tokens[1] == good[0]


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = random_logits(9, rows=3)
    requests = [request(str(i), SamplingParams(temperature=1e-30)) for i in range(3)]
    assert Sampler(0, ()).sample(logits.clone(), requests).token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("columns", [1, 255, 1024, 1025, 5000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest_is_argmax_with_ties_to_the_first(columns: int, dtype: torch.dtype) -> None:
    logits = random_logits(10, 9, columns).to(dtype)
    logits[0] = 1.0
    logits[1, columns // 2 :] = 50.0
    logits[2, columns - 1] = 99.0
    logits[3, columns // 3] = math.nan
    expected = logits.argmax(-1)
    assert likeliest(logits).tolist() == expected.tolist()
    assert expected[0] == 0
