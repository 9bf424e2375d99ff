"""GPUs as the driver's management library (NVML) sees them.

Any reading may be missing: older boards, virtual GPUs and containers withhold some. A missing
reading is None; what keeps all of them away is told in `GpuReadings.problem`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons, from nvml.h.
_THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
SLOWING_REASONS = frozenset(_THROTTLE_REASONS.values()) - {
    "gpu_idle",
    "applications_clocks_setting",
    "display_clock_setting",
}
_REMEDIES = {
    "LibraryNotFound": "install the NVIDIA driver (in a container: start it with --gpus all)",
    "DriverNotLoaded": "load the NVIDIA kernel module, or restart after installing the driver",
    "LibRmVersionMismatch": "restart the machine: the driver was updated under a running kernel",
    "NoPermission": "give the user access to /dev/nvidia*",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Memory in bytes, clocks in Hz, power in watts, temperature in degrees Celsius."""

    index: int
    name: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    compute_capability: str | None
    clock_sm_hz: int | None
    clock_sm_max_hz: int | None
    clock_memory_hz: int | None
    power_watts: float | None
    power_limit_watts: float | None
    temperature_celsius: int | None
    throttle_reasons: tuple[str, ...] | None
    ecc: bool | None
    pcie_generation: int | None
    pcie_width: int | None

    @property
    def slowed_by(self) -> tuple[str, ...]:
        """The throttle reasons that cost speed; idle clocks do not."""
        return tuple(r for r in self.throttle_reasons or () if r in SLOWING_REASONS)


@dataclass(frozen=True, slots=True)
class GpuReadings:
    """All GPUs, the driver's version, and why there are none if something failed."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    problem: str | None = None
    remedy: str | None = None
    unreadable: dict[int, str] = field(default_factory=dict)


def read_gpus(nvml: Any = None) -> GpuReadings:
    """Read all GPUs; never raises.

    Arguments:
        nvml: the module to ask, `pynvml` by default.
    """
    if nvml is None:
        try:
            nvml = import_nvml()
        except ImportError as error:
            return GpuReadings(problem=nvml_problem(error), remedy="pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
    except Exception as error:
        return _failed(error)
    try:
        driver = _text(attempt(nvml.nvmlSystemGetDriverVersion))
        gpus, unreadable = [], {}
        for index in range(int(nvml.nvmlDeviceGetCount())):
            try:
                gpus.append(_read_gpu(nvml, index))
            except Exception as error:
                unreadable[index] = str(error)
        return GpuReadings(tuple(gpus), driver, unreadable=unreadable)
    except Exception as error:
        return _failed(error)
    finally:
        attempt(nvml.nvmlShutdown)


def import_nvml() -> Any:
    """The bindings.

    Raises:
        ImportError: they cannot be used.
    """
    try:
        return importlib.import_module("pynvml")
    except Exception as error:  # a broken installation may raise anything
        raise ImportError(str(error)) from error


def nvml_problem(error: Exception) -> str:
    """What keeps NVML from being read."""
    if isinstance(error, ImportError):
        return f"the NVML bindings cannot be imported: {error}"
    return f"NVML: {error}"


def _failed(error: Exception) -> GpuReadings:
    kind = type(error).__name__
    for name, remedy in _REMEDIES.items():
        if kind.endswith(name):
            return GpuReadings(problem=nvml_problem(error), remedy=remedy)
    return GpuReadings(problem=nvml_problem(error), remedy="see what nvidia-smi says")


def _read_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def read(name: str, *arguments: Any) -> Any:
        return attempt(lambda: getattr(nvml, name)(handle, *arguments))

    def clock(name: str, kind: str) -> int | None:
        return _scaled(read(name, getattr(nvml, kind, None)), 1e6)

    memory = read("nvmlDeviceGetMemoryInfo")
    capability = read("nvmlDeviceGetCudaComputeCapability")
    ecc = read("nvmlDeviceGetEccMode")
    milliwatts = read("nvmlDeviceGetPowerUsage")
    limit = read("nvmlDeviceGetEnforcedPowerLimit")
    return Gpu(
        index=index,
        name=_text(read("nvmlDeviceGetName")),
        memory_total_bytes=attempt(lambda: int(memory.total)),
        memory_used_bytes=attempt(lambda: int(memory.used)),
        compute_capability=attempt(lambda: f"{capability[0]}.{capability[1]}"),
        clock_sm_hz=clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        clock_sm_max_hz=clock("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
        clock_memory_hz=clock("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        power_watts=None if milliwatts is None else milliwatts / 1000,
        power_limit_watts=None if limit is None else limit / 1000,
        temperature_celsius=_scaled(
            read("nvmlDeviceGetTemperature", getattr(nvml, "NVML_TEMPERATURE_GPU", 0)), 1
        ),
        throttle_reasons=throttle_reasons(read),
        ecc=attempt(lambda: bool(ecc[0])),
        pcie_generation=_scaled(read("nvmlDeviceGetCurrPcieLinkGeneration"), 1),
        pcie_width=_scaled(read("nvmlDeviceGetCurrPcieLinkWidth"), 1),
    )


def throttle_reasons(read: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names of the bits that NVML sets, None where it tells none; `read` calls it by name."""
    bits = read("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:  # the name before driver 535
        bits = read("nvmlDeviceGetCurrentClocksThrottleReasons")
    if bits is None:
        return None
    return tuple(name for bit, name in _THROTTLE_REASONS.items() if int(bits) & bit)


def attempt(call: Callable[[], Any]) -> Any:
    """The call's result, or None where the board or the driver withholds it."""
    try:
        return call()
    except Exception:
        return None


def _scaled(value: Any, factor: float) -> int | None:
    return None if value is None else int(value * factor)


def _text(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
