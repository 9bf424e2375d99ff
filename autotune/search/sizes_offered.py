"""Among how many GPUs a search may divide a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from engine.config import KNOBS
from engine.models.sharding import divides
from engine.models.spec import DecoderSpec


def sizes_offered(hardware: Mapping[str, Any], spec: DecoderSpec) -> tuple[int, ...]:
    """Values of `tensor_parallel_size`: no more than there are GPUs, and what divides the model.

    `hardware` is what `describe_hardware` tells. Where the processes would share one device (a
    CPU) there is nothing to gain.
    """
    count = visible_gpus(hardware)
    sizes = KNOBS["tensor_parallel_size"].choices or ()
    return tuple(size for size in sizes if size == 1 or (size <= count and divides(spec, size)))


def visible_gpus(hardware: Mapping[str, Any]) -> int:
    """GPUs that a process started now would see; 0 where the device is a CPU."""
    if hardware.get("device") != "cuda":
        return 0
    count = len(hardware.get("gpus") or ())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return count
    return min(count, len([name for name in chosen.split(",") if name.strip()]))
