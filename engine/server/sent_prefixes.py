"""What a router remembers of the prompts that it sent to one engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from engine.server.prompt_prefixes import BLOCK_TOKENS, Asked

# What an engine whose cache is of unknown size is taken to hold.
DEFAULT_CACHE_TOKENS = 1 << 18


class SentPrefixes:
    """The blocks of prompts that are likely to be in an engine's cache: those last sent there.

    Blocks that were not part of a prompt for longest are forgotten first, and of one prompt its
    end before its beginning, as the engine evicts them.

    Args:
        cache_tokens: how many tokens the engine's cache holds.
    """

    def __init__(self, cache_tokens: int = DEFAULT_CACHE_TOKENS) -> None:
        self._most = 0
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self.resize(cache_tokens)

    def __len__(self) -> int:
        return len(self._names)

    def resize(self, cache_tokens: int) -> None:
        """Remember what a cache of so many tokens holds."""
        self._most = max(1, cache_tokens // BLOCK_TOKENS)
        self._forget()

    def known(self, asked: Asked) -> int:
        """How many leading blocks of the prompts were sent there, and are not forgotten."""
        return sum(self._leading(names) for names in asked.prompts)

    def add(self, asked: Asked) -> None:
        """Remember that the prompts were sent there."""
        known = self._names
        for names in asked.prompts:
            for name in reversed(names[: self._most]):
                known[name] = None
                known.move_to_end(name)
        self._forget()

    def clear(self) -> None:
        """Forget everything: the engine was started again."""
        self._names.clear()

    def _leading(self, names: Sequence[bytes]) -> int:
        known = self._names
        return next((i for i, name in enumerate(names) if name not in known), len(names))

    def _forget(self) -> None:
        while len(self._names) > self._most:
            self._names.popitem(last=False)
