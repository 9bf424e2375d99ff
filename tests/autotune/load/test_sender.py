import pytest

from autotune.load.sender import judge_delivery
from autotune.slo import parse_slo


@pytest.mark.parametrize(
    ("rate", "lag", "slo", "delivered"),
    [
        (100.0, 0.0, None, True),
        (100.0, 0.020, None, True),
        (100.0, 0.030, None, False),
        (100.0, 0.030, "ttft<500ms", True),
        (100.0, 0.030, "ttft<200ms,p50(ttft)<100ms", False),
        (1.0, 0.045, None, True),
        (1.0, 0.055, None, False),
        (100.0, -1.0, None, True),
    ],
)
def test_judging_the_delivery(rate: float, lag: float, slo: str | None, delivered: bool) -> None:
    intended = [i / rate for i in range(200)]
    sends = [time_ + lag for time_ in intended]
    got, note = judge_delivery(intended, sends, parse_slo(slo) if slo else None)
    assert got is delivered
    assert (note is None) is delivered
    if note is not None:
        assert f"{lag * 1e3:.0f} ms late" in note


def test_a_single_late_send_of_many_is_forgiven() -> None:
    intended = [i / 100 for i in range(1000)]
    sends = list(intended)
    for index in range(5):
        sends[index] += 3.0
    assert judge_delivery(intended, sends, None) == (True, None)
    for index in range(20):
        sends[index] += 3.0
    assert not judge_delivery(intended, sends, None)[0]
    assert judge_delivery([], [], None) == (True, None)


@pytest.mark.parametrize(
    ("interrupted", "why"),
    [(True, "the load was interrupted"), (False, "the time limit was reached")],
)
def test_a_load_with_unsent_requests_was_not_delivered(interrupted: bool, why: str) -> None:
    intended = [i / 100 for i in range(100)]
    missing = f"40 of 100 requests were not sent: {why}"
    judged = judge_delivery(intended, intended[:60], None, interrupted=interrupted)
    assert judged == (False, missing)
    late = [t + 3.0 for t in intended[:60]]
    delivered, note = judge_delivery(intended, late, None, interrupted=interrupted)
    assert not delivered
    assert note is not None
    assert note.startswith(f"{missing}; the load was not delivered as asked")
    nothing = judge_delivery(intended, [], None, interrupted=interrupted)
    assert nothing == (False, f"100 of 100 requests were not sent: {why}")


def test_lateness_within_a_running_step_changes_nothing() -> None:
    intended = [i / 100 for i in range(100)]
    sends = [t + 0.2 for t in intended]
    assert not judge_delivery(intended, sends, None, step_s=0.1)[0]
    assert judge_delivery(intended, sends, None, step_s=0.5) == (True, None)
