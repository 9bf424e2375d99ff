"""In which order contenders run in a round of the proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def proof_order(contenders: Sequence[T], round_: int) -> list[T]:
    """There and back again: who ends a round begins the next, and its server goes on.

    Each goes first as often as last, so that a machine that slows down or warms up favours none,
    and of n contenders in r rounds r - 1 starts are spared.
    """
    return list(contenders) if round_ % 2 == 0 else list(reversed(contenders))
