import pytest

from engine.config import EngineConfig
from engine.engine import CacheShape, Engine
from engine.request import FinishReason, TokenLogprobs
from tests.engine.fake_detokenizer import FakeDetokenizer, as_text
from tests.engine.fake_executor import (
    FakeExecutor,
    FakeSpeculator,
    VirtualClock,
    assert_idle,
    expected_output,
    greedy,
    make_engine,
    run,
    text_of,
    tokens_of,
)


def text_engine(**knobs: object) -> tuple[Engine, FakeDetokenizer]:
    config = EngineConfig.from_mapping({"block_size": 8, **knobs})
    clock = VirtualClock()
    executor = FakeExecutor(64, 8, clock)
    detokenizer = FakeDetokenizer()
    engine = Engine(
        config,
        executor,
        CacheShape(64, 256),
        clock=clock,
        detokenizer=detokenizer,
    )
    return engine, detokenizer


def test_text_is_complete_whatever_the_reason() -> None:
    engine, detokenizer = text_engine()
    engine.add("a", [1], greedy(9))
    assert text_of(run(engine)["a"]) == as_text(expected_output([1], 9))
    assert (detokenizer.open, detokenizer.finished) == ({}, 1)


@pytest.mark.parametrize("drafted", [0, 3])
@pytest.mark.parametrize("min_tokens", [0, 6])
def test_a_stop_text_ends_the_output_before_it(drafted: int, min_tokens: int) -> None:
    output = expected_output([1], 12)
    stop = as_text(output)[7:11]  # begins in the fourth token and ends in the sixth
    assert as_text(output).find(stop) == 7
    engine, detokenizer = text_engine()
    assert isinstance(engine.executor, FakeExecutor)
    engine.executor.speculator = FakeSpeculator(drafted) if drafted else None
    request = engine.add("a", [1], greedy(12, stop=[stop], min_tokens=min_tokens))
    outputs = run(engine)["a"]
    assert text_of(outputs) == as_text(output)[:7]
    assert tokens_of(outputs) == request.output_token_ids == output[:6]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert detokenizer.open == {}
    assert_idle(engine)


def test_a_stop_text_does_not_count_before_min_tokens() -> None:
    output = expected_output([1], 12)
    stop = as_text(output)[7:11]
    engine, _ = text_engine()
    engine.add("a", [1], greedy(12, stop=[stop], min_tokens=7))
    assert tokens_of(run(engine)["a"]) == output


def test_a_stop_text_wins_over_the_length_limit_at_the_same_token() -> None:
    output = expected_output([1], 6)
    engine, _ = text_engine()
    request = engine.add("a", [1], greedy(6, stop=[as_text(output)[7:11]]))
    run(engine)
    assert request.finish_reason is FinishReason.STOP


def test_the_stop_token_is_an_output_token_but_no_text() -> None:
    output = expected_output([1], 12)
    engine, _ = text_engine()
    last = output[3]
    assert last not in output[:3]
    engine.add("a", [1], greedy(12, stop_token_ids=[last]))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == output[:4]
    assert text_of(outputs) == as_text(output[:3])


def test_aborting_hands_out_the_text_held_back() -> None:
    engine, detokenizer = text_engine()
    engine.add("a", [1], greedy(50, stop=["zzzzzzz"]))
    outputs = [*engine.step(), *engine.step()]
    engine.abort("a")
    outputs += engine.step()
    assert text_of(outputs) == as_text(expected_output([1], 2))
    assert detokenizer.open == {}


def test_stop_texts_without_a_tokenizer_are_refused() -> None:
    engine, _ = make_engine()
    engine.add("a", [1], greedy(5, stop=["x"]))
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.REFUSED
    assert output.refusal == "stop texts need a tokenizer, and this engine has none"
    assert_idle(engine)


def test_logprobs_stand_beside_the_tokens_kept() -> None:
    class WithLogprobs(FakeExecutor):
        def execute(self, batch):  # type: ignore[no-untyped-def]
            result = super().execute(batch)
            result.logprobs = [[TokenLogprobs(t, -1.0, {}) for t in ts] for ts in result.tokens]
            return result

    config = EngineConfig(block_size=8)
    executor = WithLogprobs(64, 8)
    executor.speculator = FakeSpeculator(3)
    engine = Engine(config, executor, CacheShape(64, 256))
    engine.add("a", [1], greedy(6, logprobs=0))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    for output in outputs:
        assert output.logprobs is not None
        assert [p.token_id for p in output.logprobs] == output.token_ids
    assert tokens_of(outputs) == expected_output([1], 6)
