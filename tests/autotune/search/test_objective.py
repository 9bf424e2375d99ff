"""What each objective makes of the metrics of real records."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.errors import BadInput
from autotune.metrics import compute_metrics
from autotune.records import RequestRecord
from autotune.search.objective import Objective
from autotune.slo import parse_slo
from engine.config import EngineConfig

SLO = parse_slo("ttft<200ms,tpot<100ms")


def request(number: int, ttft: float, tokens: int, outcome: Any = "finished") -> RequestRecord:
    times = tuple(number + ttft + 0.05 * i for i in range(tokens))
    return RequestRecord(str(number), number, number, times, 8, tokens, tokens, outcome)


def metrics(records: list[RequestRecord]) -> dict[str, Any]:
    return compute_metrics(
        records,
        SLO,
        duration=10.0,
        config=EngineConfig(model="m"),
        load_delivered=True,
        load_note=None,
    )


def test_cost_is_per_token_of_the_requests_within_every_limit() -> None:
    # 30 good tokens in 10 s; 100 late ones and 7 of a request that was cut off do not count.
    records = [request(0, 0.1, 30), request(1, 0.5, 100), request(2, 0.1, 7, "timed_out")]
    value = Objective("cost", price=3.6).value(metrics(records), SLO)
    assert value == pytest.approx(3.6 / (3.0 * 3600) * 1e6)


def test_cost_of_nothing_good_is_unmeasured() -> None:
    assert Objective("cost", price=1.0).value(metrics([request(0, 0.9, 5)]), SLO) is None


def test_latency_is_the_tightest_ratio() -> None:
    value = Objective("latency").value(metrics([request(0, 0.1, 5), request(1, 0.1, 5)]), SLO)
    assert value == pytest.approx(0.5)  # both ttft 100 of 200 ms and tpot 50 of 100 ms


def test_latency_of_single_tokens_rests_on_the_other_limits() -> None:
    value = Objective("latency").value(metrics([request(0, 0.1, 1), request(1, 0.1, 1)]), SLO)
    assert value == pytest.approx(0.5)


def test_latency_with_unfinished_requests_is_unmeasured() -> None:
    records = [request(0, 0.1, 5), request(1, 0.1, 2, "timed_out")]
    assert Objective("latency").value(metrics(records), SLO) is None


def test_cost_needs_a_price() -> None:
    with pytest.raises(BadInput, match="--price"):
        Objective("cost")
