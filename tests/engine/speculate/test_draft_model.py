"""Drafts by a model against what the same model says of the whole text at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.draft_model import DraftModel
from engine.speculate.proposer import ChainProposer
from engine.uniform import DRAFTING, request_seed, stream_seed, uniform
from kernels import sampling
from tests.engine.tiny_models import VOCABULARY, TinyModel, make_tiny, paged_logits

LONGEST = 96
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("drafts")
    return {case: make_tiny(case, folder / case) for case in ("llama", "gemma2", "qwen3")}


@pytest.fixture(scope="module")
def llama(models: dict[str, TinyModel]) -> Decoder:
    return models["llama"].decoder()


def draft_model(
    decoder: Decoder, num_blocks: int = 200, longest: int = LONGEST, **knobs: object
) -> DraftModel:
    fixed = {"device": "cpu", "block_size": 8, "speculative_adaptive": False}
    config = EngineConfig.from_mapping({**fixed, **knobs})
    return DraftModel(decoder, config, longest, num_blocks, eos_token_ids=(1,))


def request(name: str, tokens: list[int], params: SamplingParams = GREEDY) -> Request:
    return Request(name, list(tokens), params, 0.0)


def said(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits of what follows `tokens`, computed at once."""
    return paged_logits(decoder, tokens, [len(tokens)])[-1]


def check_chain(decoder: Decoder, tokens: list[int], draft: Draft) -> None:
    """Each token is the likeliest, up to rounding, and the chances are the model's own."""
    chance = 1.0
    assert draft.chances is not None
    for token, told in zip(draft.token_ids, draft.chances, strict=True):
        logits = said(decoder, tokens)
        assert logits.max() - logits[token] < 1e-3
        chance *= float(logits.softmax(0)[token])
        assert told == pytest.approx(chance, rel=1e-2)
        tokens = [*tokens, token]


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize(
    ("case", "num_blocks", "knobs"),
    [
        ("llama", 200, {}),
        ("llama", 20, {"max_num_batched_tokens": 11, "max_num_seqs": 8}),
        ("llama", 24, {"enable_prefix_caching": False}),
        ("qwen3", 30, {"block_size": 16}),
        ("gemma2", 40, {"max_num_batched_tokens": 16, "max_num_seqs": 8}),  # windows, caps
    ],
)
def test_a_life_of_requests(
    models: dict[str, TinyModel], case: str, num_blocks: int, knobs: dict[str, object]
) -> None:
    """They come with equal beginnings, are asked about or not, accept some, and leave."""
    decoder = models[case].decoder()
    model = draft_model(decoder, num_blocks, **knobs)
    rng = random.Random(num_blocks)
    beginnings = [random_tokens(rng, 20) for _ in range(2)]
    alive: list[Request] = []
    checked = 0
    for turn in range(25):
        while len(alive) < rng.choice([1, 3, 5]):
            tokens = rng.choice([*beginnings, []]) + random_tokens(rng, rng.choice([1, 2, 17]))
            alive.append(request(f"{turn} {len(alive)}", tokens))
        asked = rng.sample(alive, rng.randint(1, len(alive)))
        limits = [rng.choice([0, 1, 3, 5]) for _ in asked]
        drafts = model.propose(asked, limits)
        model.check_integrity()
        for each, limit, draft in zip(asked, limits, drafts, strict=True):
            assert (draft is None) or 0 < len(draft) <= limit
            if draft is not None:
                check_chain(decoder, each.token_ids, draft)
                checked += len(draft)
        for each, draft in zip(asked, drafts, strict=True):
            accepted = [] if draft is None else draft.token_ids[: rng.randint(0, len(draft))]
            each.token_ids += [*accepted, *random_tokens(rng, 1)]
        for each in list(alive):
            if len(each.token_ids) > 70 or rng.random() < 0.1:
                model.forget(each)
                if rng.random() < 0.5:  # else it was preempted, and comes again
                    alive.remove(each)
    assert checked > 60
    for each in alive:
        model.forget(each)
    model.check_integrity()
    assert model.pool.num_used == 0


