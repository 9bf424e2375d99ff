"""Decode steps captured as CUDA graphs, at a ladder of batch sizes.

A decode step of a small batch takes the device less time than the host needs to launch its kernels
one by one. A graph is launched at once; it has fixed shapes and addresses. So a step is padded to
the next size of the ladder, and its inputs are copied to the memory that the graph reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor

from engine.errors import EnvironmentLacks
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
    """Captured decode steps over one KV cache, of one new token a sequence.

    Args:
        forward: computes the scores of a step; run for capturing on padding alone,
            which must leave the KV cache as it is.
        sizes: batch sizes to capture.
        num_groups: block tables of a sequence.
        table_width: blocks of the widest step.
        device: where the step's inputs lie.
        capture: makes graphs.
        leave_out: whether sizes that do not fit the memory are left out.

    `sizes` of the object are those that were captured, ascending: fewer where memory is short.

    Raises:
        NotCapturable: a step must run as it is.
        EnvironmentLacks: no graph fits the memory.
    """

    def __init__(
        self,
        forward: Callable[[StepTensors], Scores],
        sizes: Sequence[int],
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
        self._replays: dict[int, Callable[[], None]] = {}
        most = max(sizes)
        try:
            words = self._header(most).num_fixed_words
            self._words = torch.zeros(words, dtype=torch.int64, device=device)
            self._tables = torch.zeros(
                (num_groups, most, table_width), dtype=torch.int32, device=device
            )
            self._likeliest = torch.zeros(most, dtype=torch.int64, device=device)
        except torch.OutOfMemoryError:
            raise _no_room(most) from None
        self._logits: Tensor | None = None
        self._hidden: Tensor | None = None
        # The largest first: the others then find room in its memory.
        for size in sorted(sizes, reverse=True):
            self._add(size, capture)
        self.sizes = sorted(self._replays)
        if not self.sizes:
            raise _no_room(min(sizes))

    def size_for(self, count: int) -> int:
        """The captured size that holds `count` sequences; 0 if none does."""
        place = bisect_left(self.sizes, count)
        return self.sizes[place] if place < len(self.sizes) else 0

    def run(self, header: StepHeader, buffer: StepBuffer) -> Scores:
        """Compute a step that was padded to a captured size.

        The results hold until the next `run`.
        """
        size = header.num_sequences
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
        self._replays[size]()
        assert self._logits is not None
        assert self._hidden is not None
        return Scores(self._logits[:size], self._hidden[:size], self._likeliest[:size])

    def _header(self, size: int) -> StepHeader:
        """The shape of a captured step; its tables lie elsewhere."""
        return StepHeader(size, size, size, 1, size, 0, self._num_groups)

    def _add(self, size: int, capture: Capture) -> None:
        step = partial(self._step, size, self._inputs(size))
        try:
            self._write_padding(size)
            capture.rehearse(step)
            self._replays[size] = capture.capture(step)
        except torch.OutOfMemoryError:
            if not self._leave_out:
                raise _no_room(size) from None

    def _step(self, size: int, inputs: StepTensors) -> None:
        logits, hidden, _ = self._forward(inputs)
        if self._logits is None or self._hidden is None:
            # Made by the first rehearsal, of the largest size, so they are part of no graph.
            most = self._tables.shape[1]
            self._logits = logits.new_empty(most, logits.shape[1])
            self._hidden = hidden.new_empty(most, hidden.shape[1])
        self._logits[:size].copy_(logits)
        self._hidden[:size].copy_(hidden)
        torch.argmax(logits, dim=-1, out=self._likeliest[:size])

    def _inputs(self, size: int) -> StepTensors:
        step = step_tensors(self._header(size), self._words)
        for group, layout in enumerate(step.layouts):
            layout.block_tables = self._tables[group, :size]
            # What stands there at capture would be in force for ever.
            layout.query_lens = layout.context_lens_list = cast("list[int]", _OnDeviceAlone(size))
        return step

    def _write_padding(self, size: int) -> None:
        """Inputs of which nothing is stored and nothing seen: contexts of 0 and slots of -1."""
        header = self._header(size)
        words = torch.zeros(header.num_fixed_words, dtype=torch.int64)
        arrays = step_arrays(header, words)
        for slots in arrays.slots:
            slots[:] = -1
        arrays.query_start[:] = range(size + 1)
        arrays.last[:] = range(size)
        self._words[: len(words)].copy_(words)


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
