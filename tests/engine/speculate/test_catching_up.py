"""Drafting for requests that a draft model has yet to compute."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.config import EngineConfig
from engine.request import FinishReason, Request, SamplingParams
from engine.speculate.draft_lengths import DraftLengths
from engine.speculate.output_lengths import OutputLengths

CONFIG = EngineConfig(
    speculative_method="draft_model", speculative_model="draft", max_num_batched_tokens=500
)
STEP = 0.01


class Costs:
    """Steps of one length, cheap drafts, and a millisecond for each token to be caught up with."""

    def verify_seconds(self, num_sequences: int, num_tokens: int) -> float:
        return STEP

    def draft_seconds(self, num_sequences: int, num_drafted: int) -> float:
        return 1e-4

    def catch_up_seconds(self, num_tokens: int) -> float:
        return 1e-3 * num_tokens


def decoding(name: str, prompt: int, left: int) -> Request:
    request = Request(name, [1] * prompt, SamplingParams(temperature=0.0), 0.0)
    request.max_total_tokens = prompt + left
    request.num_computed_tokens = prompt - 1
    return request


def lengths_of(lacking: dict[str, int]) -> DraftLengths:
    def of(requests: Sequence[Request]) -> list[int]:
        return [lacking.get(request.request_id, 0) for request in requests]

    return DraftLengths(Costs(), costs_device=True, lacking=of)


@pytest.mark.parametrize(("left", "worth"), [(10, False), (2000, True)])
def test_catching_up_pays_where_enough_is_to_come(left: int, worth: bool) -> None:
    # A step of one token takes 10 ms. Whatever drafts save of that, ten tokens do not make up for
    # 300 ms, and 2000 do if they save anything to speak of.
    lengths = lengths_of({"new": 300})
    (limit,) = lengths.limits([decoding("new", 301, left)], CONFIG)
    assert bool(limit) is worth


def test_those_who_are_not_behind_are_drafted_for_meanwhile() -> None:
    lengths = lengths_of({"new": 300})
    requests = [decoding("new", 301, 10), decoding("known", 301, 10)]
    new, known = lengths.limits(requests, CONFIG)
    assert new == 0
    assert known > 0


def test_nobody_is_caught_up_with_while_the_load_grows() -> None:
    lacking = {str(i): 20 for i in range(12)}
    lengths = lengths_of(lacking)
    requests = [decoding(name, 21, 4000) for name in lacking]
    assert all(lengths.limits(requests[:4], CONFIG))
    for name in "0123":
        lacking[name] = 0
    grown = lengths.limits(requests[:8], CONFIG)
    assert all(grown[:4])
    assert not any(grown[4:])
    assert not any(lengths.limits(requests, CONFIG)[4:])
    assert any(lengths.limits(requests, CONFIG)[4:])  # as many as before


def test_a_step_s_worth_is_caught_up_with_at_a_time() -> None:
    lacking = {str(i): 300 for i in range(6)}
    requests = [decoding(name, 301, 4000) for name in lacking]
    asked = [bool(limit) for limit in lengths_of(lacking).limits(requests, CONFIG)]
    assert asked == [True, True, False, False, False, False]


def test_what_a_request_will_yet_get_is_learned() -> None:
    lengths = OutputLengths()
    request = decoding("a", 100, 1000)
    assert lengths.expected(request) == 1000
    done = decoding("b", 50, 1000)
    done.token_ids += [2] * 40
    lengths.note(done)  # it was aborted
    assert lengths.expected(request) == 1000
    done.finish_reason = FinishReason.STOP
    lengths.note(done)
    assert lengths.expected(request) == 40
    request.token_ids += [2] * 30
    assert lengths.expected(request) == 10
    request.token_ids += [2] * 30
    assert lengths.expected(request) == 40
    request.max_total_tokens = len(request.token_ids) + 3
    assert lengths.expected(request) == 3
