"""Steps of one shape whose inputs lie in one place: what does not change is not written again.

What a model of a few megabytes computes for one token takes some tens of microseconds; packing a
step anew takes as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from engine.block_tables import BlockTables
from engine.packed_step import StepHeader, step_arrays, step_tensors

Int64s: TypeAlias = NDArray[np.int64]


class ShortStep:
    """The inputs of steps of `count` sequences with `query_len` new tokens each, all of which
    sample.

    `tensors` are what a forward pass takes, on the device, and `words` the step as it is sent to
    other ranks; both stay where they are, so that a step can be recorded. Before a step is written,
    whatever reads the one before must be done.
    """

    def __init__(self, count: int, query_len: int, width: int, device: torch.device) -> None:
        """Block tables of `width` blocks, whose multiple of 16 a GPU's kernels like."""
        self.count, self.query_len, self.width = count, query_len, width
        self.header = StepHeader(
            num_tokens=count * query_len,
            num_sequences=count,
            num_decodes=count if query_len == 1 else 0,
            decode_query_len=1,
            num_samples=count,
            table_width=width,
            num_groups=1,
        )
        on_cpu = device.type == "cpu"
        # Not inference tensors, which could not be written to outside of inference mode later.
        with torch.inference_mode(mode=False):
            self.words = torch.zeros(
                self.header.num_words, dtype=torch.int64, pin_memory=not on_cpu
            )
            self._on_device = self.words if on_cpu else torch.zeros_like(self.words, device=device)
        self.tensors = step_tensors(self.header, self._on_device)
        (self._layout,) = self.tensors.layouts
        self._layout.query_lens = [query_len] * count
        self._arrays = step_arrays(self.header, self.words)
        self._arrays.query_start[:] = np.arange(count + 1) * query_len
        self._arrays.last[:] = np.arange(1, count + 1) * query_len - 1
        self._written: list[tuple[BlockTables | None, int]] = [(None, 0)] * count

    def write_tables(self, tables: Sequence[BlockTables]) -> NDArray[np.int32]:
        """Bring the block tables up to date, and return them, int32 [count, width].

        While a sequence's blocks are given to nobody else they change only by others behind.
        """
        packed = self._arrays.tables[0]
        written = self._written
        for row, table in enumerate(tables):
            owner, count = written[row]
            blocks = table.groups[0]
            if owner is table and count == len(blocks):
                continue
            if owner is not table:
                count = 0
            packed[row, count : len(blocks)] = blocks[count:]
            written[row] = (table, len(blocks))
        return packed

    def write(self, token_ids: Sequence[int] | None, positions: Int64s, slots: Int64s) -> None:
        """Write a step, positions and slots int64 [count, query_len], token ids if known.

        On a GPU, token ids that are not known here are those that `tensors` has once they are
        put there.
        """
        arrays = self._arrays
        if token_ids is not None:
            arrays.token_ids[:] = token_ids
        arrays.positions[:] = positions.reshape(-1)
        arrays.slots[0][:] = slots.reshape(-1)
        np.add(positions[:, -1], 1, out=arrays.context_lens, casting="same_kind")
        self._layout.context_lens_list = arrays.context_lens.tolist()
        if self._on_device is not self.words:
            self._on_device.copy_(self.words, non_blocking=True)
