"""/v1/completions on a real engine: what comes back is what the engine generates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine import LLM, SamplingParams
from tests.engine.server.tiny_served import NAME, Served

PATH = "/v1/completions"
PROMPT = "The quick brown fox"


@pytest.fixture(autouse=True)
def _leaves_nothing(tiny: Served) -> Iterator[None]:
    yield
    tiny.assert_idle()


@pytest.fixture(scope="module")
def llm(tiny_folder: Any) -> LLM:
    return LLM(str(tiny_folder), kv_cache_memory_bytes=4 << 20, num_threads=1)


def offline(llm: LLM, prompt: str | list[int], **params: Any) -> Any:
    return llm.generate(prompt, SamplingParams(**params))[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0, "max_tokens": 12},
        {"temperature": 0.9, "seed": 5, "max_tokens": 30, "top_p": 0.8, "top_k": 40},
        {"temperature": 0.7, "seed": 6, "max_tokens": 30, "min_p": 0.05, "ignore_eos": True},
        {"temperature": 0.0, "max_tokens": 20, "repetition_penalty": 1.3, "min_tokens": 18},
        {"temperature": 0.0, "max_tokens": 20, "presence_penalty": 1, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "nucleus", "min_p", "repetition", "presence"],
)
def test_outputs_are_the_engines(
    tiny: Served, llm: LLM, params: dict[str, Any], stream: bool
) -> None:
    expected = offline(llm, PROMPT, **params)
    completion = expected.outputs[0]
    if stream:
        options = {"include_usage": True}
        chunks = tiny.events(PATH, prompt=PROMPT, stream_options=options, **params)
        *parts, last = chunks
        text = "".join(c["choices"][0]["text"] for c in parts)
        reasons = [c["choices"][0]["finish_reason"] for c in parts]
        assert reasons[:-1] == [None] * (len(parts) - 1)
        assert all(c["usage"] is None for c in parts)
        assert last["choices"] == []
        assert len({c["id"] for c in chunks}) == 1
        reason, usage, answer = reasons[-1], last["usage"], last
    else:
        answer = tiny.post(PATH, prompt=PROMPT, **params).json()
        (choice,) = answer["choices"]
        text, reason, usage = choice["text"], choice["finish_reason"], answer["usage"]
        assert choice["index"] == 0
        assert choice["logprobs"] is None
    assert (text, reason) == (completion.text, completion.finish_reason)
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
    assert usage["completion_tokens"] == len(completion.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    assert answer["id"].startswith("cmpl-")


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_outputs_keep_their_order(tiny: Served, llm: LLM, stream: bool) -> None:
    prompts = ["The", "fox jumps", "lazy"]
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 10}
    wanted = []
    for prompt in prompts:
        for i in range(3):
            wanted.append(offline(llm, prompt, seed=40 + i, **params).outputs[0].text)
    body = {"prompt": prompts, "n": 3, "seed": 40, **params}
    if stream:
        texts = [""] * 9
        for chunk in tiny.events(PATH, **body):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
    else:
        answer = tiny.post(PATH, **body).json()
        assert [c["index"] for c in answer["choices"]] == list(range(9))
        texts = [c["text"] for c in answer["choices"]]
        assert answer["usage"]["prompt_tokens"] == sum(
            len(llm.generate(p, SamplingParams(max_tokens=1))[0].prompt_token_ids) for p in prompts
        )
    assert texts == wanted
    assert len(set(texts)) > 3


def test_prompts_of_token_ids(tiny: Served, llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}
    expected = offline(llm, PROMPT, **params).outputs[0].text
    one = tiny.post(PATH, prompt=ids, **params).json()
    assert [c["text"] for c in one["choices"]] == [expected]
    two = tiny.post(PATH, prompt=[ids, ids], **params).json()
    assert [c["text"] for c in two["choices"]] == [expected, expected]
    kept = tiny.post(PATH, prompt=[7] * 50 + ids, truncate_prompt_tokens=len(ids), **params).json()
    assert kept["choices"][0]["text"] == expected
    assert kept["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_outputs_before_them(tiny: Served, llm: LLM, stream: bool) -> None:
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
    whole = offline(llm, PROMPT, **params).outputs[0].text
    stop = whole[6:9]
    body = {"prompt": PROMPT, "stop": [stop, "never to be seen"], **params}
    if stream:
        choices = [c["choices"][0] for c in tiny.events(PATH, **body)]
        text, reason = "".join(c["text"] for c in choices), choices[-1]["finish_reason"]
    else:
        choice = tiny.post(PATH, **body).json()["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_stop_tokens_end_outputs(tiny: Served, llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
    ids = offline(llm, PROMPT, **params).outputs[0].token_ids
    body = {"prompt": PROMPT, "stop_token_ids": [ids[5]], "return_token_ids": True, **params}
    choice = tiny.post(PATH, **body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == ids[: ids.index(ids[5]) + 1]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_token_ids(tiny: Served, llm: LLM, stream: bool, as_ids: bool) -> None:
    expected = offline(llm, PROMPT, temperature=0.0, max_tokens=5)
    prompt = expected.prompt_token_ids if as_ids else PROMPT
    body = {"echo": True, "temperature": 0, "max_tokens": 5, "return_token_ids": True}
    body["prompt"] = [prompt, prompt]
    texts: list[str] = ["", ""]
    tokens: list[list[int]] = [[], []]
    prompts: list[list[int] | None] = [None, None]
    if stream:
        choices = [chunk["choices"][0] for chunk in tiny.events(PATH, **body)]
    else:
        choices = tiny.post(PATH, **body).json()["choices"]
    for choice in choices:
        i = choice["index"]
        texts[i] += choice["text"]
        tokens[i] += choice["token_ids"]
        if "prompt_token_ids" in choice:
            assert prompts[i] is None
            prompts[i] = choice["prompt_token_ids"]
    completion = expected.outputs[0]
    assert texts == [PROMPT + completion.text] * 2
    assert tokens == [completion.token_ids] * 2
    assert prompts == [expected.prompt_token_ids] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_nothing_more(tiny: Served, stream: bool) -> None:
    body = {"prompt": ["a", "b c"], "echo": True, "max_tokens": 0}
    if stream:
        choices = [c["choices"][0] for c in tiny.events(PATH, **body)]
    else:
        answer = tiny.post(PATH, **body).json()
        choices = answer["choices"]
        assert answer["usage"]["completion_tokens"] == 0
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (0, "a", "length"),
        (1, "b c", "length"),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(tiny: Served, llm: LLM, stream: bool) -> None:
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
    completion = offline(llm, PROMPT, logprobs=3, **params).outputs[0]
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    found: dict[str, list[Any]] = {key: [] for key in keys}
    body = {"prompt": PROMPT, "logprobs": 3, **params}
    if stream:
        parts = [c["choices"][0]["logprobs"] for c in tiny.events(PATH, **body)]
    else:
        parts = [tiny.post(PATH, **body).json()["choices"][0]["logprobs"]]
    for part in parts:
        for key in keys:
            found[key] += part[key]
    assert len(found["tokens"]) == 8
    wanted = [at.logprob for at in completion.logprobs]
    assert found["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == pytest.approx(logprob)
        assert max(top.values()) == pytest.approx(logprob)  # greedy
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:i]) for i in range(8)]


def test_usage_in_every_chunk(tiny: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = tiny.events(
        PATH,
        prompt=PROMPT,
        max_tokens=6,
        ignore_eos=True,
        stream_options=options,
        return_token_ids=True,
    )
    so_far = 0
    for chunk in chunks:
        so_far += len(chunk["choices"][0]["token_ids"])
        assert chunk["usage"]["completion_tokens"] == so_far
    assert last["usage"] == chunks[-1]["usage"]
    assert last["usage"]["completion_tokens"] == 6


def test_usage_is_not_told_unasked(tiny: Served) -> None:
    chunks = tiny.events(PATH, prompt=PROMPT, max_tokens=2)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_usage_tells_prefix_hits(tiny: Served) -> None:
    prompt = [11, 12, 13, 14] * 40
    first = tiny.post(PATH, prompt=prompt, max_tokens=1).json()["usage"]
    again = tiny.post(PATH, prompt=prompt, max_tokens=1).json()["usage"]
    block = tiny.engine.engine.config.block_size
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"] == {"cached_tokens": (len(prompt) - 1) // block * block}


def test_prompts_of_another_salt_share_nothing(tiny: Served) -> None:
    prompt = [21, 22, 23, 24] * 40
    found = [
        tiny.post(PATH, prompt=prompt, max_tokens=1, cache_salt=salt).json()["usage"]
        for salt in ("a", "b", "a", None)
    ]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in found]
    block = tiny.engine.engine.config.block_size
    assert cached == [0, 0, (len(prompt) - 1) // block * block, 0]


def test_the_answers_id_has_the_clients(tiny: Served) -> None:
    given = {"x-request-id": 'mine "1"'}
    body = {"prompt": "a", "max_tokens": 1}
    answer = tiny.request("POST", PATH, json=body, headers=given).json()
    assert answer["id"] == 'cmpl-mine "1"'
    ids = {tiny.post(PATH, **body).json()["id"] for _ in range(3)}
    assert len(ids) == 3


def test_null_max_tokens_goes_to_the_models_limit(tiny: Served) -> None:
    answer = tiny.post(PATH, prompt=[5] * 480, max_tokens=None, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"
