"""Measured choices on disk."""

from kernels.triton.runtime import DeviceFacts
from kernels.triton.tuning import TuningTable


def load(facts: DeviceFacts) -> TuningTable:
    """What was measured on such a device."""
    return TuningTable()
