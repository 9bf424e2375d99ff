"""Tokens that were guessed to follow a request's last one, to be verified in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what schedules imports no torch
    from torch import Tensor

# A step's tree masks are 64 bits wide: the request's last token and so many drafted ones.
MOST_DRAFTED = 63


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens, a chain or a tree.

    Args:
        token_ids: the drafted tokens, at most `MOST_DRAFTED`.
        parents: of a tree, the index among `token_ids` of the token that each one follows, -1 for
            the request's last token; parents come before their children, and children of one
            parent differ. None is a chain, each token following the one before.
        probabilities: of a chain whose tokens were drawn by chance, what each was drawn from:
            float32 [drafted, vocabulary], on the model's device. None where a token was chosen
            without chance: it is accepted as often as the model itself would choose it.
        chances: the proposer's own estimate, for each token, that it and all it follows are
            accepted; None where it has none. They fall from token to token.

    Any first part of a draft is a draft: `first`.
    """

    token_ids: Sequence[int]
    parents: Sequence[int] | None = None
    probabilities: Tensor | None = None
    chances: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def first(self, count: int) -> Draft:
        """The draft of the first `count` tokens."""
        if count >= len(self.token_ids):
            return self
        return Draft(
            self.token_ids[:count],
            None if self.parents is None else self.parents[:count],
            None if self.probabilities is None else self.probabilities[:count],
            None if self.chances is None else self.chances[:count],
        )

    def path(self, index: int) -> list[int]:
        """The indices from the first drafted token to the one at `index`, which is the last."""
        if self.parents is None:
            return list(range(index + 1))
        path = []
        while index >= 0:
            path.append(index)
            index = self.parents[index]
        return path[::-1]

    def right_path(self, coming: Sequence[int]) -> Sequence[int]:
        """The indices of the drafted tokens that agree with what comes, from the first one on."""
        if self.parents is None:
            count = 0
            for drafted, token in zip(self.token_ids, coming, strict=False):
                if drafted != token:
                    break
                count += 1
            return range(count)
        path: list[int] = []
        at = -1
        for index, (drafted, parent) in enumerate(zip(self.token_ids, self.parents, strict=True)):
            if parent == at and len(path) < len(coming) and drafted == coming[len(path)]:
                path.append(index)
                at = index
        return path

    def depths(self) -> list[int]:
        """How far each token lies beyond the request's last one, from 1."""
        if self.parents is None:
            return list(range(1, len(self.token_ids) + 1))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths
