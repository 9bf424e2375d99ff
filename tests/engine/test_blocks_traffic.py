"""Random traffic on the block pool, against an array of slots that holds every computed token."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from engine.block_tables import BlockTables
from engine.blocks import BlockPool


class Sequence:
    def __init__(self, tables: BlockTables, tokens: list[int], computed: int) -> None:
        self.tables, self.tokens, self.computed = tables, tokens, computed


class PoolMachine(RuleBasedStateMachine):
    """The pool against an array of slots that holds every computed token.

    A slot holds the group that it was written for and all tokens up to its own.
    """

    sequences = Bundle("sequences")
    few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)

    @initialize(
        target=sequences,
        windows=st.sampled_from([(0,), (0,), (3,), (0, 4), (0, 1, 1), (2, 5)]),
        num_blocks=st.integers(7, 14),
    )
    def start(self, windows: tuple[int, ...], num_blocks: int) -> int:
        self.windows = windows
        self.pool = BlockPool(num_blocks, 2, windows=windows)
        self.slots: list[tuple[int, list[int]] | None] = [None] * (2 * num_blocks)
        self.alive: dict[int, Sequence] = {}
        self.registered: set[tuple[int, ...]] = set()
        self.all_registered = True  # nothing was evicted, cleared or left out yet
        self.next_id = 0
        return -1

    def seen(self, group: int, computed: int) -> range:
        """Positions that the token after `computed` ones sees in a group."""
        window = self.windows[group]
        return range(max(0, computed - window + 1) if window else 0, computed)

    def check_content(self, tables: BlockTables, tokens: list[int], computed: int) -> None:
        for group, table in enumerate(tables.groups):
            for position in self.seen(group, computed):
                slot = table[position // 2] * 2 + position % 2
                assert position // 2 >= tables.given_up[group]
                assert self.slots[slot] == (group, tokens[: position + 1])

    @rule(target=sequences, tokens=few_tokens, reserve=st.integers(0, 2), chunk=st.integers(0, 14))
    def admit(self, tokens: list[int], reserve: int, chunk: int) -> int:
        pool = self.pool
        tables = pool.new_tables()
        prefix = pool.match_prefix(tables, tokens)
        found = 2 * prefix.num_blocks
        assert found < len(tokens)
        if self.all_registered and pool.evictions == 0 and pool.enable_prefix_caching:
            known = 0
            while known + 2 < len(tokens) and tuple(tokens[: known + 2]) in self.registered:
                known += 2
            assert found == known
        could = pool.can_allocate(prefix, len(tokens), reserve)
        available = pool.num_available
        most = min(len(tokens), found + chunk)
        assert pool.allocate(tables, prefix, len(tokens), reserve, most) is could
        number = self.next_id
        self.next_id += 1
        if could:
            if self.windows == (0,):
                assert len(tables.groups[0]) == -(-len(tokens) // 2)
            assert tables.capacity >= min(most, found + 1)
            assert pool.num_available >= reserve
            self.alive[number] = Sequence(tables, tokens, found)
            self.check_content(tables, tokens, found)
        else:
            assert pool.num_available == available
        return number

    @rule(number=sequences, count=st.integers(1, 6))
    def compute(self, number: int, count: int) -> None:
        if number not in self.alive:
            return
        s = self.alive[number]
        tables, tokens = s.tables, s.tokens
        end = min(len(tokens), s.computed + count, tables.capacity)
        for group, table in enumerate(tables.groups):
            for position in range(s.computed, end):
                slot = table[position // 2] * 2 + position % 2
                self.slots[slot] = (group, tokens[: position + 1])
        self.pool.register(tables, tokens, end)
        s.computed = end
        before = tables.num_owned
        available = self.pool.num_available
        self.pool.give_up_before(tables, end)
        # What two sequences share and one gives up is not available yet.
        assert 0 <= self.pool.num_available - available <= before - tables.num_owned
        for window, given_up in zip(self.windows, tables.given_up, strict=True):
            assert given_up == (max(0, end - window + 1) // 2 if window else 0)
        if self.pool.enable_prefix_caching:
            for full in range(2, end + 1, 2):
                self.registered.add(tuple(tokens[:full]))
        else:
            self.all_registered = False

    @rule(number=sequences, token=st.integers(0, 1), chunk=st.integers(1, 4))
    def grow(self, number: int, token: int, chunk: int) -> None:
        if number not in self.alive:
            return
        s = self.alive[number]
        pool, tables = self.pool, s.tables
        before = [list(table) for table in tables.groups]
        total = len(s.tokens) + 1
        least, most = s.computed + 1, min(total, s.computed + chunk)
        growth = pool.growth(tables, total, least)
        if self.windows == (0,):
            assert growth == (total > tables.capacity)
        could = growth <= pool.num_available
        assert pool.extend(tables, total, least, most) is could
        for table, old in zip(tables.groups, before, strict=True):
            assert table[: len(old)] == old
            assert could or table == old
        if could:
            assert tables.capacity >= least
            s.tokens.append(token)

    @rule(number=consumes(sequences))
    def free(self, number: int) -> None:
        if number in self.alive:
            tables = self.alive.pop(number).tables
            self.pool.free(tables)
            assert tables.num_owned == tables.capacity == 0

    @rule()
    def clear(self) -> None:
        self.pool.clear_prefix_cache()
        self.all_registered = False

    @rule(enable=st.booleans())
    def switch(self, enable: bool) -> None:
        self.pool.enable_prefix_caching = enable
        if not enable:
            self.all_registered = False

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check_integrity(s.tables for s in self.alive.values())
        stats = pool.stats
        assert stats.used + stats.cached + stats.free == stats.total == pool.num_blocks
        owned = {b for s in self.alive.values() for blocks in s.tables.owned() for b in blocks}
        assert stats.used == len(owned)
        assert stats.hit_tokens <= stats.query_tokens

    @invariant()
    def nobody_overwrote_what_was_computed(self) -> None:
        for s in getattr(self, "alive", {}).values():
            self.check_content(s.tables, s.tokens, s.computed)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for s in self.alive.values():
            self.pool.free(s.tables)
        self.pool.check_integrity([])
        assert self.pool.num_available == self.pool.num_blocks


PoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, database=None
)
TestPool = PoolMachine.TestCase


def test_random_traffic_keeps_the_cache_full_and_correct() -> None:
    chance = random.Random(7)
    pool = BlockPool(64, 4)
    stems = [[chance.randrange(9) for _ in range(40)] for _ in range(4)]
    tables: list[BlockTables] = []
    for _ in range(3000):
        if tables and chance.random() < 0.5:
            pool.free(tables.pop(chance.randrange(len(tables))))
            continue
        stem = chance.choice(stems)
        tokens = stem[: chance.randrange(1, 41)] + [chance.randrange(9) for _ in range(5)]
        table = pool.new_tables()
        prefix = pool.match_prefix(table, tokens)
        if pool.allocate(table, prefix, len(tokens)):
            pool.register(table, tokens, len(tokens))
            tables.append(table)
    pool.check_integrity(tables)
    assert pool.stats.hit_tokens > pool.stats.query_tokens // 4
    assert pool.evictions > 100
