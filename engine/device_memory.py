"""How much of a GPU's memory is left for the KV cache, by measuring what all else takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """A device's memory; bytes."""

    def settle(self) -> None:
        """Wait for the device, give back what is cached but unused, and forget the peak."""
        ...

    def reserved(self) -> int:
        """What this process holds for tensors, in use or cached."""
        ...

    def peak(self) -> int:
        """The most that was reserved since the memory settled."""
        ...

    def free_and_total(self) -> tuple[int, int]:
        """What no process uses, and what there is."""
        ...


class CudaMemory:
    """The memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def settle(self) -> None:
        """Wait for the device, give back what is cached but unused, and forget the peak."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def reserved(self) -> int:
        """What PyTorch holds on the device."""
        return int(torch.cuda.memory_reserved(self._device))

    def peak(self) -> int:
        """The most that PyTorch held, with what lay unused between tensors."""
        return int(torch.cuda.max_memory_reserved(self._device))

    def free_and_total(self) -> tuple[int, int]:
        """As the driver tells."""
        free, total = torch.cuda.mem_get_info(self._device)
        return int(free), int(total)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a loaded model takes of a device beside its KV cache; bytes.

    `used` is in use before any step: weights, libraries, other processes. `activations` come on top
    in the largest step, and `graphs` for good.
    """

    total: int
    used: int
    activations: int
    graphs: int

    def cache_budget(self, utilization: float) -> int:
        """What is left for the KV cache of a share of the device; below 0 if nothing is."""
        return int(self.total * utilization) - self.used - self.activations - self.graphs


def measure_use(
    memory: DeviceMemory,
    largest_step: Callable[[], None],
    capture: Callable[[int], object] | None,
    num_graphs: int,
) -> MemoryUse:
    """Measure with the real model what it takes.

    Args:
        memory: the device's.
        largest_step: runs what needs the most memory.
        capture: captures so many of the largest decode steps and returns what holds them; None if
            there will be no graphs.
        num_graphs: how many there will be.
    """
    memory.settle()
    before = memory.reserved()
    largest_step()
    activations = max(memory.peak() - before, 0)
    graphs = 0
    if capture is not None:
        few = min(num_graphs, 4)
        sizes = [_taken(memory, capture, count) for count in sorted({1, few})]
        graphs = graph_bytes(sizes[0], sizes[-1], few, num_graphs)
    memory.settle()
    free, total = memory.free_and_total()
    return MemoryUse(total, total - free, activations, graphs)


def graph_bytes(first: int, few: int, num_few: int, num_graphs: int) -> int:
    """Bytes of `num_graphs` graphs that share a pool, from those of one and of the first few.

    The first has the pool of the largest batch; each further one adds what the driver keeps of it.
    """
    first, few = max(first, 0), max(few, first, 0)
    each = -(-(few - first) // max(num_few - 1, 1))
    return first + each * (num_graphs - 1)


def _taken(memory: DeviceMemory, capture: Callable[[int], object], count: int) -> int:
    memory.settle()
    before, _ = memory.free_and_total()
    held = capture(count)
    memory.settle()
    after, _ = memory.free_and_total()
    del held
    return before - after
