"""Inputs of a step against the kernels' own plain builder, over a life of random batches."""

from __future__ import annotations

import random

import pytest
import torch

from engine.batch import Batch, ScheduledSequence
from engine.block_tables import BlockTables
from engine.request import Request, SamplingParams
from engine.step_inputs import StepInputs, table_width
from kernels.metadata import build_attention_metadata


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_size", [8, 16])
def test_random_batches(seed: int, block_size: int) -> None:
    """Requests come, grow, rest, are preempted, leave, and others take their ids."""
    rng = random.Random(seed)
    inputs = StepInputs(block_size, 120, torch.device("cpu"))
    alive: list[Request] = []
    for _ in range(120):
        while len(alive) < rng.choice([2, 30, 5]):
            prompt = [rng.randrange(1000) for _ in range(rng.randint(1, 60))]
            free = [str(i) for i in range(40) if str(i) not in {r.request_id for r in alive}]
            alive.append(Request(rng.choice(free), prompt, SamplingParams(), 0.0))
        chosen = rng.sample(alive, rng.randint(1, len(alive)))
        scheduled = []
        for request in chosen:
            if rng.random() < 0.1:
                request.num_preemptions += 1
                request.tables, request.num_computed_tokens = BlockTables(), 0
            start = request.num_computed_tokens
            count = rng.choice([1, rng.randint(1, request.num_pending_tokens)])
            while len(request.tables.groups[0]) * block_size < start + count:
                request.tables.groups[0].append(rng.randrange(10_000))
            samples = start + count == len(request.token_ids)
            scheduled.append(ScheduledSequence(request, start, count, samples))
        scheduled.sort(key=lambda s: s.num_tokens > 1)
        batch = Batch(scheduled, sum(s.num_tokens == 1 for s in scheduled))
        ids, positions, last, (metadata,) = inputs.prepare(batch)
        expected = build_attention_metadata(
            [s.request.tables.groups[0] for s in scheduled],
            [s.num_tokens for s in scheduled],
            [s.end for s in scheduled],
            block_size,
        )
        width = metadata.block_tables.shape[1]
        for i, s in enumerate(scheduled):
            used = -(-s.end // block_size)
            assert torch.equal(metadata.block_tables[i, :used], expected.block_tables[i, :used])
            assert width >= used
        for field in ("context_lens", "query_start", "slots"):
            ours, theirs = getattr(metadata, field), getattr(expected, field)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert metadata.block_tables.dtype == torch.int32
        assert metadata.query_lens == expected.query_lens
        assert metadata.context_lens_list == expected.context_lens_list
        assert metadata.num_decodes == expected.num_decodes
        assert ids.tolist() == [t for s in scheduled for t in s.request.token_ids[s.start : s.end]]
        assert positions.tolist() == [p for s in scheduled for p in range(s.start, s.end)]
        ends = expected.query_start[1:] - 1
        assert last.tolist() == [int(ends[i]) for i, s in enumerate(scheduled) if s.samples]
        for s in scheduled:
            s.request.num_computed_tokens = s.end
            if s.samples:
                s.request.token_ids.append(rng.randrange(1000))
        alive = [r for r in alive if len(r.token_ids) < 110 and rng.random() > 0.05]
    assert len(inputs._rows) <= len(inputs._tables[0])


def test_the_table_stays_small() -> None:
    inputs = StepInputs(8, 64, torch.device("cpu"))
    for number in range(500):
        tables = BlockTables([[number]])
        request = Request(str(number), [1, 2], SamplingParams(), 0.0, tables=tables)
        *_, (metadata,) = inputs.prepare(Batch([ScheduledSequence(request, 0, 2, True)], 0))
        assert metadata.block_tables.tolist() == [[number]]
    assert len(inputs._tables[0]) == 16


def test_tables_of_a_gpu_have_one_kind_of_width() -> None:
    assert [table_width(n, 8, 1) for n in (1, 8, 9, 64)] == [1, 1, 2, 8]
    assert [table_width(n, 8, 16) for n in (1, 128, 129, 4000)] == [16, 16, 32, 512]
    inputs = StepInputs(8, 200, torch.device("meta"))  # any device but a CPU
    tables = BlockTables([list(range(1, 26))])
    request = Request("r", [1] * 200, SamplingParams(), 0.0, tables=tables)
    header, buffer = inputs.pack(Batch([ScheduledSequence(request, 0, 130, False)], 0))
    assert header.table_width == 32
    assert buffer.arrays(header).tables[0].tolist() == [[*range(1, 26), *[0] * 7]]
