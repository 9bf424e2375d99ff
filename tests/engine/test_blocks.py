import struct

import pytest

from engine.block_tables import BlockTables, Prefix, salt_of
from engine.blocks import BlockPool, BlockPoolCorrupt

NOTHING = Prefix(0, ([],))


def fill(pool: BlockPool, tokens: list[int]) -> BlockTables:
    """Admit a sequence and have all of it computed."""
    tables = pool.new_tables()
    prefix = pool.match_prefix(tables, tokens)
    assert pool.allocate(tables, prefix, len(tokens))
    pool.register(tables, tokens, len(tokens))
    return tables


def known(pool: BlockPool, tokens: list[int]) -> list[int]:
    """The blocks of the only group that hold the longest known prefix."""
    (blocks,) = pool.match_prefix(pool.new_tables(), tokens).blocks
    return blocks


def test_a_block_table_covers_the_tokens_and_no_more() -> None:
    pool = BlockPool(10, 4)
    table = pool.new_tables()
    assert pool.allocate(table, NOTHING, 9)
    blocks = table.groups[0]
    assert len(blocks) == len(set(blocks)) == 3
    assert pool.extend(table, 12)
    assert len(blocks) == 3
    assert pool.extend(table, 13)
    assert len(blocks) == 4
    assert pool.num_used == 4
    assert pool.num_available == 6


def test_refused_allocations_change_nothing() -> None:
    pool = BlockPool(3, 4)
    owner = pool.new_tables()
    assert pool.allocate(owner, NOTHING, 5)
    before = pool.stats
    table = pool.new_tables()
    assert not pool.allocate(table, NOTHING, 8)
    assert not pool.allocate(table, NOTHING, 4, reserve=1)
    assert not pool.extend(owner, 17)
    assert table.groups == [[]]
    assert len(owner.groups[0]) == 2
    assert pool.stats == before
    pool.check_integrity([owner])


def test_a_prefix_is_shared_without_copies() -> None:
    pool = BlockPool(10, 4)
    prompt = list(range(11))
    first = fill(pool, prompt)
    second = fill(pool, [*prompt[:8], 99, 98, 97])
    assert second.groups[0][:2] == first.groups[0][:2]
    assert second.groups[0][2] != first.groups[0][2]
    assert pool.num_used == 4
    assert pool.stats.hit_tokens == 8
    assert pool.stats.query_tokens == 22
    pool.free(first)
    pool.check_integrity([second])
    assert pool.num_used == 3
    assert pool.num_cached == 0  # the first sequence's last block was not full


def test_the_last_token_is_never_found_so_that_it_is_computed() -> None:
    pool = BlockPool(10, 4)
    tokens = list(range(8))
    fill(pool, tokens)
    assert len(known(pool, tokens)) == 1
    assert len(known(pool, [*tokens, 8])) == 2
    assert known(pool, tokens[:4]) == []


def test_nothing_is_found_before_it_is_registered() -> None:
    pool = BlockPool(10, 4)
    tokens = list(range(12))
    table = pool.new_tables()
    assert pool.allocate(table, NOTHING, 12)
    assert known(pool, tokens) == []
    pool.register(table, tokens, 7)
    assert known(pool, tokens) == table.groups[0][:1]
    pool.register(table, tokens, 12)
    assert known(pool, [*tokens, 1]) == table.groups[0]


def test_equal_blocks_after_different_prefixes_are_not_shared() -> None:
    pool = BlockPool(10, 2)
    fill(pool, [1, 1, 5, 5, 9])
    assert known(pool, [2, 2, 5, 5, 9]) == []
    assert known(pool, [5, 5, 9]) == []


