"""Whether a pool's books add up: each block free, owned or cached, and found where it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from engine.block_tables import BlockTables
from engine.errors import EngineError
from engine.prefix_index import PrefixIndex


class BlockPoolCorrupt(EngineError):
    """The pool's books do not add up: a fault of the engine."""


@dataclass(frozen=True, slots=True)
class BlockPlaces:
    """Where a pool has its blocks: owners of each, those free and cached, and what is known.

    Those retired are cached without being known.
    """

    references: Sequence[int]
    free: Sequence[int]
    cached: Collection[int]
    retired: Iterable[int]
    index: PrefixIndex


def check_places(books: BlockPlaces, owners: Iterable[BlockTables], block_size: int) -> None:
    """Check that every block is free, owned or cached, given the tables of all owners.

    Raises:
        BlockPoolCorrupt: the books do not add up; the text says which block and why.
    """
    counts: Counter[int] = Counter()
    places: dict[int, tuple[int, int]] = {}
    for tables in owners:
        _check_tables(tables, counts, places, block_size)
    free, retired = Counter(books.free), Counter(books.retired)
    for block, (references, key) in enumerate(zip(books.references, books.index.key, strict=True)):
        if references != counts[block]:
            raise BlockPoolCorrupt(
                f"block {block} has reference count {references} and {counts[block]} owners"
            )
        homes = free[block] + (block in books.cached) + retired[block] + (counts[block] > 0)
        if homes != 1:
            raise BlockPoolCorrupt(f"block {block} is in {homes} places, not in one")
        if key is None:
            if block in books.cached:
                raise BlockPoolCorrupt(f"block {block} is cached but cannot be found")
            continue
        if books.index.block(*key) != block:
            raise BlockPoolCorrupt(f"block {block} has a key that does not lead to it")
        if free[block]:
            raise BlockPoolCorrupt(f"block {block} is free but its content is known")
        if block in places and places[block][0] != key[0]:
            raise BlockPoolCorrupt(f"block {block} is known in another group than it is used")
    if len(books.index) != sum(key is not None for key in books.index.key):
        raise BlockPoolCorrupt("the prefix index leads to a block that does not know its key")


def _check_tables(
    tables: BlockTables,
    counts: Counter[int],
    places: dict[int, tuple[int, int]],
    block_size: int,
) -> None:
    """Count one owner's blocks and check that they are where others have them."""
    owned = [block for blocks in tables.owned() for block in blocks]
    if len(set(owned)) != len(owned):
        raise BlockPoolCorrupt(f"block tables list a block twice: {tables.owned()}")
    if tables.capacity != min(map(len, tables.groups)) * block_size:
        raise BlockPoolCorrupt(f"block tables do not reach {tables.capacity} tokens")
    counts.update(owned)
    for group, table in enumerate(tables.groups):
        for position in range(tables.given_up[group], len(table)):
            place = (group, position)
            if places.setdefault(table[position], place) != place:
                raise BlockPoolCorrupt(f"block {table[position]} is shared by two places")
