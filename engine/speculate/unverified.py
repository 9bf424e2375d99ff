"""Drafts that were not verified, judged by what the requests then got.

Where drafting is cheap and verifying is not, this tells at no cost whether it would have paid: a
token that is chosen without chance is accepted if and only if it is the one that comes anyway. Each
is judged when it comes: drafts that are wrong are known sooner than those that are right, and if
whole ones were waited for, those would be all that is known for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.request import Request
from engine.speculate.draft import Draft

# Each takes a microsecond of every step at most. Of whom nothing is known seems no better than all
# others, so that fewer would leave many of a full batch without what they deserve.
MOST_FOLLOWED = 64


class Progress(NamedTuple):
    """What came of a draft: its tokens from `start` up to `right` came, the next is `wrong`."""

    draft: Draft
    start: int
    right: int
    wrong: bool

    def judged(self) -> Draft:
        """The tokens that were judged, with their chances given that those before them came."""
        end = self.right + self.wrong
        chances = self.draft.chances
        if chances is not None:
            before = chances[self.start - 1] if self.start else 1.0
            chances = [chance / before for chance in chances[self.start : end]]
        return Draft(self.draft.token_ids[self.start : end], chances=chances)


@dataclass(slots=True)
class _Followed:
    draft: Draft
    right: int = 0


class UnverifiedDrafts:
    """Follows some chains that were drafted and dropped until they turn out wrong, or end."""

    def __init__(self) -> None:
        self._followed: dict[Request, _Followed] = {}

    def follow(self, request: Request, draft: Draft) -> None:
        """Compare what `request` gets from the next step on with this draft.

        One that is followed already goes on, as its later tokens are to be judged as well.
        """
        if draft.parents is not None or draft.probabilities is not None:
            return
        if request not in self._followed and len(self._followed) < MOST_FOLLOWED:
            self._followed[request] = _Followed(draft)

    def observe(self, request: Request, tokens: Sequence[int]) -> Progress | None:
        """What the request got in a step; what that tells of its draft."""
        followed = self._followed.get(request)
        if followed is None or not tokens:
            return None
        draft, start = followed.draft, followed.right
        expected = draft.token_ids[start : start + len(tokens)]
        came = 0
        while came < len(expected) and expected[came] == tokens[came]:
            came += 1
        followed.right = right = start + came
        wrong = came < len(expected)
        if wrong or right == len(draft):
            del self._followed[request]
        return Progress(draft, start, right, wrong)

    def __contains__(self, request: Request) -> bool:
        return request in self._followed

    def __len__(self) -> int:
        return len(self._followed)

    def forget(self, request: Request) -> None:
        """Judge nothing of this request any more."""
        self._followed.pop(request, None)
