"""Drafts that were not verified, judged by what the requests then got.

Where drafting is cheap and verifying is not, this tells at no cost whether it would have paid: a
token that is chosen without chance is accepted if and only if it is the one that comes anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import Request
from engine.speculate.acceptance_history import Verified
from engine.speculate.draft import Draft

# Each takes a microsecond of every step at most. Of whom nothing is known seems no better than all
# others, so that fewer would leave many of a full batch without what they deserve.
MOST_FOLLOWED = 64


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

        One that is followed already goes on: to judge only those that turn out wrong soon would
        say that they do.
        """
        if draft.parents is not None or draft.probabilities is not None:
            return
        if request not in self._followed and len(self._followed) < MOST_FOLLOWED:
            self._followed[request] = _Followed(draft)

    def observe(self, request: Request, tokens: Sequence[int]) -> Verified | None:
        """What the request got in a step; the draft's verdict, once it has one."""
        followed = self._followed.get(request)
        if followed is None:
            return None
        draft = followed.draft
        for token in tokens:
            if token != draft.token_ids[followed.right]:
                break
            followed.right += 1
            if followed.right == len(draft):
                break
        else:
            return None
        del self._followed[request]
        return Verified(request, draft, range(followed.right))

    def __contains__(self, request: Request) -> bool:
        return request in self._followed

    def __len__(self) -> int:
        return len(self._followed)

    def forget(self, request: Request) -> None:
        """Judge nothing of this request any more."""
        self._followed.pop(request, None)
