"""A batch as the tensors that the model's forward pass takes.

Everything is computed with numpy over whole batches. Each request keeps a row of persistent tables
of its blocks, one per group of layers, to which only new blocks are appended, so that a decode step
of many long sequences does not rewrite what the last one wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.request import Request
from kernels.metadata import AttentionMetadata

_Int32: TypeAlias = NDArray[np.int32]


@dataclass(slots=True)
class _Row:
    """Which request a row of the tables belongs to and how many blocks of each are written."""

    request: Request
    index: int
    written: list[int]
    num_preemptions: int


class StepInputs:
    """Prepares the inputs of steps; one per KV cache.

    `max_model_len` in tokens bounds a request's blocks in each of its `num_groups` block tables.
    """

    def __init__(
        self, block_size: int, max_model_len: int, device: torch.device, num_groups: int = 1
    ) -> None:
        self._block_size = block_size
        self._max_blocks = -(-max_model_len // block_size)
        self._device = device
        self._num_groups = num_groups
        # [group, row, block]
        self._tables: _Int32 = np.zeros((num_groups, 16, self._max_blocks), dtype=np.int32)
        self._rows: dict[str, _Row] = {}
        self._free: list[int] = list(range(16))

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[AttentionMetadata]]:
        """Token ids and positions, int64 [T]; the sampling sequences' last tokens, int64; layouts.

        The last tokens are indices into the T tokens of the step. There is one layout for each
        group of layers; they differ in their blocks only.
        """
        sequences = batch.sequences
        block_size = self._block_size
        rows = self._table_rows(batch)
        token_ids: list[int] = []
        for s in sequences:
            if s.num_tokens == 1:
                token_ids.append(s.request.token_ids[s.start])
            else:
                token_ids += s.request.token_ids[s.start : s.start + s.num_tokens]
        query_lens = [s.num_tokens for s in sequences]
        context_lens = [s.start + s.num_tokens for s in sequences]
        lengths = np.array(query_lens, dtype=np.int64)
        contexts = np.array(context_lens, dtype=np.int64)
        ends = lengths.cumsum()
        if len(token_ids) == len(sequences):
            positions, table_row = contexts - 1, rows
        else:
            # Position of a token: its index in the step, moved to where its sequence ends.
            positions = np.arange(len(token_ids)) + np.repeat(contexts - ends, lengths)
            table_row = np.repeat(rows, lengths)
        block, offset = np.divmod(positions, block_size)
        width = -(-max(context_lens) // block_size)
        query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
        query_start[1:] = ends
        last = ends - 1
        if not all(s.samples for s in sequences):
            last = last[[s.samples for s in sequences]]
        context_tensor = self._tensor(contexts.astype(np.int32))
        start_tensor = self._tensor(query_start)
        layouts = [
            AttentionMetadata(
                block_tables=self._tensor(table[rows, :width]),
                context_lens=context_tensor,
                query_start=start_tensor,
                slots=self._tensor(table[table_row, block].astype(np.int64) * block_size + offset),
                query_lens=query_lens,
                context_lens_list=context_lens,
                num_decodes=batch.num_decodes,
            )
            for table in self._tables
        ]
        ids = self._tensor(np.array(token_ids, dtype=np.int64))
        return ids, self._tensor(positions), self._tensor(last), layouts

    def _table_rows(self, batch: Batch) -> NDArray[np.int64]:
        """The tables' row of each sequence, with all of its blocks written."""
        rows = np.empty(len(batch.sequences), dtype=np.int64)
        if len(self._rows) + len(batch.sequences) > self._tables.shape[1]:
            self._make_room(batch)
        known = self._rows
        for i, sequence in enumerate(batch.sequences):
            request = sequence.request
            row = known.get(request.request_id)
            if row is None:
                row = known[request.request_id] = _Row(
                    request, self._free.pop(), [0] * self._num_groups, request.num_preemptions
                )
            elif row.request is not request or row.num_preemptions != request.num_preemptions:
                row.request, row.num_preemptions = request, request.num_preemptions
                row.written = [0] * self._num_groups
            written = row.written
            for group, blocks in enumerate(request.tables.groups):
                if written[group] < len(blocks):
                    new = blocks[written[group] :]
                    self._tables[group, row.index, written[group] : len(blocks)] = new
                    written[group] = len(blocks)
            rows[i] = row.index
        return rows

    def _make_room(self, batch: Batch) -> None:
        """Forget requests that are not in the batch, and grow the table to twice the batch.

        A request that is forgotten and comes back is written again.
        """
        present = {s.request.request_id for s in batch.sequences}
        for request_id in [r for r in self._rows if r not in present]:
            self._free.append(self._rows.pop(request_id).index)
        wanted = 2 * len(batch.sequences)
        present_rows = self._tables.shape[1]
        if wanted > present_rows:
            self._free += range(present_rows, wanted)
            grown = np.zeros((self._num_groups, wanted, self._max_blocks), dtype=np.int32)
            grown[:, :present_rows] = self._tables
            self._tables = grown

    def _tensor(self, array: NDArray[np.int64] | _Int32) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)