def test_only_what_is_lacking_is_computed(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = draft_model(llama)
    computed: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        computed.append(len(tokens))
        return forward(self, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", counted)

    def asked(each: Request, limit: int) -> list[int]:
        computed.clear()
        (draft,) = model.propose([each], [limit])
        assert draft is not None
        each.token_ids += draft.token_ids
        return computed[:]

    first = request("a", list(range(40)))
    assert asked(first, 3) == [39, 1, 1, 1]
    first.token_ids.append(5)  # all accepted, and one more
    assert asked(first, 3) == [2, 1, 1]
    first.token_ids[-2:] = [(first.token_ids[-2] + 1) % VOCABULARY]  # one accepted, one not
    assert asked(first, 2) == [1, 1]
    first.token_ids += [3, 4, 5]  # it went on without being asked about; of two, one was computed
    assert asked(first, 1) == [4]
    first.token_ids += range(20)
    assert asked(first, 1) == [20, 1]
    # What it filled is found by others, up to the last whole block.
    assert asked(request("b", [*range(40), 9]), 1) == [1]
    assert asked(request("c", [9, *range(40)]), 1) == [40, 1]


def test_no_room_is_no_draft_and_others_give_way(llama: Decoder) -> None:
    model = draft_model(llama, num_blocks=8, enable_prefix_caching=False)
    a, b, c = (request(name, [i] * 30) for i, name in enumerate("abc"))
    assert all(model.propose([a, b], [2, 2]))
    drafts = model.propose([c, a], [2, 1])  # b gives way, a does not
    assert all(drafts)
    assert model.pool.num_used == 8
    first, second, third = model.propose([a, b, c], [1, 2, 3])
    assert first is None or second is None or third is None
    model.check_integrity()
    assert model.propose([request("d", [1] * 80)], [2]) == [None]


def test_nothing_is_drafted_beyond_the_longest_sequence(llama: Decoder) -> None:
    model = draft_model(llama)
    (draft,) = model.propose([request("a", [3] * (LONGEST - 1))], [5])
    assert draft is not None
    assert len(draft) == 2  # the last of them is not computed
    assert model.propose([request("b", [3] * (LONGEST + 1))], [5]) == [None]
    assert model.propose([request("c", [3])], [0]) == [None]


@pytest.mark.parametrize("others", [0, 1])
def test_a_shorter_draft_after_a_longer_one_that_was_refused(llama: Decoder, others: int) -> None:
    """The longer one took blocks beyond a power of two of them, which the shorter does not need."""
    model = draft_model(llama, longest=160)
    rng = random.Random(others)
    asked = [request("a", random_tokens(rng, 16 * 8 - 2))]
    asked += [request(f"b{i}", random_tokens(rng, 20)) for i in range(others)]
    for limit in (5, 1, 2, 3):
        drafts = model.propose(asked, [limit] * len(asked))
        for each, draft in zip(asked, drafts, strict=True):
            assert draft is not None
            assert len(draft) == limit
            check_chain(llama, each.token_ids, draft)
            each.token_ids.append((draft.token_ids[0] + 1) % VOCABULARY)
    model.check_integrity()


def test_draws_follow_the_request_s_own_parameters(llama: Decoder) -> None:
    """With penalties and filters, beside a greedy and a seeded request; all against formulas."""
    chance = SamplingParams(temperature=0.7, top_k=20, top_p=0.95, frequency_penalty=0.9)
    model = draft_model(llama, seed=3)
    prompt = random_tokens(random.Random(4), 30)
    drawn = request("drawn", prompt, chance)
    greedy = request("greedy", prompt[::-1])
    seeded = request("seeded", prompt, SamplingParams(temperature=0.7, seed=5))
    drawn.token_ids += [7, 7]
    drafts = model.propose([drawn, greedy, seeded], [4, 2, 3])
    assert drafts[0] is not None
    assert drafts[1] is not None
    assert drafts[2] is not None
    assert drafts[1].probabilities is None
    assert drafts[2].probabilities is None
    check_chain(llama, greedy.token_ids, drafts[1])
    check_chain(llama, seeded.token_ids, drafts[2])
    q = drafts[0].probabilities
    assert q is not None
    assert q.shape == (4, VOCABULARY)
    tokens = list(drawn.token_ids)
    seed = stream_seed(request_seed(None, 3, "drawn"), DRAFTING)
    share = 1.0
    assert drafts[0].chances is not None
    for row, token, told in zip(q, drafts[0].token_ids, drafts[0].chances, strict=True):
        logits = said(llama, tokens)
        for other in set(tokens[30:]):
            logits[other] -= 0.9 * tokens[30:].count(other)
        one = sampling.DrawParameters([0.7], [20], [0.95], [0.0], [uniform(seed, len(tokens))])
        expected = sampling.probabilities(logits[None], one)[0]
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-5)
        assert token == int(sampling.draw(logits[None], one))
        share *= (1.0 + float(expected[token])) / 2.0
        assert told == pytest.approx(share, rel=1e-2)
        tokens.append(token)


def test_end_tokens_are_not_drafted_before_min_tokens(tmp_path: Path) -> None:
    tiny = make_tiny("llama", tmp_path / "ends")
    decoder = tiny.decoder()
    prompt = list(range(20))
    end = int(said(decoder, prompt).argmax())
    config = EngineConfig(device="cpu", block_size=8)
    model = DraftModel(decoder, config, LONGEST, 50, eos_token_ids=(end,))
    (free,) = model.propose([request("a", prompt)], [1])
    bound = request("b", prompt, SamplingParams(temperature=0.0, min_tokens=2))
    (draft,) = model.propose([bound], [4])
    assert free is not None
    assert draft is not None
    assert free.token_ids == [end]
    assert end not in draft.token_ids[:2]
    second = int(said(decoder, prompt).topk(2).indices[1])
    assert draft.token_ids[0] == second


def test_chains_end_where_their_chance_falls_below_the_floor(llama: Decoder) -> None:
    model = draft_model(llama)
    assert isinstance(model, ChainProposer)
    model.floor = 0.05
    rng = random.Random(6)
    requests = [request(str(i), random_tokens(rng, 20)) for i in range(6)]
    limits = [8, 2, 8, 8, 1, 8]
    drafts = model.propose(requests, limits)
    lengths = set()
    for each, limit, draft in zip(requests, limits, drafts, strict=True):
        assert draft is not None
        assert draft.chances is not None
        check_chain(llama, each.token_ids, draft)
        assert all(chance >= 0.05 for chance in draft.chances[:-1])
        assert len(draft) == limit or draft.chances[-1] < 0.05
        lengths.add(len(draft))
        each.token_ids += [*draft.token_ids, 3]
    assert len(lengths) > 2
    for each, draft in zip(requests, model.propose(requests, limits), strict=True):
        assert draft is not None
        check_chain(llama, each.token_ids, draft)


def test_live_knobs(llama: Decoder) -> None:
    model = draft_model(llama, seed=1)
    params = SamplingParams(temperature=1.0)
    prompt = list(range(30))

    def drafted() -> list[int]:
        each = request("a", prompt, params)
        (draft,) = model.propose([each], [6])
        model.forget(each)
        assert draft is not None
        return list(draft.token_ids)

    first = drafted()
    assert drafted() == first
    knobs = {"device": "cpu", "block_size": 8, "seed": 2, "enable_prefix_caching": False}
    model.apply_live(EngineConfig.from_mapping(knobs))
    assert drafted() != first
    assert model.pool.num_cached == 0


def test_steps_that_are_queued_draft_what_steps_in_turn_do(llama: Decoder) -> None:
    """As on a GPU, whose tokens are not waited for before the next step is made of them."""
    lives = []
    for queued in (False, True):
        model = draft_model(llama, seed=3)
        if queued:
            model._steps._waits = False
            model._steps._recordings = None
        rng = random.Random(8)
        params = [GREEDY, SamplingParams(temperature=0.9, top_k=30), GREEDY]
        requests = [request(str(i), random_tokens(rng, 20 + i), p) for i, p in enumerate(params)]
        life = []
        for turn in range(6):
            drafts = model.propose(requests, [4, 1 + turn % 4, 2])
            for each, draft in zip(requests, drafts, strict=True):
                assert draft is not None
                life.append((list(draft.token_ids), draft.chances))
                each.token_ids += [*draft.token_ids[: turn % 4], rng.randrange(VOCABULARY)]
        lives.append(life)
    assert lives[0] == lives[1]


def test_a_model_in_bf16_whose_steps_are_replayed(tmp_path: Path) -> None:
    """Wide enough for the native kernels; a draft is the same however often its shape came."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    tiny = make_tiny("llama", tmp_path / "wide", dtype=torch.bfloat16, **sizes)
    decoder = tiny.decoder(torch.bfloat16)
    rng = random.Random(3)
    prompts = [random_tokens(rng, 18) for _ in range(12)]

    def drafted(model: DraftModel, number: int) -> list[list[int]]:
        asked = [request(f"{i}", prompts[number + i]) for i in range(1 + number % 3)]
        drafts = model.propose(asked, [4] * len(asked))
        for each in asked:
            model.forget(each)
        return [list(draft.token_ids) for draft in drafts if draft is not None]

    model = draft_model(decoder, enable_prefix_caching=False)
    again = [[drafted(model, number) for number in range(9)] for _ in range(2)]
    assert again[0] == again[1]
    for number in range(9):
        fresh = draft_model(decoder, enable_prefix_caching=False)
        fresh._steps._recordings = None
        assert drafted(fresh, number) == again[0][number]


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantized_cache(models: dict[str, TinyModel], dtype: str) -> None:
    decoder = models["qwen3"].decoder()
    config = EngineConfig(device="cpu", block_size=8, kv_cache_dtype=dtype)
    model = DraftModel(decoder, config, LONGEST, 50)
    each = request("a", random_tokens(random.Random(1), 40))
    (draft,) = model.propose([each], [3])
    assert draft is not None
    logits = said(decoder, each.token_ids)
    best = logits.topk(8).indices.tolist()
    assert draft.token_ids[0] in best
