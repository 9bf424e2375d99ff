"""One description of the machine: what `run.json` stores and `doctor` shows."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import psutil

from autotune.hardware.catalogue import load_catalogue
from autotune.hardware.cgroup import CgroupLimits, read_cgroup_limits
from autotune.hardware.gpu import GpuReadings, read_gpus
from autotune.hardware.processor import read_processor, usable_cores


def describe_hardware(
    device: str = "auto",
    *,
    readings: GpuReadings | None = None,
    limits: CgroupLimits | None = None,
) -> dict[str, Any]:
    """The machine as plain JSON values; bytes, Hz, watts.

    `device`, `name`, `cores` and `memory_bytes` are those of the device that is measured: the GPU
    with `cuda`, the processor with `cpu`. Cores and memory are what this process may use, which
    a container may have made less than the machine has. `gpu_kernels` says with `cuda` whether
    the engine's compiled kernels run on the GPU, and if not why; None with `cpu`. Each GPU's
    `catalogue` is the name that plans know it by, None for one that the catalogue lacks.

    Arguments:
        device: `cpu`, `cuda`, or `auto` for what the engine would choose.
        readings: what NVML said; read afresh by default.
        limits: of the control groups; read afresh by default.
    """
    readings = read_gpus() if readings is None else readings
    limits = read_cgroup_limits() if limits is None else limits
    processor = read_processor()
    memory = psutil.virtual_memory()
    total = _least(memory.total, limits.memory_bytes)
    available = _least(memory.available, limits.memory_free_bytes)
    on_gpu = device == "cuda" or (device == "auto" and _torch_has_gpu())
    gpu = readings.gpus[0] if on_gpu and readings.gpus else None
    return {
        "device": "cuda" if on_gpu else "cpu",
        "name": gpu.name if gpu and gpu.name else processor.model,
        "cores": usable_cores(limits.cpus),
        "memory_bytes": gpu.memory_total_bytes if gpu and gpu.memory_total_bytes else total,
        "cpu": {
            **dataclasses.asdict(processor),
            "features": list(processor.features),
            "cores_usable": usable_cores(limits.cpus),
            "quota": limits.cpus,
        },
        "memory": {
            "total_bytes": total,
            "available_bytes": available,
            "machine_bytes": memory.total,
            "limit_bytes": limits.memory_bytes,
        },
        "gpus": [
            {
                **dataclasses.asdict(g),
                "throttle_reasons": _list(g.throttle_reasons),
                "catalogue": _catalogue_name(g.name),
            }
            for g in readings.gpus
        ],
        "gpu_kernels": _gpu_kernels() if on_gpu else None,
        "gpu_driver": readings.driver,
        "gpu_problem": readings.problem,
        "system": {
            "name": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
    }


def _torch_has_gpu() -> bool:
    try:
        import torch

        return bool(torch.cuda.is_available())
    except Exception:  # a broken torch has no GPU; doctor says what is wrong with it
        return False


def _gpu_kernels() -> dict[str, Any] | None:
    try:
        import torch

        from kernels.limits import triton_status

        return dataclasses.asdict(triton_status(torch.device("cuda")))
    except Exception:  # as above
        return None


def _catalogue_name(driver_name: str | None) -> str | None:
    entry = load_catalogue().of_driver(driver_name)
    return None if entry is None else entry.name


def _least(value: int, limit: int | None) -> int:
    return value if limit is None else min(value, limit)


def _list(values: tuple[str, ...] | None) -> list[str] | None:
    return None if values is None else list(values)
