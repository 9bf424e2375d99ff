"""What the GPUs do while a load runs: NVML, read now and then by a thread of its own.

A reading that the board or the driver withholds is None. Nothing here can fail a measurement: where
NVML is missing there are no samples, and `problem` says why.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from autotune.hardware.gpu import (
    SLOWING_REASONS,
    attempt,
    import_nvml,
    nvml_problem,
    throttle_reasons,
)
from autotune.profiling.schema import Gpu, GpuSample

# The two PCIe counters take 20 ms each, over which NVML counts: ten samples a second leave the
# driver idle for most of the time.
INTERVAL_S = 0.1
# For how long the end waits for a reading under way; a driver that hangs must not hang the profile.
_JOIN_S = 2.0
# NVML counts PCIe traffic in KB/s, power in mW, clocks in MHz.
_KB, _MW, _MHZ = 1000, 1e-3, 10**6


@dataclass(frozen=True, slots=True)
class _Board:
    index: int
    handle: Any
    clock_max_hz: int | None
    power_limit_watts: float | None


class GpuSampler:
    """Samples GPUs while it is entered; `result` is the summary afterwards.

    Args:
        uuids: of the GPUs, as NVML writes them (`GPU-...`); None samples all.
        interval_s: seconds from one sample to the next.
        nvml: the module to ask, `pynvml` by default.
        clock: seconds.
    """

    def __init__(
        self,
        uuids: Sequence[str] | None = None,
        *,
        interval_s: float = INTERVAL_S,
        nvml: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.problem: str | None = None
        self._uuids = uuids
        self._interval = interval_s
        self._clock = clock
        self._nvml = nvml
        self._samples: list[GpuSample] = []
        self._boards: list[_Board] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
        self._start = 0.0

    def __enter__(self) -> Self:
        self._start = self._clock()
        self._open()
        if self._boards:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
        if self._boards and not self._thread.is_alive():
            attempt(self._nvml.nvmlShutdown)

    def begin_at(self, moment: float) -> None:
        """Count the samples' times from this moment on the clock."""
        self._start = moment

    def result(self) -> Gpu | None:
        """The samples and their summary; None if there are none."""
        start = self._start
        samples = [s.model_copy(update={"at_s": s.at_s - start}) for s in list(self._samples)]
        if not samples:
            return None
        limits = [b.power_limit_watts for b in self._boards if b.power_limit_watts is not None]
        return summarise_samples(
            samples,
            interval_s=_mean_interval(samples) or self._interval,
            power_limit_watts=fmean(limits) if limits else None,
            clock_max_hz={b.index: b.clock_max_hz for b in self._boards if b.clock_max_hz},
        )

    def _open(self) -> None:
        try:
            self._nvml = self._nvml or import_nvml()
            self._nvml.nvmlInit()
        except Exception as error:
            self.problem = nvml_problem(error)
            return
        try:
            self._boards = self._find_boards()
        except Exception as error:
            self.problem = nvml_problem(error)
        else:
            if not self._boards:
                self.problem = "NVML shows no GPU"
        if not self._boards:
            attempt(self._nvml.nvmlShutdown)

    def _find_boards(self) -> list[_Board]:
        nvml = self._nvml
        if self._uuids is None:
            handles = [
                nvml.nvmlDeviceGetHandleByIndex(i) for i in range(int(nvml.nvmlDeviceGetCount()))
            ]
        else:
            handles = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in self._uuids]
        boards = []
        for index, handle in enumerate(handles):
            ask = functools.partial(_ask, nvml, handle)
            clock = ask("nvmlDeviceGetMaxClockInfo", getattr(nvml, "NVML_CLOCK_SM", 1))
            limit = ask("nvmlDeviceGetEnforcedPowerLimit")
            boards.append(
                _Board(
                    index,
                    handle,
                    None if clock is None else int(clock) * _MHZ,
                    None if limit is None else limit * _MW,
                )
            )
        return boards

    def _run(self) -> None:
        due = self._clock()
        while not self._ended.is_set():
            for board in self._boards:
                self._samples.append(self._read(board))
            # By the clock and not by sleeping so long after each reading, whose time varies.
            due = max(due + self._interval, self._clock())
            self._ended.wait(max(0.0, due - self._clock()))

    def _read(self, board: _Board) -> GpuSample:
        nvml, at = self._nvml, self._clock()
        read = functools.partial(_ask, nvml, board.handle)

        def scaled(name: str, factor: int, *constants: str) -> int | None:
            value = read(name, *(getattr(nvml, constant, 0) for constant in constants))
            return None if value is None else int(value) * factor

        milliwatts = read("nvmlDeviceGetPowerUsage")
        rates = read("nvmlDeviceGetUtilizationRates")
        memory = read("nvmlDeviceGetMemoryInfo")
        reasons = throttle_reasons(read)
        pcie = "nvmlDeviceGetPcieThroughput"
        return GpuSample(
            at_s=at,
            index=board.index,
            power_watts=None if milliwatts is None else milliwatts * _MW,
            clock_sm_hz=scaled("nvmlDeviceGetClockInfo", _MHZ, "NVML_CLOCK_SM"),
            clock_memory_hz=scaled("nvmlDeviceGetClockInfo", _MHZ, "NVML_CLOCK_MEM"),
            temperature_celsius=scaled("nvmlDeviceGetTemperature", 1, "NVML_TEMPERATURE_GPU"),
            memory_used_bytes=attempt(lambda: int(memory.used)),
            utilisation=attempt(lambda: rates.gpu / 100),
            pcie_rx_bytes_per_s=scaled(pcie, _KB, "NVML_PCIE_UTIL_RX_BYTES"),
            pcie_tx_bytes_per_s=scaled(pcie, _KB, "NVML_PCIE_UTIL_TX_BYTES"),
            throttled_by=None
            if reasons is None
            else [reason for reason in reasons if reason in SLOWING_REASONS],
        )


