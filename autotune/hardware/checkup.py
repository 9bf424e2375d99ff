"""What of the machine and its libraries is in order, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from autotune.hardware.catalogue import load_catalogue
from autotune.hardware.gpu import Gpu, GpuReadings

Status = Literal["ok", "degraded", "missing"]

GIB = 1 << 30
# Below this a run of the embedded model may not fit: weights, KV cache and the trial's process.
LEAST_MEMORY_BYTES = 2 * GIB
LEAST_DISK_BYTES = GIB
# What imports nothing itself but must import for the engine to run.
_ENGINE_IMPORTS = ("torch", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what was looked at, how it stands, what was found, and what would mend it.

    `required` says that the bundled engine cannot run without it. `library` marks the rows of
    libraries, of which there are many: those in order may be shown together.
    """

    name: str
    status: Status
    found: str
    remedy: str | None = None
    required: bool = False
    library: bool = False

    @property
    def fatal(self) -> bool:
        """Whether this keeps the bundled engine from running."""
        return self.required and self.status == "missing"


def check_python() -> Check:
    """The interpreter; the package cannot be installed for one that is too old."""
    return Check("Python", "ok", f"{sys.version.split()[0]} in {sys.prefix}", required=True)


def check_libraries(distribution: str = "inference-autotune") -> list[Check]:
    """Every library that the installed product asks for: present, and new enough."""
    try:
        wanted = requires(distribution) or []
    except PackageNotFoundError:
        return [
            Check(
                distribution,
                "degraded",
                "not installed as a package: its requirements are unknown",
                "pip install -e . in the checkout, or make run",
            )
        ]
    return [check_library(line) for line in wanted if "extra ==" not in line]


def check_library(requirement: str) -> Check:
    """One requirement such as `torch>=2.11`."""
    name, limits = _parse_requirement(requirement)
    required = name in _ENGINE_IMPORTS
    install = f"pip install '{name}{limits}'"

    def row(status: Status, found: str, remedy: str | None = None) -> Check:
        return Check(name, status, found, remedy, required=required, library=True)

    try:
        found = version(name)
    except PackageNotFoundError:
        return row("missing", "not installed", install)
    if not _within(found, limits):
        return row("degraded", f"{found}, wanted {limits}", install)
    if required:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken build raises OSError, ImportError, RuntimeError, ...
            reason = _first_line(str(error) or type(error).__name__)
            remedy = install.replace("install", "install --force-reinstall")
            return row("missing", f"{found} cannot be imported: {reason}", remedy)
    return row("ok", found)


def check_processor(hardware: dict[str, Any]) -> Check:
    """Cores that this process may use, and the vector instructions that carry the kernels."""
    cpu = hardware["cpu"]
    cores = f"{cpu['cores_usable']} of {cpu['cores_logical']} cores usable"
    if cpu["quota"] is not None:
        cores += f" (container quota {cpu['quota']:g})"
    features = ", ".join(cpu["features"]) or "no known vector extension"
    found = f"{cpu['model']}; {cores}; {features}"
    x86 = hardware["system"]["machine"].lower() in ("x86_64", "amd64")
    if x86 and cpu["features"] and "avx2" not in cpu["features"]:
        return Check("processor", "degraded", found, "use a processor with AVX2: matmuls crawl")
    return Check("processor", "ok", found)


def check_memory(hardware: dict[str, Any]) -> Check:
    """Memory free for weights and KV cache, under the container's limit."""
    memory = hardware["memory"]
    available = memory["available_bytes"]
    found = f"{available / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB available"
    if memory["limit_bytes"] is not None:
        found += f" (container limit {memory['limit_bytes'] / GIB:.1f} GiB)"
    if available < LEAST_MEMORY_BYTES:
        remedy = f"free memory or raise the limit to at least {LEAST_MEMORY_BYTES // GIB} GiB"
        return Check("memory", "degraded", found, remedy)
    return Check("memory", "ok", found)


def check_load(hardware: dict[str, Any]) -> Check:
    """Whether other programs use the processor, which spoils every measurement."""
    try:
        busy = os.getloadavg()[0]
    except (AttributeError, OSError):
        return Check("load", "ok", "unknown on this system")
    cores = hardware["cpu"]["cores_logical"]
    found = f"{busy:.1f} programs were running on {cores} cores in the last minute"
    if busy > cores / 2:
        return Check("load", "degraded", found, "stop them before measuring: they share the cores")
    return Check("load", "ok", found)


def check_disk(folder: Path) -> Check:
    """Space for run folders where the command was started."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("disk", "degraded", f"{folder}: {error}", "start in a folder that exists")
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < LEAST_DISK_BYTES:
        return Check("disk", "degraded", found, "free some, or write runs elsewhere with -o")
    return Check("disk", "ok", found)


def check_native_kernels() -> Check:
    """Whether the compiled CPU kernels run; without them plain PyTorch does, slower."""
    name = "native kernels"
    try:
        from kernels.limits import native_status

        status = native_status()
    except Exception as error:
        return Check(name, "degraded", f"cannot be loaded: {error}", "mend torch first")
    if status.available:
        return Check(name, "ok", status.reason)
    return Check(
        name,
        "degraded",
        f"plain PyTorch is used instead: {_first_line(status.reason)}",
        "install a C++ compiler (Debian, Ubuntu: apt install g++)",
    )


def check_triton_kernels() -> list[Check]:
    """Whether the engine's GPU kernels run on each GPU that torch sees, and how many are tuned."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # told by the check of the library
        return []
    return [_triton_kernels(torch.device("cuda", i), count) for i in range(count)]


