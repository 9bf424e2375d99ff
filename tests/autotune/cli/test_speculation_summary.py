"""What a person is told of drafts."""

from __future__ import annotations

from autotune.cli.speculation_summary import speculation_lines, speculation_sentence
from autotune.profiling.schema import (
    Bounded,
    MeasuredSpeculation,
    Profile,
    Source,
    Speculation,
    SpeculativeLoad,
    Traffic,
)
from autotune.speculation_counts import SpeculationTotals, speculation_metrics
from engine.config import EngineConfig
from tests.autotune.drafted_steps import drafted_load

CONFIG = EngineConfig(model="test", speculative_method="ngram", num_speculative_tokens=7)


def profile(**parts: object) -> Profile:
    given: dict[str, object] = {"created_at": "now", "source": Source(kind="run")}
    return Profile.model_validate({**given, "traffic": Traffic.none(), **parts})


def test_a_sentence_tells_tokens_drafts_and_acceptance_by_position() -> None:
    found = speculation_metrics(drafted_load(500, k=2, chance=0.5, hit=1.0, seed=3), CONFIG)
    assert found is not None
    text = speculation_sentence(found)
    tokens = found["tokens_per_step"]
    assert text.startswith(
        f"{tokens['value']:.3g} ({tokens['low']:.3g} to {tokens['high']:.3g}) tokens a step; "
        "1,000 drafted for 100% of decodes, "
    )
    first = found["positions"][0]["share"]
    assert f"by position {first['value']:.0%} ({first['low']:.0%} to {first['high']:.0%}), " in text
    assert text.count(" to ") == 3


def test_deep_positions_are_left_to_the_json() -> None:
    found = speculation_metrics(drafted_load(100, k=7, hit=1.0), CONFIG)
    assert found is not None
    assert speculation_sentence(found).endswith(", ...")
    assert speculation_sentence(found).count("%") == 2 + 5 * 3


def test_nothing_drafted_is_said_so() -> None:
    assert speculation_sentence(SpeculationTotals().to_metrics()) == "nothing was drafted"


def bounded(value: float) -> Bounded:
    return Bounded(value=value, low=0.9 * value, high=1.1 * value)


def test_a_profile_tells_gains_as_measured_or_else_as_predicted() -> None:
    measured = MeasuredSpeculation(
        method="draft_model",
        num_speculative_tokens=3,
        adaptive=True,
        decodes=100,
        drafted_decodes=80,
        drafted_tokens=240,
        accepted_tokens=120,
        hit_share=0.8,
        tokens_per_step=bounded(2.2),
        verified_tokens=2.4,
        draft_seconds=1.0,
        draft_time_share=0.125,
        loads=[
            SpeculativeLoad(
                sequences=1, num_tokens=3, tokens_per_step=2.2, measured=bounded(1.5), steps=50
            ),
            SpeculativeLoad(
                sequences=3.5, num_tokens=2, tokens_per_step=2, predicted=bounded(1.25), steps=50
            ),
            SpeculativeLoad(sequences=7, num_tokens=1, tokens_per_step=1.5, steps=50),
        ],
    )
    lines = list(speculation_lines(profile(measured_speculation=measured)))
    assert lines[0].startswith("draft_model: 2.2 (1.98 to 2.42) tokens a step")
    assert lines[1] == "drafting takes 12.5% of step time"
    assert lines[2] == (
        "decoding is faster by 1.5x (1.35 to 1.65) with 1 sequence; 1.25x (1.12 to 1.38) "
        "predicted with 3.5 sequences"
    )
    assert len(lines) == 3


def dry_run(*loads: SpeculativeLoad) -> Speculation:
    return Speculation(
        num_requests=30,
        min_ngram=2,
        max_ngram=4,
        tokens_per_step={2: 1.5},
        hit_share=0.5,
        loads=list(loads),
    )


def load(sequences: int, drafted: int, gain: float) -> SpeculativeLoad:
    return SpeculativeLoad(
        sequences=sequences, num_tokens=drafted, tokens_per_step=1.5, predicted=bounded(gain)
    )


def test_a_forecast_tells_from_where_on_no_draft_pays() -> None:
    told = dry_run(load(1, 2, 1.4), load(2, 2, 1.2), load(4, 0, 1.0), load(8, 0, 1.0))
    lines = list(speculation_lines(profile(speculation=told)))
    assert (
        lines[1]
        == "with 1 sequence that would decode 1.4x as fast; from 4 sequences on no draft pays"
    )
    told = dry_run(load(1, 2, 1.4), load(2, 2, 1.2))
    lines = list(speculation_lines(profile(speculation=told)))
    assert lines[1] == "with 1 sequence that would decode 1.4x as fast, with 2 1.2x"
    for nothing in (dry_run(), dry_run(load(1, 0, 1.0))):
        assert len(list(speculation_lines(profile(speculation=nothing)))) == 1
    assert list(speculation_lines(profile())) == []
