"""Diagnosis of profiles that lack numbers: what is left is judged, and the rest is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.finding import METRICS
from autotune.profiling.schema import KvCache, Profile, Queueing, Traffic
from tests.autotune.diagnose.profiles import (
    BASE,
    WAITING,
    altered,
    breakdowns,
    first,
    kv,
    named,
    phase,
    profile,
    queueing,
)


def test_without_breakdowns_the_wait_share_tells_ttft_and_the_rest_is_unjudged() -> None:
    seen = profile(
        breakdowns=[],
        queueing=queueing(wait_share=0.9, utilisation=1.2, stable=False),
        partial=["other news", "the breakdown of time per output token needs 20; has 3"],
    )
    diagnosis = diagnose(seen)
    assert first(diagnosis, "ttft").bottleneck == "queue_saturation"
    assert not diagnosis.of("tpot")
    short = seen.model_copy(update={"phases": [phase("prefill", intensity=20.0)]})
    assert named(short, "ttft") == ["queue_saturation", "prefill_bandwidth"]
    assert named(seen, "ttft") == ["queue_saturation", "prefill_compute"]
    assert any(text.startswith("tpot:") and "has 3" in text for text in diagnosis.unjudged)


def test_a_queue_before_a_full_cache_of_a_watched_server_waits_for_blocks() -> None:
    watched: dict[str, Any] = {
        "breakdowns": WAITING[:1],
        "queueing": queueing(queue_mean=5.0, utilisation=1.2, stable=False),
        "kv": kv(blocked_share=None, preempted_share=None, occupancy_mean=0.95, occupancy_peak=1.0),
    }
    assert named(profile(**watched), "ttft")[0] == "kv_capacity"
    assert named(profile(**watched), "memory") == ["kv_capacity"]
    half = altered(watched["kv"], occupancy_mean=0.4, occupancy_peak=0.5, preemptions=30)
    assert named(profile(**watched | {"kv": half}), "ttft")[0] == "queue_saturation"
    assert first(diagnose(profile(**watched | {"kv": half})), "memory").share == 0.5


def test_without_a_fitted_cost_decodes_are_split_by_the_bytes_they_read() -> None:
    unexplained = breakdowns(tpot={"other": 0.8, "host": 0.2})
    found = {f.bottleneck: f.share for f in diagnose(profile(breakdowns=unexplained)).of("tpot")}
    assert found["decode_weights"] == pytest.approx(0.6)
    assert found["decode_kv"] == pytest.approx(0.2)
    dense = profile(breakdowns=unexplained, phases=[phase("decode", intensity=500.0)])
    assert named(dense, "tpot")[0] == "decode_compute"


def test_a_profile_of_nothing_has_no_findings_and_says_what_is_not_known() -> None:
    nothing = Profile(
        created_at=BASE.created_at,
        source=BASE.source,
        traffic=Traffic.none(),
    )
    diagnosis = diagnose(nothing)
    assert not diagnosis.findings
    assert {text.split(":")[0] for text in diagnosis.unjudged} == set(METRICS)


OPTIONAL = (
    ("kv", tuple(KvCache.model_fields)),
    ("queueing", tuple(Queueing.model_fields)),
    ("traffic", ("rate", "input_tokens", "output_tokens", "arrival_cv", "dispersion")),
)


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part, fields in OPTIONAL for field in fields]
)
def test_any_number_may_be_missing(part: str, field: str) -> None:
    full = profile(
        breakdowns=WAITING,
        kv=kv(blocked_share=0.2, preemptions=3, refused_for_size=1, attainable_hit_rate=0.5),
        queueing=queueing(at_seat_limit_share=0.3, barrier_share=0.2, queue_mean=9.0),
        engine_config={"max_num_seqs": 4},
    )
    without = full.model_copy(update={part: altered(getattr(full, part), **{field: None})})
    json.dumps(diagnose(without).to_json(), allow_nan=False)


@pytest.mark.parametrize("field", ["model", "ceilings", "hardware", "engine_config", "host"])
def test_any_part_may_be_missing(field: str) -> None:
    found = diagnose(BASE.model_copy(update={field: None}))
    assert first(found, "ttft").bottleneck == "prefill_compute"
    assert first(found, "tpot").bottleneck == "decode_weights"
