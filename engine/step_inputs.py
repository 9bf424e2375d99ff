"""A batch as the tensors that the model's forward pass takes.

Everything is computed with numpy over whole batches. Each request keeps a row of a persistent table
of its blocks, to which only new blocks are appended, so that a decode step of many long sequences
does not rewrite what the last one wrote.
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
    """Which request a row of the table belongs to and how many of its blocks are written."""

    request: Request
    index: int
    written: int
    num_preemptions: int


class StepInputs:
    """Prepares the inputs of steps; one per KV cache.

    `max_model_len` in tokens bounds a request's blocks.
    """

    def __init__(self, block_size: int, max_model_len: int, device: torch.device) -> None:
        self._block_size = block_size
        self._max_blocks = -(-max_model_len // block_size)
        self._device = device
        self._table: _Int32 = np.zeros((16, self._max_blocks), dtype=np.int32)
        self._rows: dict[str, _Row] = {}
        self._free: list[int] = list(range(16))

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
        """Token ids and positions, int64 [T]; the sampling sequences' last tokens, int64; layout.

        The last tokens are indices into the T tokens of the step.
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
        slots = self._table[table_row, block].astype(np.int64) * block_size + offset
        width = -(-max(context_lens) // block_size)
        query_start = np.zeros(len(sequences) + 1, dtype=np.int32)
        query_start[1:] = ends
        last = ends - 1
        if not all(s.samples for s in sequences):
            last = last[[s.samples for s in sequences]]
        metadata = AttentionMetadata(
            block_tables=self._tensor(self._table[rows, :width]),
            context_lens=self._tensor(contexts.astype(np.int32)),
            query_start=self._tensor(query_start),
            slots=self._tensor(slots),
            query_lens=query_lens,
            context_lens_list=context_lens,
            num_decodes=batch.num_decodes,
        )
        ids = self._tensor(np.array(token_ids, dtype=np.int64))
        return ids, self._tensor(positions), self._tensor(last), metadata

    def _table_rows(self, batch: Batch) -> NDArray[np.int64]:
        """The table's row of each sequence, with all of its blocks written."""
        rows = np.empty(len(batch.sequences), dtype=np.int64)
        if len(self._rows) + len(batch.sequences) > len(self._table):
            self._make_room(batch)
        known = self._rows
        for i, sequence in enumerate(batch.sequences):
            request = sequence.request
            blocks = request.block_table
            row = known.get(request.request_id)
            if row is None:
                row = known[request.request_id] = _Row(
                    request, self._free.pop(), 0, request.num_preemptions
                )
            elif row.request is not request or row.num_preemptions != request.num_preemptions:
                row.request, row.num_preemptions = request, request.num_preemptions
                row.written = 0
            if row.written < len(blocks):
                self._table[row.index, row.written : len(blocks)] = blocks[row.written :]
                row.written = len(blocks)
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
        if wanted > len(self._table):
            self._free += range(len(self._table), wanted)
            grown = np.zeros((wanted, self._max_blocks), dtype=np.int32)
            grown[: len(self._table)] = self._table
            self._table = grown

    def _tensor(self, array: NDArray[np.int64] | _Int32) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)
