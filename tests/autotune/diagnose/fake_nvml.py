"""An NVML whose one GPU is slowed by its power limit, to 55% of its clock."""

from __future__ import annotations

from types import SimpleNamespace


class HotGpu:
    """As much of the `pynvml` module as the sampler asks for."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_PCIE_UTIL_TX_BYTES = 0
    NVML_PCIE_UTIL_RX_BYTES = 1

    def nvmlInit(self) -> None:
        """Nothing to do."""

    def nvmlShutdown(self) -> None:
        """Nothing to do."""

    def nvmlDeviceGetCount(self) -> int:
        """One."""
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """Its index."""
        return index

    def nvmlDeviceGetMaxClockInfo(self, _handle: int, _kind: int) -> int:
        """MHz."""
        return 1980

    def nvmlDeviceGetClockInfo(self, _handle: int, _kind: int) -> int:
        """MHz."""
        return 1089

    def nvmlDeviceGetEnforcedPowerLimit(self, _handle: int) -> int:
        """Milliwatts."""
        return 700_000

    def nvmlDeviceGetPowerUsage(self, _handle: int) -> int:
        """Milliwatts."""
        return 698_000

    def nvmlDeviceGetTemperature(self, _handle: int, _kind: int) -> int:
        """Degrees Celsius."""
        return 88

    def nvmlDeviceGetUtilizationRates(self, _handle: int) -> SimpleNamespace:
        """Percent."""
        return SimpleNamespace(gpu=99, memory=60)

    def nvmlDeviceGetMemoryInfo(self, _handle: int) -> SimpleNamespace:
        """Bytes."""
        return SimpleNamespace(used=70 * 2**30, total=80 * 2**30)

    def nvmlDeviceGetPcieThroughput(self, _handle: int, _kind: int) -> int:
        """KB/s."""
        return 1000

    def nvmlDeviceGetCurrentClocksEventReasons(self, _handle: int) -> int:
        """sw_power_cap."""
        return 0x4
