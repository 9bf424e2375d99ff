"""Rounds of another engine as one."""

from __future__ import annotations

from autotune.search.pooled_figures import pooled_engine, pooled_speculation
from autotune.speculation_counts import SpeculationTotals


def drafted(decodes: int, by_depth: list[int], accepted: list[int]) -> dict[str, object]:
    totals = SpeculationTotals(decodes, sum(by_depth), sum(accepted), by_depth, accepted)
    return {**totals.to_metrics(), "loads": []}


def test_counts_are_added_peaks_are_the_highest_and_shares_are_means() -> None:
    rounds = [
        {"steps": 10, "preemptions": 1, "kv_peak_usage": 0.5, "mean_batch": 2.0, "host_share": 0.1},
        {"steps": 30, "preemptions": 0, "kv_peak_usage": 0.2, "mean_batch": 4.0, "host_share": 0.3},
    ]
    assert pooled_engine(rounds) == {
        "steps": 40,
        "preemptions": 1,
        "kv_peak_usage": 0.5,
        "mean_batch": 3.0,
        "host_share": 0.2,
    }


def test_what_one_round_does_not_tell_is_not_told_of_all() -> None:
    assert pooled_engine([{"steps": 10}, {"steps": None}]) == {"steps": None}


def test_drafts_are_added_by_position() -> None:
    together = pooled_speculation(
        [drafted(100, [80, 60], [40, 20]), None, drafted(50, [20, 10, 5], [10, 5, 1])]
    )
    assert together == drafted(150, [100, 70, 5], [50, 25, 1])


def test_without_drafts_nothing_is_told_of_them() -> None:
    assert pooled_speculation([None, None]) is None
