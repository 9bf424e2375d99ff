"""Captured decode steps: padding, fixed memory, what may not be captured, and lack of memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.config import EngineConfig
from engine.cuda_capture import reason
from engine.errors import EnvironmentLacks
from engine.graph_sizes import DecodeShape, decode_shapes, decode_sizes
from engine.graphs import DecodeGraphs, NotCapturable, Scores
from engine.packed_step import StepTensors
from engine.step_inputs import StepInputs
from tests.engine.fake_capture import FakeCapture
from tests.engine.test_packed_step import CPU, decodes

GROUPS, WIDTH, VOCABULARY = 2, 8, 11


def everything(step: StepTensors) -> Scores:
    """Numbers that depend on all that a real sequence has, and on nothing beyond its context."""
    scores = [step.token_ids, step.positions]
    for layout in step.layouts:
        pages = (layout.context_lens + 7) // 8
        seen = torch.arange(layout.block_tables.shape[1]) < pages[:, None]
        scores += [layout.slots, (layout.block_tables * seen).sum(-1), layout.context_lens]
    score = torch.stack([s.double() * (i + 1) ** 0.5 for i, s in enumerate(scores)]).sum(0)
    logits = torch.sin(score[:, None] * torch.arange(1, VOCABULARY + 1)).float()
    return Scores(logits, torch.cos(score[:, None] * torch.arange(1, 4)))


def graphs_of(
    forward: Callable[[StepTensors], Scores], sizes: list[int], capture: FakeCapture
) -> DecodeGraphs:
    shapes = [DecodeShape(size) for size in sizes]
    return DecodeGraphs(forward, shapes, GROUPS, WIDTH, CPU, capture)


def test_ladder() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(3) == [1, 2, 3]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(4000)[-3:] == [480, 496, 512]
    for most in (1, 7, 100, 300, 512):
        sizes = decode_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most


def test_drafts_are_verified_at_powers_of_two() -> None:
    config = EngineConfig(
        max_num_seqs=4,
        max_num_batched_tokens=12,
        speculative_method="ngram",
        num_speculative_tokens=5,
    )
    shapes = decode_shapes(config)
    # As many sequences as the default may be asked for, but no more than a step has tokens.
    assert [s for s in shapes if s.new_tokens == 1] == [
        (1, 1, 0),
        (2, 1, 0),
        (4, 1, 0),
        (8, 1, 0),
        (12, 1, 0),
    ]
    assert [s[:2] for s in shapes if s.new_tokens > 1] == [
        (1, 2),
        (1, 4),
        (1, 6),
        (2, 2),
        (2, 4),
        (2, 6),
        (4, 2),
    ]
    heads = config.replace(speculative_method="medusa", speculative_model="heads")
    assert {s.has_trees for s in decode_shapes(heads)} == {False, True}
    assert not any(s.has_trees for s in decode_shapes(heads, has_windows=True))


def test_a_padded_step_says_what_the_plain_one_does() -> None:
    capture = FakeCapture()
    graphs = graphs_of(everything, [1, 2, 4, 8], capture)
    assert graphs.sizes == [1, 2, 4, 8]
    shapes = [graphs.shape_for(n) for n in (1, 2, 3, 5, 8, 9)]
    assert [shape and shape.sequences for shape in shapes] == [1, 2, 4, 8, 8, None]
    inputs = StepInputs(8, 8 * WIDTH, CPU, GROUPS)
    # Long contexts before short ones: what they leave in the tables must not be seen.
    for lengths in ([60, 41, 33, 9, 50], [3], [1, 2, 17], [9, 9, 9, 9, 9, 9, 9, 64], [5, 30]):
        batch = decodes(lengths, GROUPS)
        expected = everything(inputs.prepare(batch))
        header, buffer = inputs.pack(batch, graphs.shape_for(len(lengths)))
        before = capture.replayed
        scores = graphs.run(header, buffer)
        assert capture.replayed == before + 1
        assert torch.equal(scores.logits[: len(lengths)], expected.logits)
        assert torch.equal(scores.hidden[: len(lengths)], expected.hidden)
        assert scores.likeliest is not None
        assert torch.equal(scores.likeliest[: len(lengths)], expected.logits.argmax(-1))
        assert len(scores.logits) == len(scores.likeliest) == header.num_sequences


def test_nothing_but_padding_runs_until_the_first_step() -> None:
    seen = []

    def forward(step: StepTensors) -> Scores:
        for layout in step.layouts:
            seen.append((layout.slots.tolist(), layout.context_lens.tolist()))
            assert layout.query_start.tolist() == list(range(len(step.token_ids) + 1))
            assert layout.num_decodes == len(step.token_ids) == len(layout.query_lens)
        return everything(step)

    graphs_of(forward, [1, 4], FakeCapture())
    assert seen == [([-1] * n, [0] * n) for n in (4, 4, 1, 1)]


@pytest.mark.parametrize(
    "read",
    [
        lambda layout: max(layout.context_lens_list),
        lambda layout: sum(layout.query_lens),
        lambda layout: layout.query_lens[0],
        lambda layout: list(layout.context_lens_list),
    ],
)
def test_a_step_that_reads_lengths_from_the_host_is_not_captured(
    read: Callable[[object], object],
) -> None:
    def forward(step: StepTensors) -> Scores:
        read(step.layouts[0])
        return everything(step)

    with pytest.raises(NotCapturable, match="lengths from the host"):
        graphs_of(forward, [1, 2], FakeCapture())


def test_sizes_that_do_not_fit_are_left_out_or_told() -> None:
    assert graphs_of(everything, [1, 2, 4], FakeCapture(fitting=2)).sizes == [2, 4]
    with pytest.raises(EnvironmentLacks, match="set cuda_graphs=false"):
        graphs_of(everything, [1, 2, 4], FakeCapture(fitting=0))
    with pytest.raises(EnvironmentLacks, match="of 1 sequences"):
        DecodeGraphs(
            everything,
            [DecodeShape(size) for size in (1, 2, 4)],
            GROUPS,
            WIDTH,
            CPU,
            FakeCapture(fitting=2),
            leave_out=False,
        )


def test_what_a_failed_capture_means() -> None:
    assert isinstance(reason(torch.OutOfMemoryError("x")), torch.OutOfMemoryError)
    full = RuntimeError("CUDA error: out of memory\nSearch for ...")
    assert isinstance(reason(full), torch.OutOfMemoryError)
    waits = reason(RuntimeError("called a synchronizing CUDA operation"))
    assert isinstance(waits, NotCapturable)
    assert str(waits) == "an operation waits for the device"
    other = reason(RuntimeError("operation not permitted when stream is capturing\nmore"))
    assert str(other) == "operation not permitted when stream is capturing"
