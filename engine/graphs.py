"""Decode steps captured as CUDA graphs, at a ladder of batch sizes and of drafted tokens.

A decode step of a small batch takes the device less time than the host needs to launch its kernels
one by one. A graph is launched at once; it has fixed shapes and addresses. So a step is padded to
the next shape of the ladder, and its inputs are copied to the memory that the graph reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor

from engine.errors import EnvironmentLacks
from engine.graph_sizes import DecodeShape
from engine.packed_step import StepBuffer, StepHeader, StepTensors, step_arrays, step_tensors


class NotCapturable(Exception):
    """A step has an operation that a graph cannot hold; says which."""


class Capture(Protocol):
    """What makes graphs: CUDA, or a test that runs the function again instead."""

    def rehearse(self, step: Callable[[], None]) -> None:
        """Run the step as it will be captured, until nothing is left to be compiled or set up.

        Raises:
            NotCapturable: the step waits for the device.
            torch.OutOfMemoryError: it does not fit.
        """
        ...

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What launches the step again; capturing may or may not run it.

        Raises:
            NotCapturable: CUDA refuses.
            torch.OutOfMemoryError: it does not fit.
        """
        ...


class Scores(NamedTuple):
    """What a step says of the next tokens of the sequences that sample.

    logits [samples, vocabulary] and hidden [samples, hidden], the states after the final norm that
    they were made of, valid until the next step; `likeliest` int64 [samples], the logits' first
    maxima, where the step has them already.
    """

    logits: Tensor
    hidden: Tensor
    likeliest: Tensor | None = None


