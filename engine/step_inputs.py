"""A batch as the packed inputs of a step.

Everything is computed with numpy over whole batches, into one buffer that is copied at once. Each
request keeps a row of persistent tables of its blocks, one per group of layers, to which only new
blocks are appended, so that a decode step of many long sequences does not rewrite what the last one
wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from engine.batch import Batch, ScheduledSequence
from engine.graph_sizes import DecodeShape
from engine.packed_step import StepArrays, StepBuffer, StepHeader, StepTensors
from engine.request import Request

_Int32: TypeAlias = NDArray[np.int32]
_Int64: TypeAlias = NDArray[np.int64]

# On a GPU block tables are multiples of so many blocks wide: kernels are compiled once more for
# strides that 16 does not divide.
TABLE_MULTIPLE = 16


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
        self._on_cpu = device.type == "cpu"
        self._multiple = 1 if self._on_cpu else TABLE_MULTIPLE
        self._max_blocks = table_width(max_model_len, block_size, self._multiple)
        self._num_groups = num_groups
        # [group, row, block]
        self._tables: _Int32 = np.zeros((num_groups, 16, self._max_blocks), dtype=np.int32)
        self._rows: dict[str, _Row] = {}
        self._free: list[int] = list(range(16))
        self._buffers = StepBuffer(device), StepBuffer(device)
        self._turn = 0

    def prepare(self, batch: Batch) -> StepTensors:
        """The tensors of a step on the device."""
        header, buffer = self.pack(batch)
        return buffer.tensors(header)

    def pack(
        self, batch: Batch, padded_to: DecodeShape | None = None
    ) -> tuple[StepHeader, StepBuffer]:
        """A step's header and the buffer that it was written to.

        The next step is written to another one, as this one's copy may still be under way.

        Args:
            batch: the step.
            padded_to: what a step of decodes which all sample is to be padded to; sequences that
                are added have a context of 0, and tokens are stored nowhere.
        """
        sequences = batch.sequences
        count = len(sequences)
        rows = self._table_rows(batch)
        token_ids: list[int] = []
        for s in sequences:
            if s.num_tokens == 1:
                token_ids.append(s.request.token_ids[s.start])
            elif s.draft is None:
                token_ids += s.request.token_ids[s.start : s.start + s.num_tokens]
            else:
                token_ids += (s.request.token_ids[s.start], *s.draft.token_ids)
        verified = [i for i in range(batch.num_decodes) if sequences[i].draft is not None]
        context_lens = [s.start + s.num_tokens for s in sequences]
        num_tokens = len(token_ids)
        sampled = sampled_tokens(sequences, num_tokens)
        num_samples = len(sampled)
        num_decodes, longest = self._decodes(batch, verified)
        header = StepHeader(
            num_tokens=num_tokens,
            num_sequences=count,
            num_decodes=num_decodes,
            decode_query_len=longest,
            num_samples=num_samples,
            table_width=table_width(max(context_lens), self._block_size, self._multiple),
            num_groups=self._num_groups,
            has_trees=int(any(_is_tree(sequences[i]) for i in verified)),
        )
        if padded_to is not None:
            header = _padded(header, padded_to)
        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        step = buffer.arrays(header)
        step.token_ids[:num_tokens] = token_ids
        contexts = step.context_lens[:count]
        contexts[:] = context_lens
        if num_tokens == count:
            places, table_row = contexts - 1, rows
            step.query_start[: count + 1] = np.arange(count + 1)
        else:
            lengths = np.array([s.num_tokens for s in sequences])
            ends = lengths.cumsum()
            # Place of a token: its index in the step, moved to where its sequence ends.
            places = np.arange(num_tokens) + np.repeat(contexts - ends, lengths)
            table_row = np.repeat(rows, lengths)
            step.query_start[0] = 0
            step.query_start[1 : count + 1] = ends
        step.last[:num_samples] = sampled
        step.positions[:num_tokens] = places
        block, offset = np.divmod(places, self._block_size)
        if step.trees is not None:
            step.trees[:] = -1
            for i in verified:
                _write_tree(sequences[i], int(step.query_start[i]), step.positions, step.trees)
        for table, packed, slots in zip(self._tables, step.tables, step.slots, strict=True):
            packed[:count] = table[rows, : header.table_width]
            slots[:num_tokens] = (
                table[table_row, block].astype(np.int64) * self._block_size + offset
            )
            packed[count:], slots[num_tokens:] = 0, -1
        if padded_to is not None:
            _write_padding(step, count, num_tokens, padded_to)
        return header, buffer

    def _decodes(self, batch: Batch, verified: list[int]) -> tuple[int, int]:
        """How many sequences attention takes for decodes, and the most new tokens these have."""
        if not verified:
            return batch.num_decodes, 1
        if self._on_cpu:
            # Only single tokens make a batch there; they stand first.
            return verified[0], 1
        return batch.num_decodes, max(batch.sequences[i].num_tokens for i in verified)

    def _table_rows(self, batch: Batch) -> NDArray[np.int64]:
        """The tables' row of each sequence, with all of its blocks written."""
        rows = np.empty(len(batch.sequences), dtype=np.int64)
        if len(self._rows) + len(batch.sequences) > self._tables.shape[1]:
            self._make_room(batch)
        known = self._rows
        num_decodes = batch.num_decodes
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
            if i < num_decodes:
                # Blocks for drafted tokens may have been given back and others taken since.
                sure = sequence.start // self._block_size + 1
                for group, count in enumerate(written):
                    if count > sure:
                        written[group] = sure
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


