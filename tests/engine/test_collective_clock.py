"""Time in collectives, and waiting for slower ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from engine import collective_clock
from engine.collective_clock import CollectiveClock, CollectiveSeconds
from engine.parallel import ALONE, GroupRanks
from tests.engine.rank_threads import on_ranks


class Clock:
    """A clock that a collective moves on by what it is told to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(collective_clock.time, "perf_counter", lambda: self.now)

    def take(self, seconds: float) -> None:
        self.now += seconds


def test_what_a_collective_takes_beyond_idle_ranks_is_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Clock(monkeypatch)
    clock = CollectiveClock(runs=True)
    # 10 us to start and 1 ns a byte.
    clock.calibrate(lambda floats: fake.take(10e-6 + 4e-9 * floats))
    assert clock.start_cost == pytest.approx(10e-6, rel=1e-6)
    assert clock.byte_cost == pytest.approx(1e-9, rel=1e-6)
    assert clock.seconds == CollectiveSeconds()

    clock.time(1000, lambda: fake.take(11e-6))
    before = clock.seconds
    assert before is not None
    assert before.total == pytest.approx(11e-6)
    assert before.waiting == pytest.approx(0.0, abs=1e-12)

    clock.time(2000, lambda: fake.take(112e-6))
    assert clock.seconds is not None
    since = clock.seconds.since(before)
    assert since.total == pytest.approx(112e-6)
    assert since.waiting == pytest.approx(100e-6)


def test_collectives_that_something_delayed_do_not_count_as_idle_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = Clock(monkeypatch)
    clock = CollectiveClock(runs=True)
    calls = 0

    def run(floats: int) -> None:
        nonlocal calls
        calls += 1
        # More than half of the rounds, of which each has two calls.
        delay = 5e-3 if calls // 2 % 5 < 3 else 0.0
        fake.take(10e-6 + 4e-9 * floats + delay)

    clock.calibrate(run)
    assert clock.start_cost == pytest.approx(10e-6, rel=1e-6)
    assert clock.byte_cost == pytest.approx(1e-9, rel=1e-6)


def test_a_clock_that_does_not_run_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Clock(monkeypatch)
    clock = CollectiveClock(runs=False)
    ran = []
    clock.calibrate(ran.append)
    assert not ran
    clock.time(10, lambda: fake.take(1.0))
    assert fake.now == 1.0
    assert clock.seconds is None


def test_one_rank_spends_nothing_in_collectives() -> None:
    assert ALONE.collective_seconds == CollectiveSeconds(0.0, 0.0)


def test_a_rank_that_comes_first_counts_its_waiting(tmp_path: Path) -> None:
    late = 0.3
    first_is_there = threading.Event()

    def work(ranks: GroupRanks) -> CollectiveSeconds:
        before = ranks.collective_seconds
        assert before is not None
        if ranks.rank == 0:
            first_is_there.set()
        else:
            first_is_there.wait()
            time.sleep(late)
        ranks.all_reduce(torch.ones(4))
        after = ranks.collective_seconds
        assert after is not None
        return after.since(before)

    first, _ = on_ranks(2, tmp_path / "meeting", work)
    assert first.total > late / 3
    assert first.waiting > late / 3
