"""What of a machine each replica gets: its GPUs, or its cores and its part of the memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig
from engine.cpu_cache_budget import cpu_cache_budget
from engine.errors import EnvironmentLacks

_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica gets.

    `cores` none: all. `gpus` are named as CUDA_VISIBLE_DEVICES does; None: as the router sees them.
    """

    config: EngineConfig
    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] | None = None


def shares_of(config: EngineConfig, replicas: int) -> list[Share]:
    """Divide the machine among replicas of one configuration.

    On GPUs each gets `tensor_parallel_size` of its own. On a CPU each gets its part of the cores
    and, where `kv_cache_memory_bytes` is not set, of the memory that one engine would take for its
    cache.

    Raises:
        EnvironmentLacks: there are fewer GPUs than they need.
    """
    gpus = visible_gpus() if config.device != "cpu" else []
    if gpus or config.device == "cuda":
        each = config.tensor_parallel_size
        if len(gpus) < replicas * each:
            raise EnvironmentLacks(
                f"{replicas} replicas of tensor_parallel_size={each} need {replicas * each} GPUs, "
                f"and {len(gpus)} are visible: ask for fewer replicas, or set device=cpu"
            )
        return [Share(config, gpus=tuple(gpus[i * each : (i + 1) * each])) for i in range(replicas)]
    if config.kv_cache_memory_bytes is None and replicas > 1:
        ranks = replicas * config.tensor_parallel_size
        config = config.replace(kv_cache_memory_bytes=cpu_cache_budget() // ranks)
    return [Share(config, cores) for cores in divide_cores(neighbouring_cores(), replicas)]


def divide_cores(cores: Sequence[int], replicas: int) -> list[tuple[int, ...]]:
    """Equal parts of the cores, each of neighbours; one core each where there are too few."""
    count = len(cores)
    if count < replicas:
        return [(cores[place % count],) for place in range(replicas)]
    ends = [place * count // replicas for place in range(replicas + 1)]
    return [tuple(cores[a:b]) for a, b in itertools.pairwise(ends)]


def neighbouring_cores() -> list[int]:
    """The cores that this process may use; those of one socket, and of one core, are neighbours."""
    return sorted(os.sched_getaffinity(0), key=_place)


def _place(core: int) -> tuple[int, int, int]:
    folder = _TOPOLOGY / f"cpu{core}" / "topology"
    try:
        package, number = (
            int((folder / name).read_text()) for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, core, core
    return package, number, core


def visible_gpus() -> list[str]:
    """The GPUs that PyTorch sees, as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    if not _driver_sees_gpus():
        return []
    import torch  # seconds: only where there is a GPU

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in named.split(",")][:count]


def _driver_sees_gpus() -> bool:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return int(pynvml.nvmlDeviceGetCount()) > 0
    finally:
        pynvml.nvmlShutdown()
