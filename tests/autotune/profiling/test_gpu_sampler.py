"""Sampling GPUs through a stand-in for NVML: whole readings, withheld ones, none at all."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.profiling.gpu_sampler import GpuSampler, summarise_samples
from autotune.profiling.schema import GpuSample


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two boards; `reasons` are the bits of each reading, the last stays; `broken` calls fail."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1
    UUIDS = ("GPU-aaaa", "GPU-bbbb")

    def __init__(self, reasons: tuple[int, ...] = (0,), broken: tuple[str, ...] = ()) -> None:
        self._reasons = itertools.chain(reasons, itertools.repeat(reasons[-1]))
        self._broken = broken
        self.open = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self._broken:
            raise NVMLError(f"{name} is not supported")
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return self.UUIDS.index(uuid)

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return 2000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 300_000 + 1000 * handle

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=80 << 30, used=7 << 30)

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1500, 2: 3201}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return next(self._reasons)

    def nvmlDeviceGetPcieThroughput(self, handle: int, counter: int) -> int:
        return {0: 11, 1: 22}[counter]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def sampled(sampler: GpuSampler, at_least: int) -> None:
    with sampler:
        wait_until(lambda: len(sampler._samples) >= at_least)


def test_samples_come_in_plain_units() -> None:
    nvml = FakeNvml(reasons=(0x4 | 0x1,))
    sampler = GpuSampler(["GPU-bbbb"], interval_s=0.001, nvml=nvml)
    sampled(sampler, 3)
    gpu = sampler.result()
    assert gpu is not None
    sample = gpu.samples[0]
    assert sample.model_dump(exclude={"at_s"}) == {
        "index": 0,
        "power_watts": 301.0,
        "clock_sm_hz": 1_500_000_000,
        "clock_memory_hz": 3_201_000_000,
        "temperature_celsius": 61,
        "memory_used_bytes": 7 << 30,
        "utilisation": 0.75,
        "pcie_rx_bytes_per_s": 22_000,
        "pcie_tx_bytes_per_s": 11_000,
        "throttled_by": ["sw_power_cap"],  # idle clocks cost nothing
    }
    assert gpu.power_limit_watts == 700.0
    assert gpu.clock_ratio == pytest.approx(0.75)
    times = [s.at_s for s in gpu.samples]
    assert times == sorted(times)
    assert gpu.interval_s == pytest.approx((times[-1] - times[0]) / (len(times) - 1))
    assert sampler.problem is None
    assert nvml.open == 0


def test_without_names_every_board_is_sampled() -> None:
    sampler = GpuSampler(interval_s=0.001, nvml=FakeNvml())
    sampled(sampler, 4)
    gpu = sampler.result()
    assert gpu is not None
    assert {s.index for s in gpu.samples} == {0, 1}
    assert {s.power_watts for s in gpu.samples} == {300.0, 301.0}


READINGS = {
    "nvmlDeviceGetPowerUsage": ["power_watts"],
    "nvmlDeviceGetClockInfo": ["clock_sm_hz", "clock_memory_hz"],
    "nvmlDeviceGetTemperature": ["temperature_celsius"],
    "nvmlDeviceGetMemoryInfo": ["memory_used_bytes"],
    "nvmlDeviceGetUtilizationRates": ["utilisation"],
    "nvmlDeviceGetPcieThroughput": ["pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s"],
    "nvmlDeviceGetCurrentClocksEventReasons": ["throttled_by"],
}


@pytest.mark.parametrize("call", READINGS)
def test_reading_that_is_withheld_is_none_and_the_others_stay(call: str) -> None:
    sampler = GpuSampler(["GPU-aaaa"], interval_s=0.001, nvml=FakeNvml(broken=(call,)))
    sampled(sampler, 1)
    gpu = sampler.result()
    assert gpu is not None
    for names in READINGS.values():
        for name in names:
            assert (getattr(gpu.samples[0], name) is None) == (name in READINGS[call]), name
    assert (gpu.throttled_share is None) == ("throttled_by" in READINGS[call])


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("nvmlInit", "nvmlInit is not supported"),
        ("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByUUID is not supported"),
    ],
)
def test_nvml_that_fails_is_told_and_never_raised(broken: str, told: str) -> None:
    nvml = FakeNvml(broken=(broken,))
    sampler = GpuSampler(["GPU-aaaa"], nvml=nvml)
    with sampler:
        pass
    assert sampler.result() is None
    assert sampler.problem is not None
    assert told in sampler.problem
    assert nvml.open == 0


def test_missing_bindings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuSampler() as sampler:
        pass
    assert sampler.result() is None
    assert "bindings cannot be imported" in (sampler.problem or "")


def test_times_count_from_the_moment_that_the_load_began() -> None:
    ticks = itertools.count()
    sampler = GpuSampler(
        ["GPU-aaaa"], interval_s=0.001, nvml=FakeNvml(), clock=lambda: float(next(ticks))
    )
    sampled(sampler, 2)
    before = sampler.result()
    sampler.begin_at(100.0)
    after = sampler.result()
    assert before is not None
    assert after is not None
    assert after.samples[0].at_s == pytest.approx(before.samples[0].at_s - 100.0)


def test_driver_that_hangs_does_not_hang_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.profiling.gpu_sampler._JOIN_S", 0.05)
    release, entered = threading.Event(), threading.Event()
    nvml = FakeNvml()

    def hang(handle: int) -> int:
        entered.set()
        release.wait(30)
        return 0

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", hang)
    with GpuSampler(["GPU-aaaa"], nvml=nvml) as sampler:
        assert entered.wait(10)
    assert sampler.result() is None
    assert nvml.open == 1, "NVML must not be shut down under a call"
    release.set()
    sampler._thread.join(10)


def test_summary_counts_throttled_samples_and_leaves_idle_clocks_out() -> None:
    def sample(clock: int, busy: float | None, *by: str) -> GpuSample:
        return GpuSample(
            at_s=0.0, index=0, clock_sm_hz=clock, utilisation=busy, throttled_by=list(by)
        )

    gpu = summarise_samples(
        [
            sample(1000, 1.0, "sw_power_cap"),
            sample(2000, 1.0),
            sample(300, 0.0),
            sample(1500, None, "sw_power_cap", "hw_thermal_slowdown"),
        ],
        interval_s=0.1,
        clock_max_hz={0: 2000},
    )
    assert gpu.throttled_share == 0.5
    assert gpu.throttle_reasons == {"sw_power_cap": 0.5, "hw_thermal_slowdown": 0.25}
    assert gpu.clock_ratio == pytest.approx((0.5 + 1.0 + 0.75) / 3)
    assert gpu.power_mean_watts is None
