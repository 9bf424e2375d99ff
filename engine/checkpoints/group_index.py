"""Which group each column of a weight belongs to, where a file says so."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoints.safetensors_files import SafetensorsFiles


def read_group_index(
    files: SafetensorsFiles, name: str, columns: int, groups: int, group_size: int
) -> Tensor | None:
    """int64 [K], each below `groups`; None if there is no such tensor, or columns lie in order.

    Raises:
        ModelError: of another shape or dtype, or it names a group that there is not.
    """
    if name not in files:
        return None
    stored = files.raw(name, (torch.int32, torch.int64), (columns,)).long()
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high >= groups:
        raise files.problem(
            name, f"names groups from {low} to {high}; the layer has the groups 0 to {groups - 1}"
        )
    return None if torch.equal(stored, torch.arange(columns) // group_size) else stored