class DecodeGraphs:
    """Captured decode steps over one KV cache.

    Args:
        forward: computes the scores of a step; run for capturing on padding alone,
            which must leave the KV cache as it is.
        shapes: what to capture.
        num_groups: block tables of a sequence.
        table_width: blocks of the widest step.
        device: where the step's inputs lie.
        capture: makes graphs.
        leave_out: whether shapes that do not fit the memory are left out.

    `shapes` of the object are those that were captured, ascending: fewer where memory is short.
    `sizes` are the sequences of those of one new token.

    Raises:
        NotCapturable: a step must run as it is.
        EnvironmentLacks: no graph fits the memory.
    """

    def __init__(
        self,
        forward: Callable[[StepTensors], Scores],
        shapes: Sequence[DecodeShape],
        num_groups: int,
        table_width: int,
        device: torch.device,
        capture: Capture,
        leave_out: bool = True,
    ) -> None:
        self._leave_out = leave_out
        self._forward = forward
        self._num_groups = num_groups
        self._device = device
        self._replays: dict[DecodeShape, Callable[[], None]] = {}
        most = max(shape.sequences for shape in shapes)
        self._most_tokens = max(shape.num_tokens for shape in shapes)
        try:
            words = max(self._header(shape).num_fixed_words for shape in shapes)
            self._words = torch.zeros(words, dtype=torch.int64, device=device)
            self._tables = torch.zeros(
                (num_groups, most, table_width), dtype=torch.int32, device=device
            )
            self._likeliest = torch.zeros(self._most_tokens, dtype=torch.int64, device=device)
        except torch.OutOfMemoryError:
            raise _no_room(most) from None
        self._logits: Tensor | None = None
        self._hidden: Tensor | None = None
        # The largest first: the others then find room in its memory.
        for shape in sorted(shapes, key=lambda shape: (shape.num_tokens, shape), reverse=True):
            self._add(shape, capture)
        self.shapes = sorted(self._replays)
        self._by_length = sorted(self.shapes, key=lambda shape: (shape.new_tokens, shape))
        self.sizes = [shape.sequences for shape in self.shapes if shape.new_tokens == 1]
        if not self.sizes:
            raise _no_room(min(shapes).sequences)

    def shape_for(self, count: int, new_tokens: int = 1) -> DecodeShape | None:
        """The captured shape that holds `count` sequences of at most so many new tokens."""
        for shape in self._by_length:
            if shape.new_tokens >= new_tokens and shape.sequences >= count:
                return shape
        return None

    def holds(self, header: StepHeader) -> bool:
        """Whether a step was padded to a captured shape."""
        shape = _shape_of(header)
        return (
            shape in self._replays
            and header.num_decodes == shape.sequences
            and header.num_tokens == header.num_samples == shape.num_tokens
        )

    def run(self, header: StepHeader, buffer: StepBuffer) -> Scores:
        """Compute a step that was padded to a captured shape.

        The results hold until the next `run`.
        """
        size, count = header.num_sequences, header.num_tokens
        words = buffer.device_words(header)
        fixed, width = header.num_fixed_words, header.table_width
        self._words[:fixed].copy_(words[:fixed])
        tables = words[fixed:].view(torch.int32)
        shape = (self._num_groups, size, width)
        tables = tables.as_strided(
            shape, (2 * header.table_words, width, 1), tables.storage_offset()
        )
        # Blocks beyond the width stay from steps before; no context reaches them.
        self._tables[:, :size, :width].copy_(tables)
        self._replays[_shape_of(header)]()
        assert self._logits is not None
        assert self._hidden is not None
        return Scores(self._logits[:count], self._hidden[:count], self._likeliest[:count])

    def _header(self, shape: DecodeShape) -> StepHeader:
        """The shape of a captured step's inputs; its tables lie elsewhere."""
        size, tokens, trees = shape.sequences, shape.num_tokens, int(shape.has_trees)
        return StepHeader(tokens, size, size, shape.new_tokens, tokens, 0, self._num_groups, trees)

    def _add(self, shape: DecodeShape, capture: Capture) -> None:
        step = partial(self._step, shape.num_tokens, self._inputs(shape))
        try:
            self._write_padding(shape)
            capture.rehearse(step)
            self._replays[shape] = capture.capture(step)
        except torch.OutOfMemoryError:
            if not self._leave_out:
                raise _no_room(shape.sequences) from None

    def _step(self, count: int, inputs: StepTensors) -> None:
        logits, hidden, _ = self._forward(inputs)
        if self._logits is None or self._hidden is None:
            # Made by the first rehearsal, of the largest shape, so they are part of no graph.
            self._logits = logits.new_empty(self._most_tokens, logits.shape[1])
            self._hidden = hidden.new_empty(self._most_tokens, hidden.shape[1])
        self._logits[:count].copy_(logits)
        self._hidden[:count].copy_(hidden)
        torch.argmax(logits, dim=-1, out=self._likeliest[:count])

    def _inputs(self, shape: DecodeShape) -> StepTensors:
        size = shape.sequences
        step = step_tensors(self._header(shape), self._words)
        for group, layout in enumerate(step.layouts):
            layout.block_tables = self._tables[group, :size]
            # What stands there at capture would be in force for ever.
            layout.query_lens = layout.context_lens_list = cast("list[int]", _OnDeviceAlone(size))
        return step

    def _write_padding(self, shape: DecodeShape) -> None:
        """Inputs of which nothing is stored and nothing seen: contexts of 0 and slots of -1."""
        header = self._header(shape)
        words = torch.zeros(header.num_fixed_words, dtype=torch.int64)
        arrays = step_arrays(header, words)
        for slots in arrays.slots:
            slots[:] = -1
        if arrays.trees is not None:
            arrays.trees[:] = -1
        if shape.new_tokens == 1:
            arrays.query_start[:] = range(shape.sequences + 1)
        arrays.last[:] = range(shape.num_tokens)
        self._words[: len(words)].copy_(words)


def _shape_of(header: StepHeader) -> DecodeShape:
    return DecodeShape(header.num_sequences, header.decode_query_len, bool(header.has_trees))


class _OnDeviceAlone:
    """Stands for lengths that the host must not read: a replayed step has others.

    How many there are is fixed by capturing, and may be read.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotCapturable("attention reads lengths from the host")

    __iter__ = __getitem__ = __contains__ = __eq__ = __array__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def _no_room(sequences: int) -> EnvironmentLacks:
    return EnvironmentLacks(
        f"no memory for a CUDA graph of a decode step of {sequences} sequences: lower "
        "gpu_memory_utilization, kv_cache_memory_bytes or max_num_seqs, or set cuda_graphs=false"
    )
