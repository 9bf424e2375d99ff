"""Whoever drafts, what is generated is what the model alone would generate: the whole engine."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from engine import LLM, SamplingParams
from engine.request import FinishReason, TokenLogprobs
from engine.step_record import StepRecord
from kernels import sampling
from tests.engine.speculate.chances import chi_squared
from tests.engine.speculate.drafting_folders import (
    METHODS,
    DraftedFor,
    letter,
    make_drafted_for,
)
from tests.engine.tiny_models import TinyModel

VOCABULARY = 24
PROMPTS = 1000  # for each of the methods


@dataclass
class Generated:
    """What a request got: its tokens in the portions that they came in."""

    portions: list[list[int]] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for portion in self.portions for token in portion]


@dataclass
class Drafting:
    """A model, and an engine for each way to draft for it, loaded when first asked for."""

    folders: DraftedFor
    llms: dict[str, LLM] = field(default_factory=dict)

    def llm(self, method: str) -> LLM:
        if method not in self.llms:
            knobs = {"block_size": 8} if method == "none" else self.folders.knobs(method)
            self.llms[method] = self.folders.tiny.llm(max_num_seqs=128, **knobs)
        return self.llms[method]

    def run(
        self, method: str, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> tuple[list[Generated], list[StepRecord]]:
        return run(self.llm(method), prompts, params)


def run(
    llm: LLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    between: Callable[[int], None] = lambda step: None,
) -> tuple[list[Generated], list[StepRecord]]:
    """Step until all is generated; requests are called the same in every run."""
    engine = llm.engine
    records: list[StepRecord] = []
    engine.on_step = records.append
    generated = {str(i): Generated() for i in range(len(prompts))}
    requests = [
        engine.add(str(i), prompt, one)
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    for step in itertools.count():
        if not engine.has_unfinished:
            break
        between(step)
        for output in engine.step():
            one = generated[output.request_id]
            assert one.finish_reason is None
            assert output.refusal is None
            one.portions.append(output.token_ids)
            one.text += output.text
            one.logprobs += output.logprobs or []
            one.finish_reason = output.finish_reason
    engine.on_step = None
    engine.scheduler.check_integrity()
    assert engine.pool.num_used == 0
    for request, one in zip(requests, generated.values(), strict=True):
        assert one.finish_reason is not None
        assert one.tokens == request.output_token_ids
        assert not one.logprobs or [p.token_id for p in one.logprobs] == one.tokens
    return list(generated.values()), records


def accepted(records: Sequence[StepRecord]) -> int:
    count = sum(record.accepted_tokens for record in records)
    assert sum(record.drafted_tokens for record in records) > count
    return count


def random_prompts(rng: random.Random, count: int, longest: int = 24) -> list[list[int]]:
    """Some begin alike."""
    stem = [rng.randrange(VOCABULARY) for _ in range(longest // 2)]
    return [
        stem[: rng.randrange(-longest // 2, longest // 2 + 1)]
        + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, longest // 2 + 1))]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Drafting:
    return Drafting(make_drafted_for(tmp_path_factory.mktemp("drafting"), VOCABULARY, 3))


@pytest.fixture(scope="module")
def greedy_answers(drafting: Drafting) -> tuple[list[list[int]], list[Generated]]:
    prompts = random_prompts(random.Random(), PROMPTS)
    return prompts, drafting.run("none", prompts, [greedy()] * PROMPTS)[0]


def greedy(**knobs: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **knobs)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_outputs_of_thousands_of_prompts(
    drafting: Drafting,
    greedy_answers: tuple[list[list[int]], list[Generated]],
    method: str,
) -> None:
    prompts, wanted = greedy_answers
    outputs, records = drafting.run(method, prompts, [greedy()] * PROMPTS)
    ties = 0
    for prompt, ours, theirs in zip(prompts, outputs, wanted, strict=True):
        assert len(ours.tokens) == len(theirs.tokens)
        if ours.tokens != theirs.tokens:  # only where rounding may decide
            certain = drafting.folders.tiny.certain(prompt, theirs.tokens)
            assert ours.tokens[:certain] == theirs.tokens[:certain]
            ties += 1
    assert ties < PROMPTS // 100
    assert accepted(records) > PROMPTS // 2
    assert any(len(portion) > 1 for one in outputs for portion in one.portions)


def random_params(rng: random.Random, seeded: bool) -> SamplingParams:
    """Chance, filters, penalties, ends and reports, each now and then."""

    def sometimes(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.4 else otherwise

    max_tokens = rng.randrange(1, 20)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sometimes(0.0, rng.choice([0.3, 0.7, 1.0, 1.5])),
        top_k=sometimes(rng.randrange(1, VOCABULARY), 0),
        top_p=sometimes(rng.uniform(0.3, 1.0), 1.0),
        min_p=sometimes(rng.uniform(0.0, 0.2), 0.0),
        repetition_penalty=sometimes(rng.uniform(0.8, 1.5), 1.0),
        presence_penalty=sometimes(rng.uniform(-1, 1), 0.0),
        frequency_penalty=sometimes(rng.uniform(-1, 1), 0.0),
        seed=rng.randrange(1000) if seeded or rng.random() < 0.5 else None,
        stop=sometimes([letter(rng.randrange(VOCABULARY)) + letter(rng.randrange(6))], ()),
        stop_token_ids=sometimes([rng.randrange(VOCABULARY) for _ in range(2)], ()),
        min_tokens=sometimes(rng.randrange(max_tokens + 1), 0),
        logprobs=sometimes(rng.randrange(4), None),
    )


def assert_alike(outputs: Sequence[Generated], wanted: Sequence[Generated], most: int) -> None:
    """Equal but for at most so many, where rounding decided between two tokens."""
    different = 0
    for ours, theirs in zip(outputs, wanted, strict=True):
        if ours.tokens != theirs.tokens:
            different += 1
            continue
        assert ours.text == theirs.text
        assert ours.finish_reason is theirs.finish_reason
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert list(one.top.values()) == pytest.approx(list(other.top.values()), abs=1e-3)
    assert different <= most


@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_asked_for_comes_out_as_without_drafts(drafting: Drafting, method: str) -> None:
    """Without a seed too, but where a draft is drawn by chance: that has a test of its own."""
    rng = random.Random()
    count = 400
    prompts = random_prompts(rng, count)
    params = [random_params(rng, seeded=method == "draft_model") for _ in range(count)]
    wanted, _ = drafting.run("none", prompts, params)
    outputs, records = drafting.run(method, prompts, params)
    assert_alike(outputs, wanted, most=count // 100)
    assert accepted(records) > count // 10
    reasons = {one.finish_reason for one in outputs}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_text_ends_the_output_inside_of_what_was_drafted(
    drafting: Drafting, greedy_answers: tuple[list[list[int]], list[Generated]], method: str
) -> None:
    """At every place of some outputs: two letters of two tokens, of which a draft may hold both."""
    prompts, plain = greedy_answers
    some, params = [], []
    for prompt, one in zip(prompts[:60], plain[:60], strict=True):
        for place in range(0, 10, 3):
            some.append(prompt)
            params.append(greedy(stop=[one.text[place : place + 2]], min_tokens=place % 2 * 4))
    wanted, _ = drafting.run("none", some, params)
    outputs, records = drafting.run(method, some, params)
    assert_alike(outputs, wanted, most=2)
    assert accepted(records) > 20
    for one, sampled in zip(outputs, params, strict=True):
        if one.finish_reason is FinishReason.STOP:
            assert sampled.min_tokens or sampled.stop[0] not in one.text
            whole = "".join(map(letter, one.tokens))
            assert whole == one.text + sampled.stop[0]
            assert len(one.tokens) >= sampled.min_tokens
    assert sum(one.finish_reason is FinishReason.STOP for one in outputs) > 150


CROWDED = {"kv_cache_memory_bytes": 22 * 8 * 768, "max_num_seqs": 8, "enable_prefix_caching": False}
ENGINES: dict[str, dict[str, Any]] = {
    "crowded": CROWDED,
    "chunks": {"max_num_batched_tokens": 19, "max_num_seqs": 9},
    "adaptive": {"speculative_adaptive": True, "scheduling_policy": "sjf"},
    "quantized": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_with_all_else_that_an_engine_does(drafting: Drafting, method: str, engine: str) -> None:
    rng = random.Random(8)
    prompts = random_prompts(rng, 30, longest=40)
    chance = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)
    certain = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    params = [rng.choice([chance, certain]) for _ in prompts]
    folders, other = drafting.folders, ENGINES[engine]
    plain = {k: v for k, v in other.items() if k != "speculative_adaptive"}
    wanted, _ = run(folders.tiny.llm(block_size=8, **plain), prompts, params)
    if method == "draft_model" and engine == "crowded":  # its cache takes as much again
        other = {**other, "kv_cache_memory_bytes": 2 * other["kv_cache_memory_bytes"]}
    outputs, records = run(folders.tiny.llm(**{**folders.knobs(method), **other}), prompts, params)
    # Rounding to 8 bits makes a last bit's difference one of a percent.
    assert_alike_or_quantized(outputs, wanted, quantized=engine == "quantized")
    if engine != "adaptive":
        assert accepted(records) > 10
    if engine == "crowded":
        assert sum(record.preemptions for record in records) > 0


def assert_alike_or_quantized(
    outputs: Sequence[Generated], wanted: Sequence[Generated], quantized: bool
) -> None:
    assert_alike(outputs, wanted, most=len(outputs) // 8 if quantized else 0)


def test_whoever_drafts_may_change_while_requests_run(drafting: Drafting) -> None:
    rng = random.Random(2)
    prompts = random_prompts(rng, 40)
    params = [
        SamplingParams(max_tokens=40, temperature=rng.choice([0.0, 0.9]), seed=i)
        for i in range(len(prompts))
    ]
    wanted, _ = drafting.run("none", prompts, params)
    folders = drafting.folders
    llm = folders.tiny.llm(block_size=8)
    changes = {
        3: folders.knobs("ngram"),
        6: {"num_speculative_tokens": 2},
        9: folders.knobs("draft_model"),
        12: {"speculative_method": "none"},
        15: folders.knobs("medusa"),
        18: {**folders.knobs("suffix"), "kv_cache_dtype": "auto"},
        21: {"prompt_lookup_max": 2, "num_speculative_tokens": 6},
    }
    outputs, records = run(
        llm, prompts, params, lambda step: step in changes and llm.reconfigure(**changes[step])
    )
    assert_alike(outputs, wanted, most=0)
    assert accepted(records) > 20


LETTERS = 6


def exact_joint(
    tiny: TinyModel, prompt: list[int], depth: int, params: SamplingParams
) -> np.ndarray:
    """The probability of each output of `depth` tokens, by transformers' logits; float64."""
    joint = np.ones(1)
    for length in range(depth):
        outputs = list(itertools.product(range(LETTERS), repeat=length))
        tokens = torch.tensor([[*prompt, *output] for output in outputs])
        with torch.inference_mode():
            logits = tiny.model(tokens).logits[:, -1].double()
        logits = logits.clone()  # one that may be changed
        for row, output in zip(logits, outputs, strict=True):
            for token in set(prompt) | set(output):
                factor = params.repetition_penalty
                row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
            for token in set(output):
                times = output.count(token)
                row[token] -= params.frequency_penalty * times + params.presence_penalty
            if length < params.min_tokens:
                row[list(params.stop_token_ids)] = -math.inf
        count = len(outputs)
        filters = sampling.DrawParameters(
            [params.temperature] * count,
            [params.top_k] * count,
            [params.top_p] * count,
            [params.min_p] * count,
            [0.0] * count,
        )
        each = sampling.probabilities(logits, filters).double().numpy()
        joint = (joint[:, None] * each).ravel()
    return joint


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {
            "temperature": 1.3,
            "top_k": 5,
            "top_p": 0.95,
            "min_p": 0.02,
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.5,
            "presence_penalty": -0.3,
            "min_tokens": 3,
            "stop_token_ids": [2],
        },
    ],
    ids=["plain", "filters_and_penalties"],
)
def test_drawn_drafts_leave_the_distribution_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, knobs: dict[str, Any]
) -> None:
    """Requests without a seed, all alike: how often each output comes, over all its tokens."""
    samples, depth = 5000, 4
    root = tmp_path_factory.mktemp("letters")
    folders = make_drafted_for(root, LETTERS, 4, initializer_range=0.2)
    llm = folders.tiny.llm(
        max_num_seqs=512, max_num_batched_tokens=4096, **folders.knobs("draft_model")
    )
    params = SamplingParams(max_tokens=depth, ignore_eos=True, **knobs)
    prompt = [1, 4, 2, 0, 3, 3, 5, 1, 0]
    outputs, records = run(llm, [prompt] * samples, [params] * samples)
    counts = np.zeros(LETTERS**depth, dtype=np.int64)
    for one in outputs:
        place = 0
        for token in one.tokens:
            place = place * LETTERS + token
        counts[place] += 1
    assert accepted(records) > samples
    assert chi_squared(counts, exact_joint(folders.tiny, prompt, depth, params)) > 1e-3
