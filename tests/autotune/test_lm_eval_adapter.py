"""What the engine answers lm-eval, against transformers; lm-eval itself is not needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autotune import lm_eval_adapter as module
from autotune.embedded import TARGET
from autotune.errors import EnvironmentMissing
from autotune.lm_eval_adapter import EngineAnswers, check_lm_eval, rolling_windows
from engine.config import EngineConfig
from engine.loading import load_model

LONGEST = 48


@pytest.fixture(scope="module")
def answers() -> EngineAnswers:
    config = EngineConfig(
        model=str(TARGET),
        dtype="float32",
        max_model_len=LONGEST,
        kv_cache_memory_bytes=1 << 24,
        max_num_batched_tokens=512,
    )
    return EngineAnswers(load_model(config), config)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)


def scored(reference: PreTrainedModel, ids: list[int], targets: int) -> tuple[float, bool]:
    with torch.inference_mode():
        rows = reference(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[-targets:]
    truth = torch.tensor(ids[-targets:])
    greedy = bool((rows.argmax(-1) == truth).all())
    return float(rows.gather(1, truth[:, None]).sum()), greedy


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("The capital of France is", " Paris, a city"),
        ("A space belongs to what follows. ", "As here"),
        ("def add(a, b):\n    return a", " + b\n"),
    ],
)
def test_continuations(
    answers: EngineAnswers, reference: PreTrainedModel, context: str, continuation: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ahead, whole = (tokenizer(t)["input_ids"] for t in (context.rstrip(), context + continuation))
    expected = scored(reference, whole, len(whole) - len(ahead))
    found = answers.continuation(context, continuation)
    assert found[0] == pytest.approx(expected[0], abs=1e-2)
    assert found[1] == expected[1]


def test_what_greedy_decoding_says_is_greedy(answers: EngineAnswers) -> None:
    context = "The list is sorted"
    (said,) = answers.generate([(context, {"until": ["\n\n"], "max_gen_toks": 6})])
    assert said
    assert answers.continuation(context, said)[1]


def test_generation_ends_before_its_stop(answers: EngineAnswers) -> None:
    context = "The list is sorted"
    asked = [(context, {"max_gen_toks": 8}), (context, {"until": " ", "max_gen_toks": 8})]
    whole, cut = answers.generate(asked)
    assert whole.startswith(cut)
    assert " " not in cut


def test_without_a_context_a_text_begins_with_the_first_token(
    answers: EngineAnswers, reference: PreTrainedModel
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids = tokenizer("Beautiful is better than ugly.", add_special_tokens=False)["input_ids"]
    expected, _ = scored(reference, [tokenizer.bos_token_id, *ids], len(ids))
    assert answers.continuation("", "Beautiful is better than ugly.")[0] == pytest.approx(
        expected, abs=1e-2
    )
    assert answers.text("Beautiful is better than ugly.") == pytest.approx(expected, abs=1e-2)


def test_a_context_that_is_too_long_loses_its_beginning(
    answers: EngineAnswers, reference: PreTrainedModel
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    context, continuation = "Explicit is better than implicit. " * 20 + "Simple", " is better"
    whole = tokenizer(context + continuation)["input_ids"]
    targets = len(whole) - len(tokenizer(context)["input_ids"])
    assert len(whole) > LONGEST + 1
    expected, _ = scored(reference, whole[-(LONGEST + 1) :], targets)
    assert answers.continuation(context, continuation)[0] == pytest.approx(expected, abs=1e-2)


def test_a_long_text_is_scored_in_windows_with_full_context(
    answers: EngineAnswers, reference: PreTrainedModel
) -> None:
    text = "Although never is often better than right now. Namespaces are one great idea. " * 5
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * LONGEST
    expected = sum(
        scored(reference, [*context, *targets], len(targets))[0]
        for context, targets in rolling_windows(ids, tokenizer.bos_token_id, LONGEST)
    )
    assert answers.text(text) == pytest.approx(expected, abs=0.05)


def test_windows_of_the_documented_example() -> None:
    windows = list(rolling_windows(list(range(10)), -1, 4))
    inputs = [(context + targets)[:-1] for context, targets in windows]
    assert inputs == [[-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]]
    assert [targets for _, targets in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@given(st.integers(0, 60), st.integers(1, 17))
def test_every_token_is_a_target_once_with_all_the_context_there_is(
    length: int, longest: int
) -> None:
    windows = list(rolling_windows(list(range(length)), -1, longest))
    assert [t for _, targets in windows for t in targets] == list(range(length))
    for context, targets in windows[1:]:
        assert len(context) + len(targets) - 1 == longest
        assert context[-1] == targets[0] - 1


def test_lm_eval_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentMissing, match="pip install"):
        check_lm_eval()
