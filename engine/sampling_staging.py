"""Host memory through which a sampling step's parameters and results pass without waiting.

A copy between a device and pinned memory returns at once, so the memory must stay as it is until
the copy is done. Each step under way has a slot of its own; as a rule there are two in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16
_LEAST_BYTES = 1 << 16


class Slot:
    """Pinned memory of one step, and the device memory that its parameters are copied to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._up, self._on_device = self._bytes(_LEAST_BYTES), self._bytes_on_device(_LEAST_BYTES)
        self._down = self._bytes(_LEAST_BYTES)

    def upload(self, arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
        """The arrays on the device, by one copy; once between two releases of the slot."""
        starts, size = _layout([a.nbytes for a in arrays])
        if size > len(self._up):
            self._up, self._on_device = self._bytes(size), self._bytes_on_device(size)
        held = self._up.numpy()
        for start, array in zip(starts, arrays, strict=True):
            held[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._on_device[:size].copy_(self._up[:size], non_blocking=True)
        return [
            self._on_device[start : start + a.nbytes]
            .view(torch.from_numpy(a[:0]).dtype)
            .view(a.shape)
            for start, a in zip(starts, arrays, strict=True)
        ]

    def download(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Where the tensors will be on the host after `wait`, until the slot is released."""
        starts, size = _layout([t.nbytes for t in tensors])
        if size > len(self._down):
            self._down = self._bytes(size)
        copies = []
        for start, tensor in zip(starts, tensors, strict=True):
            copy = self._down[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies.append(copy.copy_(tensor, non_blocking=True))
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))
        return copies

    def wait(self) -> None:
        """Return when what was downloaded has arrived; what was uploaded has been read then."""
        if self._event is not None:
            self._event.synchronize()

    def _bytes(self, size: int) -> Tensor:
        # Not inference tensors, which could not be written to outside of inference mode later.
        with torch.inference_mode(mode=False):
            pinned = self._device.type == "cuda"
            return torch.empty(_roomy(size), dtype=torch.uint8, pin_memory=pinned)

    def _bytes_on_device(self, size: int) -> Tensor:
        with torch.inference_mode(mode=False):
            return torch.empty(_roomy(size), dtype=torch.uint8, device=self._device)


class Staging:
    """The slots of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Slot] = []

    def take(self) -> Slot:
        """A slot that no step under way uses. One that is never released is simply lost."""
        return self._free.pop() if self._free else Slot(self.device)

    def release(self, slot: Slot) -> None:
        """Give a slot back after its `wait`, when its results have been read."""
        self._free.append(slot)


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes in bytes begin, and the end of the last."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _roomy(size: int) -> int:
    """The next power of two: allocating pinned memory may wait for the device, so seldom."""
    return 1 << (size - 1).bit_length()
