"""A step's inputs as a header and one buffer: one copy to a device, one broadcast to the ranks.

The buffer is int64. Its first section has T token ids, T positions, the slots of the T tokens for
each group of layers, the trees of the T tokens if there are any, and the indices of the tokens
after which one is chosen. Its second section, of int32, has S context lengths, S + 1 starts of the
sequences' tokens, and S block tables for each group. Each part begins at a multiple of 16 bytes,
for which kernels are specialised. The tables come last, so that all else lies at the same place in
all steps of one shape.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.metadata import AttentionMetadata

_Int64: TypeAlias = NDArray[np.int64]
_Int32: TypeAlias = NDArray[np.int32]


class StepHeader(NamedTuple):
    """The shape of a step, from which every place in its buffer follows.

    The first `num_decodes` sequences have at most `decode_query_len` new tokens each. After
    `num_samples` of the tokens one is chosen. A block table has `table_width` blocks; there are
    `num_groups` of them a sequence. `has_trees` says whether tokens hide others of their sequence
    from each other (`AttentionMetadata.trees`).
    """

    num_tokens: int
    num_sequences: int
    num_decodes: int
    decode_query_len: int
    num_samples: int
    table_width: int
    num_groups: int
    has_trees: int = 0

    @property
    def num_long_words(self) -> int:
        """Words of 8 bytes of the first section."""
        rows = 2 + self.num_groups + self.has_trees
        return rows * _even(self.num_tokens) + _even(self.num_samples)

    @property
    def num_fixed_words(self) -> int:
        """Words of 8 bytes before the block tables."""
        lengths = _even(-(-self.num_sequences // 2)) + _even(self.num_sequences // 2 + 1)
        return self.num_long_words + lengths

    @property
    def table_words(self) -> int:
        """Words of 8 bytes of one group's block tables."""
        return _even(-(-self.num_sequences * self.table_width // 2))

    @property
    def num_words(self) -> int:
        """Words of 8 bytes of the whole buffer."""
        return self.num_fixed_words + self.num_groups * self.table_words


class StepArrays(NamedTuple):
    """Views into a buffer on the host, to be written: slots [T] and tables [S, width] by group.

    `trees` [T] is None where the header has none.
    """

    token_ids: _Int64
    positions: _Int64
    slots: list[_Int64]
    trees: _Int64 | None
    last: _Int64
    context_lens: _Int32
    query_start: _Int32
    tables: list[_Int32]


class StepTensors(NamedTuple):
    """What the model's forward pass takes: views into a buffer on its device.

    token_ids and positions int64 [T]; last int64 [samples], the tokens after which one is chosen,
    as indices into the T; a layout for each group of layers.
    """

    token_ids: Tensor
    positions: Tensor
    last: Tensor
    layouts: list[AttentionMetadata]


class StepBuffer:
    """Memory for one step's inputs, on the host and on a device; grows, and is used again.

    Write a step through `arrays`, or into `words` as one piece, then take its `tensors`. Most steps
    have the shape of the step before, so views are kept from one to the next.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._header: StepHeader | None = None
        self._reserve(1024)

    def arrays(self, header: StepHeader) -> StepArrays:
        """Views through which to write a step of this shape.

        Everything must be written: a step before may have left anything.
        """
        self._take_shape(header)
        return self._arrays

    def words(self, header: StepHeader) -> Tensor:
        """A step of this shape as one tensor on the host, int64 [header.num_words]."""
        self._take_shape(header)
        return self._host[: header.num_words]

    def device_words(self, header: StepHeader) -> Tensor:
        """The step that was written as one tensor on the device.

        Does not wait for the device, so the copy may be under way: the host's memory must not be
        written until something after it has been waited for.
        """
        self._take_shape(header)
        count = header.num_words
        if self._words is not self._host:
            self._words[:count].copy_(self._host[:count], non_blocking=True)
        return self._words[:count]

    def tensors(self, header: StepHeader) -> StepTensors:
        """The step that was written, on the device; they hold until the next step is written.

        Does not wait for the device, see `device_words`.
        """
        if self._words is not self._host:
            self.device_words(header)
        else:
            self._take_shape(header)
        layouts = relisted(self._tensors.layouts, *host_lengths(header, self._arrays))
        return self._tensors._replace(layouts=layouts)

    def _take_shape(self, header: StepHeader) -> None:
        if header == self._header:
            return
        if header.num_words > len(self._host):
            self._reserve(2 * header.num_words)
        self._arrays = step_arrays(header, self._host)
        self._tensors = step_tensors(header, self._words)
        self._header = header

    def _reserve(self, num_words: int) -> None:
        device = self._device
        # Not inference tensors, which could not be written to outside of inference mode later.
        with torch.inference_mode(mode=False):
            pinned = device.type == "cuda"
            self._host = torch.zeros(num_words, dtype=torch.int64, pin_memory=pinned)
            self._words = self._host
            if device.type != "cpu":
                self._words = torch.zeros(num_words, dtype=torch.int64, device=device)


def step_tensors(header: StepHeader, words: Tensor) -> StepTensors:
    """Views into a step's words, int64 [header.num_words] or more; the layouts' lists are empty."""
    tokens, sequences, groups = header.num_tokens, header.num_sequences, header.num_groups
    span = _even(tokens)
    lengths = header.num_fixed_words - header.num_long_words
    sizes = [span] * (2 + groups + header.has_trees) + [_even(header.num_samples), lengths]
    sizes += [header.table_words] * groups
    token_ids, positions, *parts = words[: header.num_words].split_with_sizes(sizes)
    slots, parts = parts[:groups], parts[groups:]
    trees = parts.pop(0)[:tokens] if header.has_trees else None
    last, rest, *tables = parts
    halves = rest.view(torch.int32)
    starts = _starts(sequences)
    context_lens = halves[:sequences]
    query_start = halves[starts : starts + sequences + 1]
    width = header.table_width
    layouts = [
        AttentionMetadata(
            table.view(torch.int32)[: sequences * width].view(sequences, width),
            context_lens,
            query_start,
            group_slots[:tokens],
            [],
            [],
            header.num_decodes,
            header.decode_query_len,
            trees,
        )
        for table, group_slots in zip(tables, slots, strict=True)
    ]
    return StepTensors(token_ids[:tokens], positions[:tokens], last[: header.num_samples], layouts)


def step_arrays(header: StepHeader, host: Tensor) -> StepArrays:
    """Views into a step's words on the host, int64 [at least header.num_words]."""
    tensors = step_tensors(header, host)
    layouts = tensors.layouts
    return StepArrays(
        tensors.token_ids.numpy(),
        tensors.positions.numpy(),
        [layout.slots.numpy() for layout in layouts],
        None if layouts[0].trees is None else layouts[0].trees.numpy(),
        tensors.last.numpy(),
        layouts[0].context_lens.numpy(),
        layouts[0].query_start.numpy(),
        [layout.block_tables.numpy() for layout in layouts],
    )


def host_lengths(header: StepHeader, arrays: StepArrays) -> tuple[list[int], list[int]]:
    """New tokens and context of each sequence."""
    contexts: list[int] = arrays.context_lens.tolist()
    if header.num_tokens == header.num_sequences:
        return [1] * header.num_sequences, contexts
    queries: list[int] = np.diff(arrays.query_start).tolist()
    return queries, contexts


def relisted(
    layouts: list[AttentionMetadata], query_lens: list[int], context_lens: list[int]
) -> list[AttentionMetadata]:
    """The same layouts with other lengths on the host; the tensors are shared."""
    return [
        AttentionMetadata(
            layout.block_tables,
            layout.context_lens,
            layout.query_start,
            layout.slots,
            query_lens,
            context_lens,
            layout.num_decodes,
            layout.decode_query_len,
            layout.trees,
        )
        for layout in layouts
    ]


def _starts(num_sequences: int) -> int:
    """Where the starts of the sequences lie after their context lengths, in half words."""
    return 2 * _even(-(-num_sequences // 2))


def _even(count: int) -> int:
    return count + (count & 1)
