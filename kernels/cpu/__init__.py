"""Paths that beat plain PyTorch on a CPU: native kernels, compiled at first use."""

from kernels.cpu.native import (
    NativeStatus,
    has_amx,
    native_status,
    without_amx,
    without_native,
)

__all__ = ["NativeStatus", "has_amx", "native_status", "without_amx", "without_native"]
