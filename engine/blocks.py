"""The KV cache's blocks: who owns them, what they hold, which goes next.

A block holds the keys and values of `block_size` tokens. It is in exactly one of three places:

- owned by one or more requests (`reference count` > 0),
- cached: owned by nobody, its content still known to the prefix index, evicted least recently
  used first,
- free: owned by nobody, content forgotten.

The pool knows block ids only; the tensors behind them are the executor's.

The prefix index maps (content of the block before, the block's own tokens) to a block. Contents
are numbered as they are registered and a number is never used twice, so a key names one token
sequence from the prompt's first token on: equal keys mean equal prefixes, with no hash to collide.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.errors import EngineError

_Key = tuple[int, tuple[int, ...]]

_NO_CONTENT = 0
"""Content number of what is not registered, and of the empty prefix before a first block."""


class BlockPoolCorrupt(EngineError):
    """The pool's books do not add up: a fault of the engine."""


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

    A request's block table is a plain list of block ids that the pool extends and empties; between
    `allocate` and `free` it only grows at its end.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        enable_prefix_caching: whether contents are registered and found again.

    Raises:
        ValueError: `num_blocks` or `block_size` is below 1.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a pool needs at least one block of one token, got num_blocks={num_blocks}, "
                f"block_size={block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.query_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._content = [_NO_CONTENT] * num_blocks
        self._last_content = _NO_CONTENT
        self._key: list[_Key | None] = [None] * num_blocks
        self._index: dict[_Key, int] = {}
        # A stack: the block freed last is the likeliest to be in the processor's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks owned by at least one request."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks owned by nobody whose content can still be found."""
        return len(self._cached)

    @property
    def stats(self) -> BlockPoolStats:
        """The pool's books at this moment."""
        return BlockPoolStats(
            total=self.num_blocks,
            used=self.num_used,
            cached=len(self._cached),
            free=len(self._free),
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

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known prefix of `token_ids`, in order.

        Never all of `token_ids`: the last token must be computed to get the next one. The blocks
        are not owned by this; hand them to `allocate` before anything else changes the pool.
        """
        blocks: list[int] = []
        if not self._index:
            return blocks
        size = self.block_size
        content = _NO_CONTENT
        for start in range(0, len(token_ids) - size, size):
            block = self._index.get((content, tuple(token_ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            content = self._content[block]
        return blocks

    def can_allocate(self, prefix: Sequence[int], num_tokens: int, reserve: int = 0) -> bool:
        """Whether `allocate` with the same arguments would succeed."""
        references = self._references
        idle = sum(1 for block in prefix if not references[block])
        fresh = self.blocks_for(num_tokens) - len(prefix)
        return fresh + idle + reserve <= self.num_available

    def allocate(
        self, table: list[int], prefix: Sequence[int], num_tokens: int, reserve: int = 0
    ) -> bool:
        """Give the empty `table` the blocks for `num_tokens` tokens, `prefix` shared among them.

        Returns whether it succeeded; it changes nothing if fewer than `reserve` blocks would be
        left available.
        """
        if not self.can_allocate(prefix, num_tokens, reserve):
            return False
        if self._enable_prefix_caching:
            self.query_tokens += num_tokens
            self.hit_tokens += len(prefix) * self.block_size
        references = self._references
        for block in prefix:
            if not references[block]:
                del self._cached[block]
            references[block] += 1
        table.extend(prefix)
        for _ in range(self.blocks_for(num_tokens) - len(prefix)):
            table.append(self._take())
        return True

    def extend(self, table: list[int], num_tokens: int) -> bool:
        """Make `table` long enough for `num_tokens` tokens; False, and no change, if it cannot."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            table.append(self._take())
        return True

    def register(self, table: list[int], token_ids: list[int], start: int, end: int) -> None:
        """Make the blocks that tokens `start` to `end` filled findable.

        To be called once the step that computed them has run: what the index knows is in the
        cache.
        """
        if not self._enable_prefix_caching:
            return
        size = self.block_size
        content = self._content
        first = start // size
        # Blocks filled while caching was off, or before the cache was cleared, come first.
        while first and content[table[first - 1]] == _NO_CONTENT:
            first -= 1
        for i in range(first, end // size):
            block = table[i]
            before = content[table[i - 1]] if i else _NO_CONTENT
            key = (before, tuple(token_ids[i * size : (i + 1) * size]))
            known = self._index.get(key)
            if known is None:
                self._last_content += 1
                content[block] = self._last_content
                self._index[key] = block
                self._key[block] = key
            else:
                # Computed twice at the same time. The copy stays where it is, since tables only
                # grow; what follows it is registered as following the first.
                content[block] = content[known]

    def free(self, table: list[int]) -> None:
        """Give up the blocks of `table` and empty it.

        Last block first, so that a sequence's tail is evicted before the prefix it hangs on.
        """
        references = self._references
        while table:
            block = table.pop()
            references[block] -= 1
            if references[block]:
                continue
            if self._key[block] is None:
                self._content[block] = _NO_CONTENT
                self._free.append(block)
            else:
                self._cached[block] = None

    def clear_prefix_cache(self) -> None:
        """Forget every content; blocks owned by requests stay theirs."""
        for block in self._index.values():
            self._key[block] = None
        self._index.clear()
        self._content = [_NO_CONTENT] * self.num_blocks
        self._free.extend(self._cached)
        self._cached.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that every block is free, owned or cached, given the tables of all owners.

        Raises:
            BlockPoolCorrupt: the books do not add up; the text says which block and why.
        """
        owners: Counter[int] = Counter()
        for table in tables:
            if len(set(table)) != len(table):
                raise BlockPoolCorrupt(f"a block table lists a block twice: {list(table)}")
            owners.update(table)
        free = Counter(self._free)
        for block in range(self.num_blocks):
            if self._references[block] != owners[block]:
                raise BlockPoolCorrupt(
                    f"block {block} has reference count {self._references[block]} and "
                    f"{owners[block]} owners"
                )
            places = free[block] + (block in self._cached) + (owners[block] > 0)
            if places != 1:
                raise BlockPoolCorrupt(f"block {block} is in {places} places, not in one")
            key = self._key[block]
            if key is not None and self._index.get(key) != block:
                raise BlockPoolCorrupt(f"block {block} has a key that does not lead to it")
            if block in self._cached and key is None:
                raise BlockPoolCorrupt(f"block {block} is cached but cannot be found")
            if free[block] and (key is not None or self._content[block] != _NO_CONTENT):
                raise BlockPoolCorrupt(f"block {block} is free but its content is known")
        if len(self._index) != sum(key is not None for key in self._key):
            raise BlockPoolCorrupt("the prefix index leads to a block that does not know its key")

    def _take(self) -> int:
        """A block of one owner, unregistered; the caller made sure that one is available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._key[block]
            assert key is not None
            del self._index[key]
            self._key[block] = None
            self._content[block] = _NO_CONTENT
            self.evictions += 1
        self._references[block] = 1
        return block
