"""How much memory of a CPU's machine a KV cache takes where nobody says."""

from __future__ import annotations

import psutil

CPU_DEFAULT_BYTES = 4 << 30


def cpu_cache_budget() -> int:
    """Bytes of KV cache on a CPU where nothing was asked for."""
    return min(CPU_DEFAULT_BYTES, int(psutil.virtual_memory().available) // 4)
