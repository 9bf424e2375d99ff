"""The KV cache's blocks: who owns them, what they hold, which goes next.

A block holds the keys and values of `block_size` tokens for one group of layers
(`engine.block_groups`). It is in exactly one of three places:

- owned by one or more requests (`reference count` > 0), in the same group and position of each,
- cached: owned by nobody, its content still known to the prefix index, evicted least recently
  used first,
- free: owned by nobody, content forgotten.

The pool knows block ids only; the tensors behind them are the executor's. Any block may serve any
group, one at a time.

The prefix index maps, for each group, the name of a token sequence from the prompt's first token
on (`BlockTables.digest`) to the block that holds its last `block_size` tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.block_groups import longest_sequence, window_blocks
from engine.block_places import BlockPlaces, BlockPoolCorrupt, check_places
from engine.block_tables import BlockTables, Prefix
from engine.prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True)
class BlockPoolStats:
    """Blocks by place now, and prefix-cache counters since the pool was made.

    `query_tokens` are the tokens of all admitted sequences while prefix caching was on, of which
    `hit_tokens` were found; `evictions` counts cached blocks that were given to another owner.
    """

    total: int
    used: int
    cached: int
    free: int
    query_tokens: int
    hit_tokens: int
    evictions: int


class BlockPool:
    """A fixed number of blocks; every operation costs O(1) per block it touches.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        enable_prefix_caching: whether contents are registered and found again.
        windows: the tokens that each group of layers sees; 0 means all.

    Raises:
        ValueError: `num_blocks` or `block_size` is below 1, or `windows` are not those of one group
            that sees all tokens or of groups of which some have a window.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        windows: Sequence[int] = (0,),
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a pool needs at least one block of one token, got num_blocks={num_blocks}, "
                f"block_size={block_size}"
            )
        # One group that sees everything is the common case, and the hot paths know it.
        self.uniform = tuple(windows) == (0,)
        if not self.uniform and not any(windows):
            raise ValueError(f"layers without window are one group, got windows={windows}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._enable_prefix_caching = enable_prefix_caching
        self._full = [g for g, window in enumerate(self.windows) if not window]
        self._sliding = [(g, window) for g, window in enumerate(self.windows) if window]
        self._references = [0] * num_blocks
        self._index = PrefixIndex(num_blocks, block_size, self.windows)
        # A stack: the block freed last is the likeliest to be in the processor's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Least recently used first. Beside a retired block stand others that retired with it.
        self._cached: OrderedDict[int, list[int] | None] = OrderedDict()
        self._num_beside = 0
        self._oldest: list[int] = []  # retired blocks that are older than those cached
        self._aside = 0  # free blocks that count as owned

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free and cached ones."""
        return len(self._free) + len(self._cached) + self._num_beside - self._aside

    @property
    def num_used(self) -> int:
        """Blocks owned by at least one request, or set aside for one."""
        idle = len(self._free) + len(self._cached) + self._num_beside
        return self.num_blocks - idle + self._aside

    @property
    def num_cached(self) -> int:
        """Blocks owned by nobody whose content can still be found."""
        return len(self._cached) + self._num_beside

    @property
    def stats(self) -> BlockPoolStats:
        """The pool's books at this moment."""
        return BlockPoolStats(
            total=self.num_blocks,
            used=self.num_used,
            cached=self.num_cached,
            free=len(self._free) - self._aside,
            query_tokens=self.query_tokens,
            hit_tokens=self.hit_tokens,
            evictions=self.evictions,
        )

    @property
    def enable_prefix_caching(self) -> bool:
        """Whether contents are registered and found; may change at any time."""
        return self._enable_prefix_caching

    @enable_prefix_caching.setter
    def enable_prefix_caching(self, enable: bool) -> None:
        if self._enable_prefix_caching and not enable:
            self.clear_prefix_cache()
        self._enable_prefix_caching = enable

    def new_tables(self, salt: bytes = b"") -> BlockTables:
        """Tables without blocks for a sequence in this pool; it shares with those of its salt."""
        return BlockTables.empty(len(self.windows), salt)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill in a group that sees all of them."""
        return -(-num_tokens // self.block_size)

    def longest(self, most: int) -> int:
        """Tokens of the longest sequence, of at most `most`, that fits the pool alone.

        Windows then slide a token a step if need be: a request alone is given smaller chunks.
        """
        if self.uniform:
            return min(most, self.num_blocks * self.block_size)
        return longest_sequence(self.windows, self.num_blocks, self.block_size, most)

    def match_prefix(self, tables: BlockTables, token_ids: Sequence[int]) -> Prefix:
        """The longest prefix of `token_ids`, whose empty tables are `tables`, that is in the cache.

        Never all of `token_ids`: the last token must be computed to get the next one. The blocks
        are not owned by this; hand them to `allocate` before anything else changes the pool.
        """
        return self._index.match(tables, token_ids)

    def missing(self, prefix: Prefix, num_tokens: int) -> int:
        """Blocks beyond `prefix` that a sequence of `num_tokens` tokens comes to own at once."""
        total = self.blocks_for(num_tokens)
        count = len(self._full) * (total - prefix.num_blocks)
        for group, window in self._sliding:
            shared = len(prefix.blocks[group])
            most = min(total - prefix.num_blocks + shared, window_blocks(window, self.block_size))
            count += most - shared
        return count

    def can_allocate(self, prefix: Prefix, num_tokens: int, reserve: int = 0) -> bool:
        """Whether `allocate` with the same arguments would succeed."""
        references = self._references
        idle = sum([not references[block] for blocks in prefix.blocks for block in blocks])
        return self.missing(prefix, num_tokens) + idle + reserve <= self.num_available

    def allocate(
        self,
        tables: BlockTables,
        prefix: Prefix,
        num_tokens: int,
        reserve: int = 0,
        most: int | None = None,
    ) -> bool:
        """Give the empty `tables` the blocks for `num_tokens` tokens, `prefix` shared among them.

        Groups with a window get blocks for the first `most` tokens only, or for fewer if they are
        not there, but for one token beyond `prefix`; `extend` gives more.

        Returns whether it succeeded; it changes nothing if fewer than `reserve` blocks would be
        left available.
        """
        if not self.can_allocate(prefix, num_tokens, reserve):
            return False
        if self._enable_prefix_caching:
            self.query_tokens += num_tokens
            self.hit_tokens += prefix.num_blocks * self.block_size
        references = self._references
        for group, blocks in enumerate(prefix.blocks):
            for block in blocks:
                if not references[block]:
                    del self._cached[block]
                references[block] += 1
            before = tables.given_up[group] = prefix.num_blocks - len(blocks)
            # Entries that nobody reads; block 0 always exists.
            tables.groups[group] += [0] * before + blocks
        self._index.mark_shared(tables, prefix)
        start = tables.capacity = prefix.num_blocks * self.block_size
        least = start + 1 if most is None else min(start + 1, most)
        return self.extend(tables, num_tokens, least, most, reserve)

    def extend(
        self,
        tables: BlockTables,
        num_tokens: int,
        least: int | None = None,
        most: int | None = None,
        reserve: int = 0,
    ) -> bool:
        """Make `tables` long enough for `num_tokens` tokens; False, and no change, if it cannot.

        Groups with a window are made long enough for the first `most` tokens, or for as many as
        leave `reserve` blocks available, but at least for `least`; both are all by default.
        """
        size = self.block_size
        total = -(-num_tokens // size)
        if self.uniform:
            table = tables.groups[0]
            missing = total - len(table)
            if missing > 0:
                if missing > self.num_available:
                    return False
                free, references = self._free, self._references
                if 1 < missing <= len(free) - self._aside:  # the same at once
                    taken = free[-missing:]
                    del free[-missing:]
                    taken.reverse()
                    for block in taken:
                        references[block] = 1
                    table += taken
                else:
                    table.extend([self._take() for _ in range(missing)])
            tables.capacity = len(table) * size
            return True
        least, most = (num_tokens if n is None else n for n in (least, most))
        return self._extend_groups(tables, total, least, most, reserve)

    def shrink(self, tables: BlockTables, num_tokens: int) -> None:
        """Give up the blocks behind those that `num_tokens` tokens fill.

        They hold nothing that is known to the prefix index: what was drafted and rejected, or room
        for it.
        """
        size = self.block_size
        total = -(-num_tokens // size)
        free, references = self._free, self._references
        for table in tables.groups:
            while len(table) > total:
                block = table.pop()
                references[block] -= 1
                free.append(block)
        tables.capacity = min(map(len, tables.groups)) * size

    def set_aside(self, count: int) -> None:
        """Let `count` more of the available blocks count as owned before anybody is given them.

        A negative count takes that back. Which blocks these will be makes no difference to anybody.
        """
        self._aside += count
        while len(self._free) < self._aside:
            self._free.append(self._evicted())

    def take_aside(self, tables: BlockTables, num_tokens: int) -> None:
        """`extend` by blocks that were set aside; for pools of one group without window."""
        self._aside -= -(-num_tokens // self.block_size) - len(tables.groups[0])
        self.extend(tables, num_tokens)

    def retire_aside(self, count: int) -> None:
        """Cache `count` blocks that were set aside, with contents that nobody will ask for."""
        if count:
            self._aside -= count
            retired = self._free[-count:]
            del self._free[-count:]
            self._cached[retired.pop()] = retired
            self._num_beside += count - 1

    def growth(self, tables: BlockTables, num_tokens: int, least: int) -> int:
        """Fewest blocks that `extend` with the same arguments takes."""
        total, needed = self.blocks_for(num_tokens), self.blocks_for(least)
        groups = tables.groups
        missing = sum(total - len(groups[group]) for group in self._full)
        return missing + sum(max(0, needed - len(groups[group])) for group, _ in self._sliding)

    def give_up_before(self, tables: BlockTables, num_tokens: int) -> None:
        """Give up the blocks that no token after the first `num_tokens` sees.

        The next token, at position `num_tokens`, sees those from `num_tokens - window + 1` on.
        """
        for group, window in self._sliding:
            first = (num_tokens - window + 1) // self.block_size
            given_up = tables.given_up[group]
            if first > given_up:
                for block in tables.groups[group][given_up:first]:
                    self._release(block)
                tables.given_up[group] = first

    def register(self, tables: BlockTables, token_ids: Sequence[int], end: int) -> None:
        """Make the blocks findable that the first `end` tokens fill.

        To be called once the step that computed them has run: what the index knows is in the
        cache.
        """
        if self._enable_prefix_caching:
            self._index.register(tables, token_ids, end)

    def free(self, tables: BlockTables) -> None:
        """Give up the blocks of `tables` and empty them.

        Last position first, so that a sequence's tail is evicted before the prefix it hangs on.
        """
        if self.uniform:
            table, references, key = tables.groups[0], self._references, self._index.key
            for block in reversed(table):  # `_release` of each, without the calls
                references[block] -= 1
                if not references[block]:
                    if key[block] is None:
                        self._free.append(block)
                    else:
                        self._cached[block] = None
            table.clear()
        else:
            for position in range(max(map(len, tables.groups)) - 1, -1, -1):
                for table, given_up in zip(tables.groups, tables.given_up, strict=True):
                    if given_up <= position < len(table):
                        self._release(table[position])
            for group, table in enumerate(tables.groups):
                table.clear()
                tables.given_up[group] = 0
        tables.capacity = 0
        tables.num_registered = 0

    def clear_prefix_cache(self) -> None:
        """Forget every content; blocks owned by requests stay theirs."""
        self._index.clear()
        self._free += [*self._cached, *self._beside()]
        self._cached.clear()
        self._oldest.clear()
        self._num_beside = 0

    def check_integrity(self, owners: Iterable[BlockTables]) -> None:
        """Check that every block is free, owned or cached, given the tables of all owners.

        Raises:
            BlockPoolCorrupt: the books do not add up; the text says which block and why.
        """
        cached = {block for block, beside in self._cached.items() if beside is None}
        retired = [*(self._cached.keys() - cached), *self._beside()]
        places = BlockPlaces(self._references, self._free, cached, retired, self._index)
        check_places(places, owners, self.block_size)

    def _extend_groups(
        self, tables: BlockTables, total: int, least: int, most: int, reserve: int
    ) -> bool:
        """`extend` with windows; `total` is in blocks."""
        groups = tables.groups
        sliding = self._sliding
        spare = self.num_available - sum(total - len(groups[group]) for group in self._full)
        length = len(groups[sliding[0][0]])  # windowed groups of a sequence are equally long
        needed = max(0, self.blocks_for(least) - length)
        if needed * len(sliding) > spare:
            return False
        wanted = self.blocks_for(most) - length
        count = max(needed, min(wanted, (spare - reserve) // len(sliding)))
        for group, _ in sliding:
            groups[group].extend([self._take() for _ in range(count)])
        for group in self._full:
            groups[group].extend([self._take() for _ in range(total - len(groups[group]))])
        tables.capacity = min(map(len, groups)) * self.block_size
        return True

    def _release(self, block: int) -> None:
        """Take one owner from a block."""
        references = self._references
        references[block] -= 1
        if not references[block]:
            if self._index.key[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def _take(self) -> int:
        """A block of one owner, unregistered; the caller made sure that one is available."""
        block = self._free.pop() if len(self._free) > self._aside else self._evicted()
        self._references[block] = 1
        return block

    def _evicted(self) -> int:
        """The cached block that nobody has used for longest, its content forgotten."""
        self.evictions += 1
        if self._oldest:
            self._num_beside -= 1
            return self._oldest.pop()
        block, beside = self._cached.popitem(last=False)
        if beside is None:
            self._index.forget(block)
        else:
            self._oldest = beside
        return block

    def _beside(self) -> list[int]:
        """The retired blocks that stand beside others."""
        return [*self._oldest, *(b for beside in self._cached.values() for b in beside or ())]


__all__ = ["BlockPool", "BlockPoolCorrupt", "BlockPoolStats"]