def _ask(nvml: Any, handle: Any, name: str, *arguments: Any) -> Any:
    """What a function of NVML says of a board; None if it does not."""
    return attempt(lambda: getattr(nvml, name)(handle, *arguments))


def summarise_samples(
    samples: Sequence[GpuSample],
    *,
    interval_s: float,
    power_limit_watts: float | None = None,
    clock_max_hz: dict[int, int] | None = None,
) -> Gpu:
    """Mean power of a GPU, its clock over its highest, and how often something slowed it.

    Clocks of samples at which the GPU was idle are left out: it lowers them by itself.

    Args:
        samples: at least one.
        interval_s: seconds from one to the next.
        power_limit_watts: of a GPU, a mean over them.
        clock_max_hz: highest clock of the multiprocessors by GPU.
    """
    power = [s.power_watts for s in samples if s.power_watts is not None]
    highest = clock_max_hz or {}
    ratios = [
        s.clock_sm_hz / highest[s.index]
        for s in samples
        if s.clock_sm_hz is not None and s.index in highest and s.utilisation != 0.0
    ]
    slowed = [s.throttled_by for s in samples if s.throttled_by is not None]
    reasons = Counter(reason for by in slowed for reason in by)
    return Gpu(
        samples=list(samples),
        interval_s=interval_s,
        power_mean_watts=fmean(power) if power else None,
        power_limit_watts=power_limit_watts,
        clock_ratio=fmean(ratios) if ratios else None,
        throttled_share=fmean(bool(by) for by in slowed) if slowed else None,
        throttle_reasons={reason: count / len(slowed) for reason, count in reasons.items()},
    )


def _mean_interval(samples: Sequence[GpuSample]) -> float | None:
    """Seconds from one sample of a GPU to its next; reading many GPUs takes longer than asked."""
    times = [s.at_s for s in samples if s.index == samples[0].index]
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def visible_uuids(count: int) -> list[str] | None:
    """NVML's names of the first `count` GPUs that PyTorch sees; None if it does not tell them.

    PyTorch counts the GPUs that it may use, fastest first, NVML all of them by their slot.
    """
    import torch

    try:
        found = [str(torch.cuda.get_device_properties(i).uuid) for i in range(count)]
    except (AttributeError, AssertionError, RuntimeError):
        return None
    return [uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in found]
