import pytest

from engine.blocks import BlockPool, BlockPoolCorrupt


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Admit a sequence and have all of it computed."""
    table: list[int] = []
    prefix = pool.match_prefix(tokens)
    assert pool.allocate(table, prefix, len(tokens))
    pool.register(table, tokens, len(prefix) * pool.block_size, len(tokens))
    return table


def test_a_block_table_covers_the_tokens_and_no_more() -> None:
    pool = BlockPool(10, 4)
    table: list[int] = []
    assert pool.allocate(table, [], 9)
    assert len(table) == len(set(table)) == 3
    assert pool.extend(table, 12)
    assert len(table) == 3
    assert pool.extend(table, 13)
    assert len(table) == 4
    assert pool.num_used == 4
    assert pool.num_available == 6


def test_refused_allocations_change_nothing() -> None:
    pool = BlockPool(3, 4)
    owner: list[int] = []
    assert pool.allocate(owner, [], 5)
    before = pool.stats
    table: list[int] = []
    assert not pool.allocate(table, [], 8)
    assert not pool.allocate(table, [], 4, reserve=1)
    assert not pool.extend(owner, 17)
    assert table == []
    assert len(owner) == 2
    assert pool.stats == before
    pool.check_integrity([owner])


def test_a_prefix_is_shared_without_copies() -> None:
    pool = BlockPool(10, 4)
    prompt = list(range(11))
    first = fill(pool, prompt)
    second = fill(pool, [*prompt[:8], 99, 98, 97])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
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
    assert len(pool.match_prefix(tokens)) == 1
    assert len(pool.match_prefix([*tokens, 8])) == 2
    assert pool.match_prefix(tokens[:4]) == []


def test_nothing_is_found_before_it_is_registered() -> None:
    pool = BlockPool(10, 4)
    tokens = list(range(12))
    table: list[int] = []
    assert pool.allocate(table, [], 12)
    assert pool.match_prefix(tokens) == []
    pool.register(table, tokens, 0, 7)
    assert pool.match_prefix(tokens) == table[:1]
    pool.register(table, tokens, 7, 12)
    assert pool.match_prefix([*tokens, 1]) == table


def test_equal_blocks_after_different_prefixes_are_not_shared() -> None:
    pool = BlockPool(10, 2)
    fill(pool, [1, 1, 5, 5, 9])
    assert pool.match_prefix([2, 2, 5, 5, 9]) == []
    assert pool.match_prefix([5, 5, 9]) == []


def test_a_reused_parent_block_does_not_adopt_the_children_of_its_former_content() -> None:
    # The child of an evicted block stays cached; the block's next content must not lead to it.
    pool = BlockPool(2, 2)
    first = fill(pool, [1, 1, 3, 3])
    parent, child = first
    pool.free(first)
    [(_, key)] = [(b, k) for k, b in pool._index.items() if b == child]
    # Evict in the wrong order on purpose: the parent first.
    pool._cached.move_to_end(child)
    table: list[int] = []
    assert pool.allocate(table, [], 2)
    assert table == [parent]
    pool.register(table, [7, 7], 0, 2)
    assert key in pool._index
    assert pool.match_prefix([7, 7, 3, 3, 0]) == [parent]
    assert pool.match_prefix([1, 1, 3, 3, 0]) == []
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
    assert len(pool.match_prefix([*old, 0])) == 1
    assert len(pool.match_prefix([*new, 0])) == 2
    table = []
    assert pool.allocate(table, [], 4)  # the free block, then new's tail
    assert pool.evictions == 2
    assert len(pool.match_prefix([*new, 0])) == 1
    assert len(pool.match_prefix([*old, 0])) == 1


def test_a_cached_prefix_counts_as_taken_when_it_is_shared_again() -> None:
    pool = BlockPool(3, 2)
    pool.free(fill(pool, [1, 1, 2, 2]))
    prefix = pool.match_prefix([1, 1, 2, 2, 3, 3, 4])
    assert len(prefix) == 2
    # Four blocks are needed, and the two found are two of the three that are available.
    assert not pool.allocate([], prefix, 7)
    table: list[int] = []
    assert pool.allocate(table, prefix, 6)
    assert table[:2] == prefix
    assert pool.evictions == 0
    pool.check_integrity([table])


def test_copies_computed_at_the_same_time_go_on_as_one_prefix() -> None:
    pool = BlockPool(8, 2)
    tokens = [1, 1, 2, 2]
    first: list[int] = []
    second: list[int] = []
    assert pool.allocate(first, [], 4)
    assert pool.allocate(second, [], 4)
    pool.register(first, tokens, 0, 2)
    pool.register(second, tokens, 0, 4)
    assert pool.match_prefix([1, 1, 2, 2, 0]) == [first[0], second[1]]
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
    assert pool.match_prefix(tokens) == []
    assert pool.extend(table, 6)
    pool.register(table, tokens, 4, 6)
    assert pool.match_prefix([*tokens, 0]) == []
    pool.enable_prefix_caching = True
    tokens += [4, 4]
    assert pool.extend(table, 8)
    pool.register(table, tokens, 6, 8)
    assert pool.match_prefix([*tokens, 0]) == table  # what was filled meanwhile is found too
    pool.check_integrity([table])


def test_clearing_forgets_contents_but_takes_no_block_from_an_owner() -> None:
    pool = BlockPool(8, 2)
    pool.free(fill(pool, [8, 8, 9, 9]))
    table = fill(pool, [1, 1, 2, 2])
    pool.clear_prefix_cache()
    assert pool.match_prefix([1, 1, 2, 2, 0]) == []
    assert pool.match_prefix([8, 8, 9, 9, 0]) == []
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


def _leak(pool: BlockPool, table: list[int]) -> list[list[int]]:
    return []


def _share_twice(pool: BlockPool, table: list[int]) -> list[list[int]]:
    return [table, table]


def _repeat(pool: BlockPool, table: list[int]) -> list[list[int]]:
    return [[*table, table[0]]]


def _lose_a_free_block(pool: BlockPool, table: list[int]) -> list[list[int]]:
    pool._free.pop()
    return [table]


def _free_an_owned_block(pool: BlockPool, table: list[int]) -> list[list[int]]:
    pool._free.append(table[0])
    return [table]


def _forget_a_key(pool: BlockPool, table: list[int]) -> list[list[int]]:
    pool._key[table[0]] = None
    return [table]


def _misdirect_the_index(pool: BlockPool, table: list[int]) -> list[list[int]]:
    key = pool._key[table[0]]
    assert key is not None
    pool._index[key] = table[1]
    return [table]


def _cache_without_key(pool: BlockPool, table: list[int]) -> list[list[int]]:
    pool._cached[pool._free.pop()] = None
    return [table]


@pytest.mark.parametrize(
    "damage",
    [
        _leak,
        _share_twice,
        _repeat,
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