def sampled_tokens(sequences: Sequence[ScheduledSequence], num_tokens: int) -> NDArray[np.int64]:
    """The tokens of a step after which one is chosen, as indices into its `num_tokens`.

    Of a sequence that samples that is the last; where tokens were drafted, it and all of these.
    """
    if num_tokens == len(sequences):
        if all(s.samples for s in sequences):
            return np.arange(num_tokens)
        return np.flatnonzero([s.samples for s in sequences])
    lengths = np.array([s.num_tokens for s in sequences])
    ends = lengths.cumsum()
    if all(s.draft is None for s in sequences):
        return (ends - 1)[[s.samples for s in sequences]]
    rows = [
        np.arange(end - 1 - s.num_drafted, end)
        for s, end in zip(sequences, ends.tolist(), strict=True)
        if s.samples
    ]
    return np.concatenate(rows)


def _padded(header: StepHeader, shape: DecodeShape) -> StepHeader:
    return header._replace(
        num_tokens=shape.num_tokens,
        num_sequences=shape.sequences,
        num_decodes=shape.sequences,
        decode_query_len=shape.new_tokens,
        num_samples=shape.num_tokens,
        has_trees=int(shape.has_trees),
    )


def _write_padding(step: StepArrays, count: int, num_tokens: int, shape: DecodeShape) -> None:
    """The tokens behind a step's own, and the sequences behind its `count`."""
    step.token_ids[num_tokens:] = step.positions[num_tokens:] = 0
    step.last[num_tokens:] = np.arange(num_tokens, shape.num_tokens)
    step.context_lens[count:] = 0
    step.query_start[count + 1 :] = num_tokens
    if shape.new_tokens == 1:
        step.query_start[count + 1 :] += np.arange(1, shape.sequences - count + 1, dtype=np.int32)


def _is_tree(sequence: ScheduledSequence) -> bool:
    """Whether tokens were drafted for one place that must not see each other."""
    parents = () if sequence.draft is None else sequence.draft.parents or ()
    return any(parent != index - 1 for index, parent in enumerate(parents))


def _write_tree(sequence: ScheduledSequence, first: int, positions: _Int64, trees: _Int64) -> None:
    """Where a sequence's drafted tokens stand, and which of its tokens they see.

    Its tokens begin at index `first` of the step: the last token of the request, then the drafted.
    """
    draft = sequence.draft
    if draft is None or draft.parents is None:
        return
    seen = [1]
    for index, parent in enumerate(draft.parents):
        seen.append(seen[parent + 1] | 1 << (index + 1))
    # As signed numbers: bit 63 of the last of 64 tokens is the sign.
    trees[first : first + len(seen)] = np.array(seen, dtype=np.uint64).view(np.int64)
    positions[first + 1 : first + len(seen)] = sequence.start + np.array(draft.depths())


def table_width(num_tokens: int, block_size: int, multiple: int) -> int:
    """Blocks of `num_tokens` tokens, rounded up to a multiple."""
    return -(-num_tokens // (block_size * multiple)) * multiple
