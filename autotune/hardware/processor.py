"""The processor: its name, how many cores this process may use, and its vector instructions."""

from __future__ import annotations

import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

# What decides which kernels run: by the name the kernel lists them under in /proc/cpuinfo.
_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "sve": "sve",
    "sve2": "sve2",
    "i8mm": "i8mm",
    "bf16": "bf16",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """One machine's processor. `features` are the vector instructions that matter here."""

    model: str
    cores_physical: int | None
    cores_logical: int
    features: tuple[str, ...]


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """Describe the processor; without /proc (not Linux) its features stay unknown."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    flags = set(_field(text, "flags", "Features").split())
    return Processor(
        model=_field(text, "model name", "Model") or platform.processor() or platform.machine(),
        cores_physical=psutil.cpu_count(logical=False),
        cores_logical=psutil.cpu_count(logical=True) or 1,
        features=tuple(name for flag, name in _FEATURES.items() if flag in flags),
    )


def usable_cores(quota: float | None) -> int:
    """Cores this process may use: its affinity, and a control group's quota in processors."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    if quota is None:
        return allowed
    return max(1, min(allowed, math.floor(quota + 1e-9)))


def _field(cpuinfo: str, *names: str) -> str:
    for name in names:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""