def test_a_salt_keeps_prefixes_apart_and_no_text_makes_it_name_a_content() -> None:
    pool = BlockPool(20, 4)
    head, tail = [1, 2, 3, 4], [5, 6, 7, 8]
    fill(pool, [*head, *tail, 9])
    # The very bytes that the first block is named by.
    forged = struct.pack("4q", *head).decode()
    for salt in (salt_of("mine"), salt_of(forged)):
        for tokens in ([*head, 9], [*tail, 9]):
            assert pool.match_prefix(pool.new_tables(salt), tokens) == NOTHING
    tables = pool.new_tables(salt_of("mine"))
    assert pool.allocate(tables, NOTHING, 9)
    pool.register(tables, [*head, *tail, 9], 9)
    assert pool.match_prefix(pool.new_tables(salt_of("mine")), [*head, *tail, 9]).num_blocks == 2
    assert pool.match_prefix(pool.new_tables(salt_of("yours")), [*head, *tail, 9]) == NOTHING
    assert salt_of(None) == salt_of("") == b""


def test_a_reused_parent_block_does_not_adopt_the_children_of_its_former_content() -> None:
    # The child of an evicted block stays cached; the block's next content must not lead to it.
    pool = BlockPool(2, 2)
    first = fill(pool, [1, 1, 3, 3])
    parent, child = first.groups[0]
    pool.free(first)
    key = pool._index.key[child]
    assert key is not None
    # Evict in the wrong order on purpose: the parent first.
    pool._cached.move_to_end(child)
    table = pool.new_tables()
    assert pool.allocate(table, NOTHING, 2)
    assert table.groups == [[parent]]
    pool.register(table, [7, 7], 2)
    assert pool._index.block(*key) == child
    assert known(pool, [7, 7, 3, 3, 0]) == [parent]
    assert known(pool, [1, 1, 3, 3, 0]) == []
    pool.check_integrity([table])


def test_eviction_takes_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(4, 2)
    old, new = [1, 1, 2, 2], [3, 3, 4, 4]
    for tokens in (old, new):
        table = fill(pool, tokens)
        pool.free(table)
    assert pool.num_cached == 4
    pool.free(fill(pool, [*old, 0][:3]))  # uses, and so refreshes, old's first block
    # That took one block beyond old's first: old's tail, the least recently used of all.
    assert pool.evictions == 1
    assert len(known(pool, [*old, 0])) == 1
    assert len(known(pool, [*new, 0])) == 2
    table = pool.new_tables()
    assert pool.allocate(table, NOTHING, 4)  # the free block, then new's tail
    assert pool.evictions == 2
    assert len(known(pool, [*new, 0])) == 1
    assert len(known(pool, [*old, 0])) == 1


def test_a_cached_prefix_counts_as_taken_when_it_is_shared_again() -> None:
    pool = BlockPool(3, 2)
    pool.free(fill(pool, [1, 1, 2, 2]))
    prefix = pool.match_prefix(pool.new_tables(), [1, 1, 2, 2, 3, 3, 4])
    assert prefix.num_blocks == 2
    # Four blocks are needed, and the two found are two of the three that are available.
    assert not pool.allocate(pool.new_tables(), prefix, 7)
    table = pool.new_tables()
    assert pool.allocate(table, prefix, 6)
    assert table.groups[0][:2] == prefix.blocks[0]
    assert pool.evictions == 0
    pool.check_integrity([table])


def test_copies_computed_at_the_same_time_go_on_as_one_prefix() -> None:
    pool = BlockPool(8, 2)
    tokens = [1, 1, 2, 2]
    first = pool.new_tables()
    second = pool.new_tables()
    assert pool.allocate(first, NOTHING, 4)
    assert pool.allocate(second, NOTHING, 4)
    pool.register(first, tokens, 2)
    pool.register(second, tokens, 4)
    assert known(pool, [1, 1, 2, 2, 0]) == [first.groups[0][0], second.groups[0][1]]
    pool.check_integrity([first, second])
    pool.free(second)
    pool.check_integrity([first])
    assert pool.num_cached == 1


