"""Where contents are found again: for each group, the block that ends a known prefix.

A content is named by all tokens from the prompt's first on (`BlockTables.digest`), so equal names
mean equal prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_tables import BlockTables, Prefix


class PrefixIndex:
    """The names of contents and their blocks; who owns these is the pool's business.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens in a block.
        windows: the tokens that each group of layers sees; 0 means all.
    """

    def __init__(self, num_blocks: int, block_size: int, windows: Sequence[int]) -> None:
        self._block_size = block_size
        self._full = [g for g, window in enumerate(windows) if not window]
        self._sliding = [(g, window) for g, window in enumerate(windows) if window]
        self._blocks: list[dict[bytes, int]] = [{} for _ in windows]
        self._generation = 0  # counts how often everything was forgotten
        self.key: list[tuple[int, bytes] | None] = [None] * num_blocks
        """Group and name by which each block is found; None where it is not."""

    def __len__(self) -> int:
        """Blocks that can be found."""
        return sum(map(len, self._blocks))

    def block(self, group: int, name: bytes) -> int | None:
        """The block of a group that holds a content, if one does."""
        return self._blocks[group].get(name)

    def match(self, tables: BlockTables, token_ids: Sequence[int]) -> Prefix:
        """The longest known prefix of a sequence, short of its last token.

        A group without window must have all of its blocks; of a group with one, what the next token
        sees suffices.
        """
        most = (len(token_ids) - 1) // self._block_size if any(self._blocks) else 0
        if self._sliding:
            return self._match_windows(tables, token_ids, most)
        size = self._block_size
        found: list[int] = []
        index = self._blocks[0]
        for i in range(most):
            block = index.get(tables.digest(token_ids, size, i))
            if block is None:
                break
            found.append(block)
        return Prefix(len(found), (found,))

    def register(self, tables: BlockTables, token_ids: Sequence[int], end: int) -> None:
        """Make the blocks findable that the first `end` tokens fill."""
        if tables.generation != self._generation:
            tables.generation, tables.num_registered = self._generation, 0
        count = end // self._block_size
        if count > len(tables.digests):
            tables.digest(token_ids, self._block_size, count - 1)
        names, keys = tables.digests, self.key
        for group, table in enumerate(tables.groups):
            index = self._blocks[group]
            first = max(tables.num_registered, tables.given_up[group])
            for name, block in zip(names[first:count], table[first:count], strict=True):
                # Of two copies that were computed at the same time, the second stays unknown.
                if name not in index:
                    index[name] = block
                    keys[block] = (group, name)
        tables.num_registered = count

    def mark_shared(self, tables: BlockTables, prefix: Prefix) -> None:
        """Note that the tables begin with a prefix that was found here."""
        tables.generation, tables.num_registered = self._generation, prefix.num_blocks

    def forget(self, block: int) -> None:
        """Let a block that can be found be found no longer."""
        key = self.key[block]
        assert key is not None
        del self._blocks[key[0]][key[1]]
        self.key[block] = None

    def clear(self) -> None:
        """Forget everything."""
        for index in self._blocks:
            index.clear()
        self.key = [None] * len(self.key)
        self._generation += 1

    def _match_windows(self, tables: BlockTables, token_ids: Sequence[int], most: int) -> Prefix:
        """`match` with windows: the beginning of a known prefix need not be one."""
        hits: list[list[int]] = [[] for _ in self._blocks]
        runs = [0] * len(self._blocks)  # known blocks in a row, up to the current one
        found = 0
        for i in range(most):
            name = tables.digest(token_ids, self._block_size, i)
            for group, index in enumerate(self._blocks):
                block = index.get(name)
                hits[group].append(-1 if block is None else block)
                runs[group] = 0 if block is None else runs[group] + 1
            if any(runs[group] <= i for group in self._full):
                break
            if all(runs[group] >= self._seen(window, i + 1) for group, window in self._sliding):
                found = i + 1
        blocks = [hit[:found] for hit in hits]
        for group, window in self._sliding:
            blocks[group] = blocks[group][found - self._seen(window, found) :]
        return Prefix(found, tuple(blocks))

    def _seen(self, window: int, num_blocks: int) -> int:
        """How many of the first `num_blocks` blocks hold something that the next token sees."""
        first_seen = max(0, num_blocks * self._block_size - window + 1)
        return num_blocks - first_seen // self._block_size
