"""NVML through a stand-in module: whole readings, missing readings, and no NVML at all."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from autotune.hardware.gpu import read_gpus


class NVMLError(Exception):
    pass


class NVMLErrorLibraryNotFound(NVMLError):
    pass


class NVMLErrorNoPermission(NVMLError):
    pass


# As pynvml names its classes.
NVMLErrorLibraryNotFound.__name__ = "NVMLError_LibraryNotFound"
NVMLErrorNoPermission.__name__ = "NVMLError_NoPermission"


class FakeNvml:
    """A machine with two boards; `broken` names calls that fail, `dead` boards without a handle."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(
        self,
        *,
        broken: dict[str, Exception] | None = None,
        dead: tuple[int, ...] = (),
        reasons: int = 0,
    ) -> None:
        self.broken = broken or {}
        self.dead = dead
        self.reasons = reasons
        self.open = 0
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            self.calls.append(name)
            if name in self.broken:
                error = self.broken[name]

                def fail(*_: Any) -> Any:
                    raise error

                return fail
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.15"  # older bindings return bytes

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.dead:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Example {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=80 << 30, used=1 << 30)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return 2000

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 75_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 33

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetEccMode(self, handle: int) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return 16


def test_whole_readings_come_in_plain_units() -> None:
    nvml = FakeNvml(reasons=0x1)
    readings = read_gpus(nvml)
    assert readings.problem is None
    assert readings.driver == "570.86.15"
    assert [gpu.name for gpu in readings.gpus] == ["Example 0", "Example 1"]
    gpu = readings.gpus[1]
    assert gpu.index == 1
    assert gpu.memory_total_bytes == 80 << 30
    assert gpu.memory_used_bytes == 1 << 30
    assert gpu.compute_capability == "9.0"
    assert gpu.clock_sm_hz == 1_980_000_000
    assert gpu.clock_sm_max_hz == 2_000_000_000
    assert gpu.clock_memory_hz == 3_201_000_000
    assert gpu.power_watts == 75.5
    assert gpu.power_limit_watts == 700.0
    assert gpu.temperature_celsius == 33
    assert gpu.throttle_reasons == ("gpu_idle",)
    assert gpu.slowed_by == ()
    assert gpu.ecc is True
    assert (gpu.pcie_generation, gpu.pcie_width) == (5, 16)
    assert nvml.open == 0


def test_throttling_that_costs_speed_is_told_from_idle_clocks() -> None:
    gpu = read_gpus(FakeNvml(reasons=0x1 | 0x4 | 0x40)).gpus[0]
    assert gpu.throttle_reasons == ("gpu_idle", "sw_power_cap", "hw_thermal_slowdown")
    assert gpu.slowed_by == ("sw_power_cap", "hw_thermal_slowdown")


READINGS = {
    "nvmlDeviceGetName": "name",
    "nvmlDeviceGetMemoryInfo": "memory_total_bytes",
    "nvmlDeviceGetCudaComputeCapability": "compute_capability",
    "nvmlDeviceGetClockInfo": "clock_sm_hz",
    "nvmlDeviceGetMaxClockInfo": "clock_sm_max_hz",
    "nvmlDeviceGetPowerUsage": "power_watts",
    "nvmlDeviceGetEnforcedPowerLimit": "power_limit_watts",
    "nvmlDeviceGetTemperature": "temperature_celsius",
    "nvmlDeviceGetEccMode": "ecc",
    "nvmlDeviceGetCurrPcieLinkGeneration": "pcie_generation",
    "nvmlDeviceGetCurrPcieLinkWidth": "pcie_width",
}


@pytest.mark.parametrize(("call", "name"), READINGS.items())
def test_one_withheld_reading_takes_no_other_with_it(call: str, name: str) -> None:
    nvml = FakeNvml(broken={call: NVMLError("Not Supported")})
    gpu = read_gpus(nvml).gpus[0]
    assert getattr(gpu, name) is None
    whole = read_gpus(FakeNvml()).gpus[0]
    for other in set(READINGS.values()) - {name, "memory_total_bytes", "clock_sm_hz"}:
        assert getattr(gpu, other) == getattr(whole, other)
    assert nvml.open == 0


def test_older_name_of_the_throttle_reasons_is_tried() -> None:
    nvml = FakeNvml(broken={"nvmlDeviceGetCurrentClocksEventReasons": AttributeError("no such")})
    assert read_gpus(nvml).gpus[0].throttle_reasons is None
    old: Any = nvml
    old.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x20
    assert read_gpus(nvml).gpus[0].throttle_reasons == ("sw_thermal_slowdown",)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (NVMLErrorLibraryNotFound("NVML Shared Library Not Found"), "install the NVIDIA driver"),
        (NVMLErrorNoPermission("Insufficient Permissions"), "/dev/nvidia"),
        (OSError("libnvidia-ml.so.1: wrong ELF class"), "nvidia-smi"),
    ],
)
def test_no_nvml_is_told_with_a_remedy(error: Exception, remedy: str) -> None:
    readings = read_gpus(FakeNvml(broken={"nvmlInit": error}))
    assert readings.gpus == ()
    assert str(error) in (readings.problem or "")
    assert remedy in (readings.remedy or "")


def test_a_failing_count_still_closes_nvml() -> None:
    nvml = FakeNvml(broken={"nvmlDeviceGetCount": NVMLErrorNoPermission("no")})
    readings = read_gpus(nvml)
    assert readings.gpus == ()
    assert "/dev/nvidia" in (readings.remedy or "")
    assert nvml.open == 0


def test_a_lost_board_leaves_the_others() -> None:
    readings = read_gpus(FakeNvml(dead=(0,)))
    assert [gpu.index for gpu in readings.gpus] == [1]
    assert readings.unreadable == {0: "GPU is lost"}


def test_missing_bindings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    readings = read_gpus()
    assert readings.gpus == ()
    assert readings.remedy == "pip install nvidia-ml-py"
