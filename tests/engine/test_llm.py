"""The offline interface, end to end on a tiny model with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.errors import ConfigError, ModelError
from tests.engine.tiny_llama import TinyLlama, make_tiny_llama
from tests.engine.tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    tokenizer = byte_level()
    tiny = make_tiny_llama(
        tmp_path_factory.mktemp("model"), seed=8, vocab_size=tokenizer.get_vocab_size()
    )
    tokenizer.save(str(tiny.folder / "tokenizer.json"))
    return tiny


@pytest.fixture(scope="module")
def llm(tiny: TinyLlama) -> LLM:
    return tiny.llm()


GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


def test_texts_in_texts_out(llm: LLM) -> None:
    assert llm.tokenizer is not None
    outputs = llm.generate(["The quick", "brown fox 🙂"], GREEDY)
    for prompt, output in zip(["The quick", "brown fox 🙂"], outputs, strict=True):
        completion = output.outputs[0]
        assert output.prompt == prompt
        assert output.prompt_token_ids == llm.tokenizer.encode(prompt)
        assert completion.text == llm.tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == 20
        assert completion.logprobs is None


def test_one_prompt_of_either_kind(llm: LLM) -> None:
    (text,) = llm.generate("The quick", GREEDY)
    (ids,) = llm.generate(text.prompt_token_ids, GREEDY)
    assert ids.outputs[0].token_ids == text.outputs[0].token_ids
    assert ids.prompt is None
    assert llm.generate([]) == []


def test_streamed_text_is_the_whole_text(llm: LLM) -> None:
    whole = llm.generate("brown", GREEDY)[0].outputs[0]
    engine = llm.engine
    assert llm.tokenizer is not None
    engine.add("streamed", llm.tokenizer.encode("brown"), GREEDY)
    text, tokens, reasons = "", [], []
    while engine.has_unfinished:
        for output in engine.step():
            text += output.text
            tokens += output.token_ids
            reasons.append(output.finish_reason)
    assert text == whole.text
    assert tokens == whole.token_ids
    assert reasons[:-1] == [None] * 19
    assert reasons[-1] == "length"


def test_stop_text_ends_the_output_before_it(llm: LLM) -> None:
    whole = llm.generate("fox", GREEDY)[0].outputs[0]
    stop = whole.text[4:7]
    assert whole.text.find(stop) == 4  # this model and prompt give a text that shows something
    out = llm.generate("fox", SamplingParams(temperature=0.0, max_tokens=20, stop=stop))[0]
    completion = out.outputs[0]
    assert completion.text == whole.text[:4]
    assert completion.finish_reason == "stop"
    count = len(completion.token_ids)
    assert completion.token_ids == whole.token_ids[:count]
    assert llm.tokenizer is not None
    assert stop in llm.tokenizer.decode(completion.token_ids)
    assert stop not in llm.tokenizer.decode(completion.token_ids[:-1])


def test_stop_token_ends_the_output_and_is_not_in_the_text(llm: LLM) -> None:
    whole = llm.generate("jumps", GREEDY)[0].outputs[0]
    stop = whole.token_ids[6]
    at = whole.token_ids.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[stop])
    completion = llm.generate("jumps", params)[0].outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole.token_ids[: at + 1]
    assert llm.tokenizer is not None
    assert completion.text == llm.tokenizer.decode(whole.token_ids[:at])


def test_logprobs_stand_beside_tokens(llm: LLM, tiny: TinyLlama) -> None:
    params = SamplingParams(seed=5, temperature=0.8, max_tokens=8, logprobs=3)
    output = llm.generate("lazy dog", params)[0]
    completion = output.outputs[0]
    assert completion.logprobs is not None
    prompt = output.prompt_token_ids
    expected = tiny.logits(prompt + completion.token_ids).double().log_softmax(-1)
    for i, entry in enumerate(completion.logprobs):
        row = expected[len(prompt) - 1 + i]
        assert entry.token_id == completion.token_ids[i]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert list(entry.top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert len(completion.logprobs) == 8


def test_a_seed_does_not_depend_on_what_runs_beside_it(llm: LLM) -> None:
    seeded = SamplingParams(seed=77, temperature=1.3, top_p=0.9, max_tokens=15)
    alone = llm.generate("over the", seeded)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=1.0, max_tokens=n) for n in (3, 9, 14)]
    prompts = ["a", "over the", "quick brown", "over the"]
    together = llm.generate(prompts, [others[0], seeded, *others[1:]])
    assert together[1].outputs[0].token_ids == alone
    assert together[3].outputs[0].token_ids != alone


def test_a_refused_request_leaves_the_others_alone(llm: LLM) -> None:
    outputs = llm.generate([[1, 2], [10**6], [3] * 200, []], GREEDY)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", *["refused"] * 3]
    assert [o.refusal is None for o in outputs] == [True, False, False, False]
    assert "1000000" in str(outputs[1].refusal)
    assert "max_model_len=96" in str(outputs[2].refusal)


def test_params_must_match_prompts(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="2 sampling_params were given for 1 prompts"):
        llm.generate(["x"], [GREEDY, GREEDY])


def test_reconfigure_keeps_the_weights(llm: LLM) -> None:
    before = llm.generate("The lazy", GREEDY)[0].outputs[0].token_ids
    decoder = llm.engine.executor.decoder  # type: ignore[attr-defined]
    llm.reconfigure(block_size=32, max_num_seqs=3, max_num_batched_tokens=7, max_model_len=64)
    assert llm.engine.executor.decoder is decoder  # type: ignore[attr-defined]
    assert llm.config.block_size == 32
    assert llm.engine.max_model_len == 64
    assert llm.generate("The lazy", GREEDY)[0].outputs[0].token_ids == before
    with pytest.raises(ConfigError, match="quantization cannot change in a loaded engine"):
        llm.reconfigure(quantization="int8")
    llm.reconfigure(block_size=16, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=96)


def test_a_failing_step_leaves_the_engine_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(type(llm.engine.executor), "execute", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            llm.generate(["a", "b"], GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.generate("a", GREEDY)[0].outputs[0].finish_reason == "length"


def test_without_a_tokenizer_ids_still_work(tmp_path: Path) -> None:
    bare = make_tiny_llama(tmp_path).llm()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, so prompts must be token ids"):
        bare.generate("text")
    output = bare.generate([[1, 2, 3]], GREEDY)[0].outputs[0]
    assert len(output.token_ids) == 20
    assert output.text == ""
    (refused,) = bare.generate([[1]], SamplingParams(stop="x"))
    assert "tokenizer" in str(refused.refusal)


def test_an_eos_ends_the_output(tmp_path: Path, tiny: TinyLlama, llm: LLM) -> None:
    import json
    import shutil

    whole = llm.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "model"))
    eos = whole[4]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
    ending = TinyLlama(folder, tiny.model).llm()
    completion = ending.generate([[5, 6]], GREEDY)[0].outputs[0]
    assert completion.token_ids == whole[: whole.index(eos) + 1]
    assert completion.finish_reason == "stop"
    on = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    assert ending.generate([[5, 6]], on)[0].outputs[0].token_ids == whole


def test_unknown_knob() -> None:
    with pytest.raises(ConfigError, match="did you mean block_size"):
        LLM("x", block_sizes=3)