def _triton_kernels(device: Any, count: int) -> Check:
    name = "GPU kernels" if count == 1 else f"GPU kernels {device.index}"
    from kernels.limits import triton_status

    status = triton_status(device)
    if status.available:
        from engine.kernel_tuning import num_tuned

        tuned = num_tuned(device)
        text = f"{tuned} problems tuned" if tuned else "autotune doctor --tune-kernels tunes them"
        return Check(name, "ok", f"{status.reason}; {text}")
    remedy = "use a GPU of compute capability 8.0 or above"
    if "not installed" in status.reason:
        remedy = "pip install 'triton>=3.6'"
    elif "cannot be written" in status.reason:
        remedy = "set TRITON_CACHE_DIR to a folder that can be written"
    elif "Triton needs" in status.reason:
        remedy = "install gcc and the headers of this Python (python3-dev)"
    return Check(name, "degraded", f"plain PyTorch is used instead: {status.reason}", remedy)


def check_gpus(readings: GpuReadings, cuda_available: bool | None) -> list[Check]:
    """The GPUs, whether torch can use them, and whether something slows them right now.

    Arguments:
        readings: what NVML said.
        cuda_available: what torch says of CUDA; None where torch is missing.
    """
    checks = [
        Check(f"GPU {index}", "degraded", f"cannot be read: {reason}", "see what nvidia-smi says")
        for index, reason in readings.unreadable.items()
    ]
    for gpu in readings.gpus:
        found = f"{_describe(gpu)}, driver {readings.driver or 'unknown'}"
        entry = load_catalogue().of_driver(gpu.name)
        if entry is not None:
            found += f"; {entry.name} in plans"
        if gpu.slowed_by:
            reasons = ", ".join(gpu.slowed_by)
            remedy = "check its cooling and power limit before measuring"
            checks.append(
                Check(f"GPU {gpu.index}", "degraded", f"{found}; slowed by {reasons}", remedy)
            )
        else:
            checks.append(Check(f"GPU {gpu.index}", "ok", found))
    if readings.gpus and cuda_available is False:
        checks.append(
            Check(
                "CUDA in torch",
                "missing",
                "there is a GPU, but torch cannot use it",
                "install torch's CUDA build (https://pytorch.org/get-started/locally)",
            )
        )
    if not checks:
        found = readings.problem or "NVML knows none"
        if cuda_available:
            found = f"torch has a GPU, but its readings are missing: {found}"
        remedy = "the engine runs on the CPU; for a GPU: " + (readings.remedy or "add one")
        checks.append(Check("GPU", "degraded" if cuda_available else "missing", found, remedy))
    return checks


def check_embedded_model(folder: Path) -> Check:
    """The model that is used when none is named."""
    missing = [n for n in ("config.json", "tokenizer.json") if not (folder / n).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        return Check(
            "embedded model",
            "missing",
            f"{', '.join(missing)} not in {folder}",
            "reinstall the package, or name a model with --model",
        )
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Check("embedded model", "ok", f"{size / 1e6:.1f} MB in {folder}")


def _describe(gpu: Gpu) -> str:
    """The readings that there are, for a person."""
    parts = [gpu.name or "unnamed"]
    if gpu.memory_total_bytes is not None:
        parts.append(f"{gpu.memory_total_bytes / GIB:.0f} GiB")
    if gpu.clock_sm_hz is not None:
        parts.append(f"{gpu.clock_sm_hz / 1e6:.0f} MHz" + _of(gpu.clock_sm_max_hz, 1e6))
    if gpu.power_watts is not None:
        parts.append(f"{gpu.power_watts:.0f} W" + _of(gpu.power_limit_watts))
    if gpu.temperature_celsius is not None:
        parts.append(f"{gpu.temperature_celsius} °C")
    if gpu.ecc is not None:
        parts.append("ECC on" if gpu.ecc else "ECC off")
    if gpu.pcie_generation is not None:
        parts.append(f"PCIe {gpu.pcie_generation} x{gpu.pcie_width or '?'}")
    return ", ".join(parts)


def _of(limit: float | None, scale: float = 1.0) -> str:
    return "" if limit is None else f" of {limit / scale:.0f}"


def _parse_requirement(requirement: str) -> tuple[str, str]:
    bare = requirement.split(";")[0].strip()
    found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^)]*)\)?$", bare)
    return (found.group(1), found.group(2).replace(" ", "")) if found else (bare, "")


def _within(found: str, limits: str) -> bool:
    """Whether a version satisfies `>=` and `<` limits, the only ones the project states."""
    for limit in filter(None, limits.split(",")):
        if limit.startswith(">=") and _release(found) < _release(limit[2:]):
            return False
        if limit.startswith("<") and _release(found) >= _release(limit[1:]):
            return False
    return True


def _release(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    numbers = tuple(int(part) for part in found.group().split(".")) if found else ()
    return numbers + (0,) * (4 - len(numbers))


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no reason given"
