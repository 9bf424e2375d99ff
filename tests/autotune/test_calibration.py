from __future__ import annotations

import pytest

from autotune.calibration import offered_rate, sustained_rate
from autotune.records import RequestRecord
from autotune.traffic_options import TrafficOptions


def request(number: int, got: int, asked: int) -> RequestRecord:
    times = tuple(0.1 * (i + 1) for i in range(got))
    outcome = "finished" if got == asked else "timed_out"
    return RequestRecord(str(number), 0.0, 0.0, times, 8, got, asked, outcome)  # type: ignore[arg-type]


def test_requests_that_were_cut_off_count_by_what_was_done_of_them() -> None:
    records = [request(0, 10, 10), request(1, 5, 10), request(2, 0, 10), request(3, 9, 12)]
    assert sustained_rate(records, 2.0) == pytest.approx((1 + 0.5 + 0 + 0.75) / 2)


def test_nothing_worked_off_is_no_rate() -> None:
    assert sustained_rate([request(0, 0, 4)], 5.0) == 0.0
    assert sustained_rate([], 0.0) == 0.0


def test_offered_rate_is_the_wanted_share() -> None:
    rate, note = offered_rate(TrafficOptions(load_factor=0.5), 8.0)
    assert rate == 4.0
    assert "4 requests/s" in note
