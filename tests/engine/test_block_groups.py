"""How layers are grouped, and what a sequence may need in the groups."""

from __future__ import annotations

import pytest

from engine.block_groups import (
    BlockGroup,
    block_groups,
    group_of_layer,
    mean_visible_tokens,
    most_owned_blocks,
    window_blocks,
)
from engine.blocks import BlockPool
from engine.config import EngineConfig
from engine.scheduler import Scheduler
from engine.step_record import StepRecord
from tests.engine.fake_executor import assert_idle, expected_output, greedy, make_engine, run
from tests.engine.scheduling import make_request, step
from tests.engine.scheduling import make_scheduler as uniform_scheduler

MIXTURES = [(11,), (0, 11), (0, 9, 9), (5, 17), (0, 1), (2,), (0, 16, 30)]


def make_scheduler(num_blocks: int, windows: tuple[int, ...], **knobs: object) -> Scheduler:
    config = EngineConfig.from_mapping({"block_size": 8, **knobs})
    pool = BlockPool(num_blocks, 8, config.enable_prefix_caching, windows)
    return Scheduler(config, pool, 256, vocab_size=50)


@pytest.mark.parametrize(
    ("layer_windows", "expected"),
    [
        ((0, 0, 0), [(0, (0, 1, 2))]),
        ((7, 7), [(7, (0, 1))]),
        ((7, 0, 7, 0), [(0, (1, 3)), (7, (0, 2))]),
        # Five windowed layers for each that sees all, and two more: the last group has two.
        (
            (7, 7, 7, 7, 7, 0) * 3 + (7, 7),
            [
                (0, (5, 11, 17)),
                (7, (0, 1, 2)),
                (7, (3, 4, 6)),
                (7, (7, 8, 9)),
                (7, (10, 12, 13)),
                (7, (14, 15, 16)),
                (7, (18, 19)),
            ],
        ),
        ((7, 3, 0), [(0, (2,)), (3, (1,)), (7, (0,))]),
        # A window as long as the longest sequence is none.
        ((100, 0, 99), [(0, (0,)), (0, (1,)), (99, (2,))]),
    ],
)
def test_layers_of_a_kind_in_groups_of_one_size(
    layer_windows: tuple[int, ...], expected: list[tuple[int, tuple[int, ...]]]
) -> None:
    groups = block_groups(layer_windows, max_model_len=100)
    assert [(group.window, group.layers) for group in groups] == expected
    owner = group_of_layer(groups)
    assert all(layer in groups[owner[layer]].layers for layer in range(len(layer_windows)))


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_window_blocks_by_counting(block_size: int) -> None:
    for window in range(1, 40):
        counts = [
            len({position // block_size for position in range(start, start + window)})
            for start in range(block_size)
        ]
        assert window_blocks(window, block_size) == max(counts)


def test_visible_tokens_by_counting() -> None:
    groups = [BlockGroup(0, (0, 1)), BlockGroup(5, (2, 3)), BlockGroup(5, (4,))]
    for context in range(1, 20):
        for new in range(1, context + 1):
            windowed = {
                seen
                for position in range(context - new, context)
                for seen in range(max(0, position - 4), position + 1)
            }
            expected = (2 * context + 3 * len(windowed)) / 5
            assert mean_visible_tokens(groups, context, new) == pytest.approx(expected)


@pytest.mark.parametrize("windows", MIXTURES)
@pytest.mark.parametrize("tokens_per_step", [1, 200])
def test_the_longest_sequence_of_every_pool_is_served_alone(
    windows: tuple[int, ...], tokens_per_step: int
) -> None:
    """And a longer one is refused: the count of what it needs is exact."""
    for num_blocks in range(1, 24):
        longest = BlockPool(num_blocks, 8, True, windows).longest(120)
        engine, _ = make_engine(
            num_blocks,
            121,
            windows=windows,
            max_num_seqs=1,
            max_num_batched_tokens=tokens_per_step,
        )
        if longest < 8:
            engine.add("none", [1, 2], greedy(1))
            (output,) = run(engine)["none"]
            assert output.refusal is not None
            continue
        prompt = [1, 2, 3, 4] * 30
        prompt = prompt[: max(2, longest - 9)]
        engine.add("fits", prompt, greedy(None))
        engine.add("again", prompt, greedy(None))  # with a prefix that takes part of the room
        outputs = run(engine)
        for name in ("fits", "again"):
            tokens = [token for output in outputs[name] for token in output.token_ids]
            assert tokens == expected_output(prompt, longest + 1 - len(prompt))
        if longest < 120:
            engine.add("long", prompt, greedy(longest + 2 - len(prompt)))
            (output,) = run(engine)["long"]
            assert output.refusal is not None
            assert f"holds {longest} tokens" in output.refusal
        assert_idle(engine)


def test_blocks_of_one_kind_serve_the_other() -> None:
    engine, _ = make_engine(24, 200, windows=(0, 8), max_num_seqs=1, enable_prefix_caching=False)
    for name, length in (("long", 150), ("short", 20), ("longer", 160)):
        engine.add(name, [3] * length, greedy(8))
    outputs = run(engine)
    assert all(outputs[name][-1].finish_reason == "length" for name in outputs)
    # Kept apart, so that each kind has half of the blocks, neither of the long ones would fit.
    assert most_owned_blocks((0,), -(-167 // 8), 8) > 24 // 2


def test_a_prompt_takes_smaller_chunks_before_others_are_preempted() -> None:
    scheduler = make_scheduler(16, (0, 8), max_num_seqs=4, enable_prefix_caching=False)
    assert scheduler.add(make_request("a", 32, 8))
    assert step(scheduler) == [("a", 0, 32)]
    # Of the 11 blocks that are left a needs one in each group and b 7 for all of its 56 tokens; its
    # window is given the last 2.
    assert scheduler.add(make_request("b", 56, 4))
    assert step(scheduler) == [("a", 32, 1), ("b", 0, 16)]
    # The window has moved on and gives back a block each time.
    assert step(scheduler) == [("a", 33, 1), ("b", 16, 8)]
    assert step(scheduler) == [("a", 34, 1), ("b", 24, 8)]
    assert [request.num_preemptions for request in scheduler.running] == [0, 0]


def test_records_count_what_attention_reads() -> None:
    engine, _ = make_engine(24, 200, windows=(0, 8), max_num_seqs=2)
    records: list[StepRecord] = []
    engine.on_step = records.append
    engine.add("a", [1] * 20, greedy(3))
    run(engine)
    # 20 tokens, all visible to one of them; then the context and the window.
    assert [record.kv_tokens_read for record in records] == [20, (21 + 8) // 2, (22 + 8) // 2]


def test_without_windows_prompts_are_given_all_at_once() -> None:
    scheduler = uniform_scheduler(num_blocks=20, max_num_batched_tokens=16, max_num_seqs=4)
    assert scheduler.add(make_request("a", 80, 8))
    step(scheduler)
    assert scheduler.pool.num_used == 10


@pytest.mark.parametrize("windows", [(0, 0), ()])
def test_groups_that_make_no_sense_are_refused(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one group"):
        BlockPool(4, 8, True, windows)
