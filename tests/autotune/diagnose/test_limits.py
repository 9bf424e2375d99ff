"""Which limit binds, and what that metric is called."""

from __future__ import annotations

import json

import pytest

from autotune.diagnose.diagnose import diagnose
from autotune.diagnose.limits import urgency
from autotune.diagnose.thresholds import MIN_URGENCY
from autotune.slo import SloError
from tests.autotune.diagnose.profiles import breakdowns, metrics, parts, profile, queueing


def test_the_binding_limit_is_the_one_that_is_missed_most() -> None:
    slow = diagnose(profile(slo="ttft<100ms,tpot<5ms", metrics=metrics(ttft=0.12, tpot=0.02)))
    assert slow.binding == "tpot"
    assert slow.binding_limit == "tpot<5ms"
    assert slow.binding_ratio == pytest.approx(4.0)


def test_without_an_slo_the_limits_of_a_run_are_taken() -> None:
    diagnosis = diagnose(profile(metrics=metrics(ttft=0.3)))
    assert (diagnosis.binding, diagnosis.binding_limit) == ("ttft", "ttft<200ms")
    assert diagnosis.binding_ratio == pytest.approx(1.5)


def test_a_throughput_limit_binds_by_what_is_lacking() -> None:
    diagnosis = diagnose(profile(slo="throughput>400tok/s"))
    assert diagnosis.binding == "throughput"
    assert diagnosis.binding_ratio == pytest.approx(4.0)


def test_an_end_to_end_limit_binds_the_metric_with_the_worst_finding() -> None:
    slow = profile(
        slo="e2e<500ms",
        breakdowns=breakdowns(tpot=parts(host=0.9), ttft=parts(prefill_linear=0.9)),
    )
    assert diagnose(slow).binding == "tpot"


@pytest.mark.parametrize(
    ("utilisation", "busy", "pressing"),
    [(0.4, 0.98, 0.4), (None, 0.98, 0.98), (1.3, 1.0, 1.0), (0.01, 0.9, MIN_URGENCY)],
)
def test_throughput_presses_as_arrivals_come_near_to_what_is_sustained(
    utilisation: float | None, busy: float, pressing: float
) -> None:
    seen = profile(queueing=queueing(utilisation=utilisation, busy_share=busy))
    assert urgency("throughput", seen, []) == pressing


def test_nothing_measured_binds_nothing_and_what_was_not_measured_has_no_ratio() -> None:
    assert diagnose(profile(metrics=None)).binding is None
    unmeasured = metrics() | {"slo_statistics": {"p95(ttft)": None}, "timed_out": 100}
    diagnosis = diagnose(profile(metrics=unmeasured))
    assert diagnosis.binding == "ttft"
    assert diagnosis.binding_ratio is None
    json.dumps(diagnosis.to_json(), allow_nan=False)


def test_an_slo_that_is_none_is_refused() -> None:
    with pytest.raises(SloError):
        diagnose(profile(slo="ttft<fast"))
