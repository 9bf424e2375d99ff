"""Blocks set aside count as if they had been handed out at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool

SIZE = 4


def filled(blocks: int, cached: int) -> BlockPool:
    """A pool whose first blocks to be evicted have known contents, one sequence a block."""
    pool = BlockPool(blocks, SIZE)
    for number in range(cached):
        tables, tokens = pool.new_tables(), [number] * SIZE
        assert pool.allocate(tables, pool.match_prefix(tables, tokens), SIZE)
        pool.register(tables, tokens, SIZE)
        pool.free(tables)
    return pool


@given(st.integers(1, 20), st.data())
def test_what_is_set_aside_is_gone_for_everybody_else(blocks: int, data: st.DataObject) -> None:
    cached = data.draw(st.integers(0, blocks))
    count = data.draw(st.integers(0, blocks))
    aside, at_once = filled(blocks, cached), filled(blocks, cached)
    aside.set_aside(count)
    tables, owner = at_once.new_tables(), aside.new_tables()
    assert at_once.extend(tables, count * SIZE)
    assert aside.stats == at_once.stats
    assert not aside.extend(aside.new_tables(), (blocks - count + 1) * SIZE)
    for number in range(cached):
        tokens = [number] * (SIZE + 1)
        found = [pool.match_prefix(pool.new_tables(), tokens) for pool in (aside, at_once)]
        assert found[0].num_blocks == found[1].num_blocks
    aside.check_integrity([])
    aside.take_aside(owner, count * SIZE)
    assert aside.stats == at_once.stats
    aside.check_integrity([owner])


@given(st.integers(1, 20), st.data())
def test_retired_blocks_go_when_their_turn_comes(blocks: int, data: st.DataObject) -> None:
    before = data.draw(st.integers(0, blocks - 1))
    retired = data.draw(st.integers(1, blocks - before))
    pool = filled(blocks, before)
    pool.set_aside(retired)
    pool.retire_aside(retired)
    assert (pool.num_used, pool.num_cached) == (0, before + retired)
    pool.check_integrity([])
    taken = data.draw(st.integers(0, blocks))
    tables = pool.new_tables()
    assert pool.extend(tables, taken * SIZE)
    pool.check_integrity([tables])
    evicted = max(0, taken - (blocks - before - retired))
    assert pool.evictions == evicted
    known = [
        pool.match_prefix(pool.new_tables(), [number] * (SIZE + 1)).num_blocks
        for number in range(before)
    ]
    assert known == [0] * min(before, evicted) + [1] * (before - min(before, evicted))
    pool.clear_prefix_cache()
    assert (pool.num_used, pool.num_cached) == (taken, 0)
    pool.check_integrity([tables])
