"""A step packed into one buffer reads back as it was, wherever the buffer came from."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from engine.batch import Batch, ScheduledSequence
from engine.block_tables import BlockTables
from engine.graph_sizes import DecodeShape
from engine.packed_step import StepBuffer, StepHeader, step_tensors
from engine.request import Request, SamplingParams
from engine.step_inputs import StepInputs

CPU = torch.device("cpu")


def decodes(lengths: list[int], groups: int = 1) -> Batch:
    """Decodes at these contexts, whose tables are unlike each other."""
    sequences = []
    for i, length in enumerate(lengths):
        tables = BlockTables([[1 + i + 7 * g + 100 * j for j in range(8)] for g in range(groups)])
        request = Request(f"r{i}", [i + 1] * length, SamplingParams(), 0.0, tables=tables)
        sequences.append(ScheduledSequence(request, length - 1, 1, True))
    return Batch(sequences, len(sequences))


@pytest.mark.parametrize("seed", range(3))
def test_every_part_has_its_own_aligned_place(seed: int) -> None:
    rng = random.Random(seed)
    buffer = StepBuffer(CPU)
    for _ in range(40):
        sequences = rng.randint(1, 70)
        header = StepHeader(
            num_tokens=sequences + rng.choice([0, rng.randint(1, 300)]),
            num_sequences=sequences,
            num_decodes=rng.randint(0, sequences),
            decode_query_len=1,
            num_samples=rng.randint(0, sequences),
            table_width=rng.randint(1, 40),
            num_groups=rng.randint(1, 4),
        )
        arrays = buffer.arrays(header)
        arrays.query_start[:] = torch.linspace(0, header.num_tokens, sequences + 1).int().numpy()
        parts: list[NDArray[Any]] = [arrays.token_ids, arrays.positions, arrays.last]
        parts.append(arrays.context_lens)
        parts += [*arrays.slots, *arrays.tables]
        wanted = [torch.randint(1 << 30, part.shape).to(torch.int32).numpy() for part in parts]
        for part, value in zip(parts, wanted, strict=True):
            part[:] = value
        # As a rank gets it: the words alone, into memory of its own.
        received = step_tensors(header, buffer.words(header).clone())
        ours = buffer.tensors(header)
        for step in (ours, received):
            layouts = step.layouts
            tensors = [step.token_ids, step.positions, step.last, layouts[0].context_lens]
            tensors += [layout.slots for layout in layouts]
            tensors += [layout.block_tables for layout in layouts]
            for tensor, value in zip(tensors, wanted, strict=True):
                assert tensor.tolist() == value.tolist()
                assert tensor.is_contiguous()
                assert tensor.numel() == 0 or tensor.data_ptr() % 16 == 0
            assert layouts[0].query_start.data_ptr() % 16 == 0
        query_start = ours.layouts[0].query_start
        assert ours.layouts[-1].query_lens == query_start.diff().tolist()
        assert ours.layouts[-1].context_lens_list == ours.layouts[0].context_lens.tolist()


def test_padding_is_stored_nowhere_and_sees_nothing() -> None:
    inputs = StepInputs(8, 64, CPU, num_groups=2)
    lengths = [3, 17, 30]
    plain = inputs.prepare(decodes(lengths, 2))
    header, buffer = inputs.pack(decodes(lengths, 2), DecodeShape(8))
    padded = buffer.tensors(header)
    assert (header.num_tokens, header.num_sequences, header.num_decodes) == (8, 8, 8)
    assert header.num_samples == 8
    assert header.table_width == 4
    assert padded.token_ids.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert padded.positions.tolist() == [2, 16, 29, 0, 0, 0, 0, 0]
    assert padded.last.tolist() == list(range(8))
    for ours, theirs in zip(padded.layouts, plain.layouts, strict=True):
        assert torch.equal(ours.block_tables[:3], theirs.block_tables)
        assert torch.equal(ours.slots[:3], theirs.slots)
        assert ours.slots[3:].tolist() == [-1] * 5
        assert ours.context_lens.tolist() == [*lengths, 0, 0, 0, 0, 0]
        assert ours.query_start.tolist() == list(range(9))
        assert not ours.block_tables[3:].any()
        assert ours.query_lens == [1] * 8
    # What was padding is none in the next step that is written there.
    for _ in range(2):
        again = inputs.prepare(decodes([9] * 8, 2))
    assert (again.layouts[0].slots >= 0).all()
    assert again.positions.tolist() == [8] * 8


def test_the_next_step_leaves_the_last_ones_memory_alone() -> None:
    inputs = StepInputs(8, 64, CPU)
    first = inputs.prepare(decodes([5, 6]))
    before = first.token_ids.tolist(), first.layouts[0].slots.tolist()
    inputs.prepare(decodes([25, 26]))
    assert (first.token_ids.tolist(), first.layouts[0].slots.tolist()) == before


def test_a_buffer_that_grew_in_inference_mode_can_be_written_elsewhere() -> None:
    buffer = StepBuffer(CPU)
    header = StepHeader(4000, 4, 0, 1, 4, 9, 2)
    with torch.inference_mode():
        buffer.arrays(header)
    words = buffer.words(header)
    assert len(words) == header.num_words
    words.copy_(torch.arange(header.num_words))
    assert buffer.tensors(header).token_ids.tolist() == list(range(4000))
