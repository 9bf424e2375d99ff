"""Random traffic on the block pool, against an array of slots that holds every computed token."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.blocks import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """The pool against an array of slots that holds every computed token."""

    tables = Bundle("tables")
    few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, 2)
        self.slots: list[int | None] = [None] * 14
        self.sequences: dict[int, tuple[list[int], list[int], list[int]]] = {}
        self.registered: set[tuple[int, ...]] = set()
        self.all_registered = True  # nothing was evicted, cleared or left out yet
        self.next_id = 0

    def slot(self, table: list[int], position: int) -> int:
        return table[position // 2] * 2 + position % 2

    def read(self, table: list[int], num_tokens: int) -> list[int | None]:
        return [self.slots[self.slot(table, p)] for p in range(num_tokens)]

    @rule(target=tables, tokens=few_tokens, reserve=st.integers(0, 2))
    def admit(self, tokens: list[int], reserve: int) -> int:
        pool = self.pool
        prefix = pool.match_prefix(tokens)
        found = 2 * len(prefix)
        assert found < len(tokens)
        assert self.read(prefix, found) == tokens[:found]
        if self.all_registered and pool.evictions == 0 and pool.enable_prefix_caching:
            known = 0
            while known + 2 < len(tokens) and tuple(tokens[: known + 2]) in self.registered:
                known += 2
            assert found == known
        could = pool.can_allocate(prefix, len(tokens), reserve)
        available = pool.num_available
        table: list[int] = []
        assert pool.allocate(table, prefix, len(tokens), reserve) is could
        number = self.next_id
        self.next_id += 1
        if could:
            assert len(table) == -(-len(tokens) // 2)
            assert pool.num_available >= reserve
            self.sequences[number] = (table, tokens, [found])
        else:
            assert pool.num_available == available
        return number

    @rule(number=tables, count=st.integers(1, 6))
    def compute(self, number: int, count: int) -> None:
        if number not in self.sequences:
            return
        table, tokens, progress = self.sequences[number]
        start = progress[0]
        end = min(len(tokens), start + count)
        for position in range(start, end):
            self.slots[self.slot(table, position)] = tokens[position]
        self.pool.register(table, tokens, start, end)
        progress[0] = end
        if self.pool.enable_prefix_caching:
            for full in range(2, end + 1, 2):
                self.registered.add(tuple(tokens[:full]))
        else:
            self.all_registered = False

    @rule(number=tables, token=st.integers(0, 1))
    def grow(self, number: int, token: int) -> None:
        if number not in self.sequences:
            return
        table, tokens, _ = self.sequences[number]
        before = list(table)
        needs = len(tokens) + 1 > 2 * len(table)
        could = not needs or self.pool.num_available > 0
        assert self.pool.extend(table, len(tokens) + 1) is could
        assert table[: len(before)] == before
        if could:
            tokens.append(token)

    @rule(number=consumes(tables))
    def free(self, number: int) -> None:
        if number in self.sequences:
            table, _, _ = self.sequences.pop(number)
            self.pool.free(table)
            assert table == []

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
        pool = self.pool
        pool.check_integrity(table for table, _, _ in self.sequences.values())
        stats = pool.stats
        assert stats.used + stats.cached + stats.free == stats.total == 7
        owned = {block for table, _, _ in self.sequences.values() for block in table}
        assert stats.used == len(owned)
        assert stats.hit_tokens <= stats.query_tokens

    @invariant()
    def nobody_overwrote_what_was_computed(self) -> None:
        for table, tokens, progress in self.sequences.values():
            assert self.read(table, progress[0]) == tokens[: progress[0]]

    def teardown(self) -> None:
        for table, _, _ in self.sequences.values():
            self.pool.free(table)
        self.pool.check_integrity([])
        assert self.pool.num_available == 7


PoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, database=None
)
TestPool = PoolMachine.TestCase


def test_random_traffic_keeps_the_cache_full_and_correct() -> None:
    chance = random.Random(7)
    pool = BlockPool(64, 4)
    stems = [[chance.randrange(9) for _ in range(40)] for _ in range(4)]
    tables: list[list[int]] = []
    for _ in range(3000):
        if tables and chance.random() < 0.5:
            pool.free(tables.pop(chance.randrange(len(tables))))
            continue
        stem = chance.choice(stems)
        tokens = stem[: chance.randrange(1, 41)] + [chance.randrange(9) for _ in range(5)]
        prefix = pool.match_prefix(tokens)
        table: list[int] = []
        if pool.allocate(table, prefix, len(tokens)):
            pool.register(table, tokens, 4 * len(prefix), len(tokens))
            tables.append(table)
    pool.check_integrity(tables)
    assert pool.stats.hit_tokens > pool.stats.query_tokens // 4
    assert pool.evictions > 100
