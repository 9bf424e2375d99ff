"""Rates are computed from counted work and a clock; a clock of our own makes them exact."""

from collections.abc import Callable

import pytest
import torch

from kernels import limits
from kernels.limits import Rate, measure_bandwidth, measure_matmul

CPU = torch.device("cpu")


class Clock:
    """Tells the next of its durations for each call of the work; the last one repeats."""

    def __init__(self, durations: list[float]) -> None:
        self.durations = durations
        self.repeats: list[int] = []

    def __call__(
        self, work: Callable[[], torch.Tensor], repeats: int, device: torch.device
    ) -> float:
        work()
        self.repeats.append(repeats)
        took = self.durations.pop(0) if len(self.durations) > 1 else self.durations[0]
        return took * repeats


def set_clock(monkeypatch: pytest.MonkeyPatch, *durations: float) -> Clock:
    clock = Clock(list(durations))
    monkeypatch.setattr(limits, "_time", clock)
    return clock


def nothing() -> torch.Tensor:
    return torch.empty(0)


def test_rates_are_median_and_quartiles_of_work_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 2.0, 1.0, 4.0)
    rate = limits._sample(nothing, amount=8.0, took=1.0, seconds=0.0, device=CPU)
    assert rate == Rate(median=4.0, low=3.0, high=6.0, samples=3)


def test_short_work_is_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = set_clock(monkeypatch, 1e-4)
    rate = limits._sample(nothing, amount=3.0, took=1e-4, seconds=0.0, device=CPU)
    assert clock.repeats == [50, 50, 50]
    assert rate.median == pytest.approx(3e4)


def test_one_disturbed_call_does_not_decide_how_many_make_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_clock(monkeypatch, 9.0, 0.25, 5.0)
    assert limits._least_time(nothing, CPU) == 0.25


def test_bandwidth_counts_the_bytes_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_READ_BYTES", 1 << 20)
    set_clock(monkeypatch, 0.5)
    assert measure_bandwidth(0.0).median == (1 << 20) / 0.5


@pytest.mark.parametrize(
    ("durations", "size"),
    # Three calls for each size that is tried; the samples after them take a second each.
    [([1.0], 64), ([1e-3] * 3 + [1.0], 128), ([0.0] * 9 + [1.0], 256)],
)
def test_matmul_counts_two_operations_a_product_and_grows_while_there_is_time(
    monkeypatch: pytest.MonkeyPatch, durations: list[float], size: int
) -> None:
    monkeypatch.setattr(limits, "_LEAST_MATMUL_SIZE", 64)
    monkeypatch.setitem(limits._MAX_MATMUL_SIZE, "cpu", 256)
    set_clock(monkeypatch, *durations)
    assert measure_matmul(torch.float32, 0.1).median == 2 * size**3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_real_measurements_are_ordered_and_positive(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(limits, "_LEAST_MATMUL_SIZE", 64)
    rate = measure_matmul(dtype, 0.01)
    assert 0 < rate.low <= rate.median <= rate.high
    assert rate.samples >= 3


def test_a_dtype_that_cannot_be_multiplied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LEAST_MATMUL_SIZE", 64)
    with pytest.raises(RuntimeError):
        measure_matmul(torch.bool, 0.01)
