"""What is hoped of drafts that were never run beside how many sequences there are now."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.speculate.draft import Draft
from engine.speculate.draft_lengths import DraftLengths

CONFIG = EngineConfig(
    speculative_method="draft_model", speculative_model="draft", num_speculative_tokens=1
)
PLAIN = 0.01


class Costs:
    """A step takes 10 ms, with a drafted token so much more; drafting takes a millisecond."""

    def __init__(self, more: float, hope: float) -> None:
        self._more = more
        self._hope = hope

    def verify_seconds(self, num_sequences: int, num_tokens: int) -> float:
        return PLAIN + self._more * (num_tokens > num_sequences)

    def draft_seconds(self, num_sequences: int, num_drafted: int) -> float:
        return 1e-3

    def catch_up_seconds(self, num_tokens: int) -> float:
        return 0.0

    def uncertainty(self, num_sequences: int) -> float:
        return 0.0

    def hope(self, num_sequences: int) -> float:
        return self._hope


def drafts(more: float, hope: float) -> bool:
    """Whether a new request is drafted for."""
    request = Request("0", [1] * 20, SamplingParams(temperature=0.0), 0.0)
    request.num_computed_tokens = 19
    lengths = DraftLengths(Costs(more, hope), costs_device=True)
    return lengths.limits([request], CONFIG) == [1]


def verifies(more: float, hope: float) -> bool:
    """Whether what was looked up for a new request is verified."""
    request = Request("0", [1] * 20, SamplingParams(temperature=0.0), 0.0)
    lengths = DraftLengths(Costs(more, hope), costs_device=False)
    config = EngineConfig(speculative_method="ngram", num_speculative_tokens=1)
    lengths.limits([request], config)
    return lengths.keep([request], [Draft([1])], config) == [1]


def dearest(pays: Callable[[float, float], bool], hope: float) -> float:
    """The longest that a drafted step may take beyond one without, for drafts to be tried."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if pays(middle, hope) else (low, middle)
    return low


@pytest.mark.parametrize("hope", [0.02, 0.05, 0.1])
@pytest.mark.parametrize(("pays", "drafting"), [(drafts, 1e-3), (verifies, 0.0)])
def test_steps_may_seem_so_much_dearer_and_be_tried(
    pays: Callable[[float, float], bool], drafting: float, hope: float
) -> None:
    base = PLAIN + drafting
    without = base + dearest(pays, 0.0)
    assert without > 1.01 * base
    assert base + dearest(pays, hope) == pytest.approx((1.0 + hope) * without, rel=1e-3)