def test_turning_caching_off_frees_and_turning_it_on_finds_again() -> None:
    pool = BlockPool(8, 2)
    tokens = [1, 1, 2, 2, 3, 3]
    pool.free(fill(pool, [8, 8, 9, 9]))
    table = fill(pool, tokens[:4])
    pool.enable_prefix_caching = False
    assert pool.num_cached == 0
    assert known(pool, tokens) == []
    assert pool.extend(table, 6)
    pool.register(table, tokens, 6)
    assert known(pool, [*tokens, 0]) == []
    pool.enable_prefix_caching = True
    tokens += [4, 4]
    assert pool.extend(table, 8)
    pool.register(table, tokens, 8)
    assert known(pool, [*tokens, 0]) == table.groups[0]  # what was filled meanwhile is found too
    pool.check_integrity([table])


def test_clearing_forgets_contents_but_takes_no_block_from_an_owner() -> None:
    pool = BlockPool(8, 2)
    pool.free(fill(pool, [8, 8, 9, 9]))
    table = fill(pool, [1, 1, 2, 2])
    pool.clear_prefix_cache()
    assert known(pool, [1, 1, 2, 2, 0]) == []
    assert known(pool, [8, 8, 9, 9, 0]) == []
    assert pool.num_used == 2
    assert pool.num_cached == 0
    pool.check_integrity([table])
    pool.free(table)
    assert pool.num_available == 8
    pool.check_integrity([])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_an_impossible_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


def _leak(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    return []


def _share_twice(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    return [table, table]


def _repeat(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    table.groups[0].append(table.groups[0][0])
    return [table]


def _use_in_two_places(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    other = pool.new_tables()
    assert pool.allocate(other, pool.match_prefix(other, [1, 1, 2, 2, 3]), 5)
    other.groups[0][:2] = other.groups[0][1::-1]
    return [table, other]


def _misstate_the_reach(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    table.capacity += 1
    return [table]


def _lose_a_free_block(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    pool._free.pop()
    return [table]


def _free_an_owned_block(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    pool._free.append(table.groups[0][0])
    return [table]


def _forget_a_key(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    pool._index.key[table.groups[0][0]] = None
    return [table]


def _misdirect_the_index(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    key = pool._index.key[table.groups[0][0]]
    assert key is not None
    pool._index._blocks[0][key[1]] = table.groups[0][1]
    return [table]


def _cache_without_key(pool: BlockPool, table: BlockTables) -> list[BlockTables]:
    pool._cached[pool._free.pop()] = None
    return [table]


@pytest.mark.parametrize(
    "damage",
    [
        _leak,
        _share_twice,
        _repeat,
        _use_in_two_places,
        _misstate_the_reach,
        _lose_a_free_block,
        _free_an_owned_block,
        _forget_a_key,
        _misdirect_the_index,
        _cache_without_key,
    ],
)
def test_the_integrity_check_sees_each_kind_of_damage(damage) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(6, 2)
    table = fill(pool, [1, 1, 2, 2, 3])
    pool.check_integrity([table])
    with pytest.raises(BlockPoolCorrupt):
        pool.check_integrity(damage(pool, table))


@pytest.mark.parametrize("windows", [(0,), (0, 9)])
def test_blocks_behind_the_last_token_are_given_back(windows: tuple[int, ...]) -> None:
    pool = BlockPool(20, 4, windows=windows)
    tables = pool.new_tables()
    tokens = list(range(9))
    assert pool.allocate(tables, Prefix(0, tuple([] for _ in windows)), 9)
    pool.register(tables, tokens, 8)
    kept = [list(table) for table in tables.groups]
    assert pool.extend(tables, 30)
    pool.shrink(tables, 9)
    assert [list(table) for table in tables.groups] == kept
    assert tables.capacity == 12
    pool.check_integrity([tables])
    pool.shrink(tables, 12)  # nothing is behind
    assert pool.num_used == 3 * len(windows)
    pool.free(tables)
    assert pool.match_prefix(pool.new_tables(), tokens).num_blocks == 2
