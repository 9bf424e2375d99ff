"""Limits on the quality: what breaks them, and what is said where the interval leaves it open."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.quality_guard import (
    breaks_guard,
    broken_limits,
    guard_reason,
    qualities,
    quality_entries,
    uncertain_limits,
)
from autotune.records import TrialRecord
from autotune.slo import parse_slo

SLO = parse_slo("ttft<200ms,quality_loss<1%,kl<0.02,top1_agreement>=98%")
GOOD: dict[str, Any] = {
    "variant": "int8",
    "quality_loss": 0.002,
    "quality_loss_low": -0.001,
    "quality_loss_high": 0.005,
    "kl": 0.001,
    "kl_low": 0.0008,
    "kl_high": 0.0012,
    "top1_agreement": 0.99,
    "top1_agreement_low": 0.985,
    "top1_agreement_high": 0.995,
}


def test_what_meets_all_breaks_nothing() -> None:
    assert broken_limits(SLO, GOOD) == []
    assert guard_reason(SLO, GOOD) == ""
    assert uncertain_limits(SLO, GOOD) == []


@pytest.mark.parametrize(
    ("change", "limit", "told"),
    [
        ({"quality_loss": 0.0101}, "quality_loss<1%", "quality_loss 1.01%"),
        ({"kl": 0.02}, "kl<0.02", "kl 0.02 (95% interval 0.0008 to 0.0012) breaks kl<0.02"),
        ({"top1_agreement": 0.97}, "top1_agreement>=98%", "top1_agreement 97%"),
        ({"kl": None}, "kl<0.02", "kl could not be measured"),
    ],
)
def test_each_limit_is_decided_by_the_measured_value(
    change: dict[str, Any], limit: str, told: str
) -> None:
    broken = broken_limits(SLO, {**GOOD, **change})
    assert [result.limit for result in broken] == [limit]
    assert broken[0].violation > 0
    assert told in guard_reason(SLO, {**GOOD, **change})
    assert breaks_guard(SLO, broken)


def test_a_limit_on_the_latency_is_no_guard() -> None:
    missed = SLO.evaluate({"completed": 0, **quality_entries(GOOD)})
    assert [r.limit for r in missed if not r.met] == ["ttft<200ms"]
    assert not breaks_guard(SLO, missed)


def test_without_a_quality_every_limit_on_it_is_broken() -> None:
    assert len(broken_limits(SLO, None)) == 3
    assert broken_limits(parse_slo("ttft<1s"), None) == []
    assert quality_entries(None) == {}


@pytest.mark.parametrize(("value", "word"), [(0.008, "meets"), (0.012, "breaks")])
def test_an_interval_that_holds_the_limit_is_told_either_way(value: float, word: str) -> None:
    quality = {**GOOD, "quality_loss": value, "quality_loss_high": 0.02}
    (sentence,) = uncertain_limits(SLO, quality)
    assert f"{word} quality_loss<1%" in sentence
    assert "-0.1% to 2%" in sentence
    assert (guard_reason(SLO, quality) == "") == (word == "meets")


def test_qualities_are_told_once_for_each_way_of_quantizing() -> None:
    def trial(number: int, quality: dict[str, Any] | None) -> TrialRecord:
        return TrialRecord(
            number=number,
            kind="search",
            source="sampler",
            config={},
            outcome="ok",
            seconds=1.0,
            started_at="",
            quality=quality,
        )

    bad = {**GOOD, "variant": "int4", "kl": 0.5}
    found = qualities([trial(0, GOOD), trial(1, None), trial(2, bad), trial(3, GOOD)], SLO)
    assert list(found) == ["int8", "int4"]
    assert found["int8"]["feasible"]
    assert found["int8"]["reason"] is None
    assert found["int8"]["trials"] == [0, 3]
    assert not found["int4"]["feasible"]
    assert "breaks kl<0.02" in found["int4"]["reason"]
