"""What is hoped of drafts that were never run beside how many sequences there are now."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.request import Request, SamplingParams
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


def dearest(hope: float) -> float:
    """The longest that a drafted step may take, drafting included, for drafts to be made."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if drafts(middle, hope) else (low, middle)
    return PLAIN + 1e-3 + low


@pytest.mark.parametrize("hope", [0.02, 0.05, 0.1])
def test_steps_may_seem_so_much_dearer_and_be_tried(hope: float) -> None:
    assert dearest(0.0) > PLAIN + 1e-3
    assert dearest(hope) == pytest.approx((1.0 + hope) * dearest(0.0), rel=1e-3)
