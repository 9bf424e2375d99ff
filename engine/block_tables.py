"""The blocks of one sequence, and the names by which their contents are found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple

DIGEST_BYTES = 16
TOKEN_BYTES = 8
_places: list[bytes] = []  # the numbers of blocks, as they stand in made-up names


@dataclass(slots=True, eq=False)
class BlockTables:
    """Which blocks hold a sequence's keys and values; changed by the `BlockPool` alone.

    `groups[g][i]` is the block of positions `i * block_size` and on for the layers of group g. The
    first `given_up[g]` entries stay for the sake of position; their blocks may be another's by now.
    `capacity` is how many tokens have their place in all groups.

    `digests[i]` names the sequence's tokens from the first to the end of block i, and `salt`: only
    sequences of one salt share blocks. The blocks before `num_registered` were made findable in the
    prefix index's life that `generation` numbers.
    """

    groups: list[list[int]] = field(default_factory=lambda: [[]])
    given_up: list[int] = field(default_factory=lambda: [0])
    capacity: int = 0
    digests: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    generation: int = 0
    salt: bytes = b""

    @classmethod
    def empty(cls, num_groups: int, salt: bytes = b"") -> BlockTables:
        """Tables without blocks."""
        return cls([[] for _ in range(num_groups)], [0] * num_groups, salt=salt)

    @property
    def num_owned(self) -> int:
        """Blocks owned in all groups."""
        return sum(map(len, self.groups)) - sum(self.given_up)

    def owned(self) -> list[list[int]]:
        """The blocks owned, by group, in the order of their positions."""
        return [table[n:] for table, n in zip(self.groups, self.given_up, strict=True)]

    def digest(self, token_ids: Sequence[int], block_size: int, number: int) -> bytes:
        """The name of all tokens up to the end of block `number`, kept once it was computed.

        BLAKE2b over the name of what comes before and the block's own tokens, 128 bits: that two
        prefixes share a name is as good as impossible, also for one who tries.
        """
        digests = self.digests
        if number < len(digests):
            return digests[number]
        name = digests[-1] if digests else self.salt
        tokens = token_ids[len(digests) * block_size : (number + 1) * block_size]
        packed, size = _packer(len(tokens))(*tokens), block_size * TOKEN_BYTES
        for start in range(0, len(packed), size):
            name = blake2b(name + packed[start : start + size], digest_size=DIGEST_BYTES).digest()
            digests.append(name)
        return name

    def name_as_unlike_any(self, number: int, whose: int) -> None:
        """Name the blocks up to `number` that have no name, cheaply, as nobody else's ever are.

        For a simulation, whose generated tokens are made up: each block must hold one that no other
        sequence has, and `whose` be this sequence's alone.
        """
        owner = whose.to_bytes(DIGEST_BYTES // 2)
        digests, places = self.digests, _places
        while len(places) <= number:
            places.append(len(places).to_bytes(DIGEST_BYTES // 2))
        digests += [owner + place for place in places[len(digests) : number + 1]]


def salt_of(text: str | None) -> bytes:
    """The `salt` of tables for a text that a request gives; empty for none.

    It is hashed apart from contents, so that no text can be made to name one.
    """
    if not text:
        return b""
    data = text.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=DIGEST_BYTES, person=b"salt").digest()


@lru_cache(maxsize=1024)
def _packer(count: int) -> Callable[..., bytes]:
    return Struct(f"{count}q").pack


class Prefix(NamedTuple):
    """What is known of a sequence's beginning: its first `num_blocks` blocks' worth of tokens.

    `blocks[g]` are the blocks that the next token sees in group g: all, or the last ones where the
    group has a window.
    """

    num_blocks: int
    blocks: tuple[list[int], ...]
