"""Which drafted tokens a step accepted: those that the model chose itself."""

from __future__ import annotations

from collections.abc import Sequence

from engine.speculate.draft import Draft


def accepted_places(draft: Draft, chosen: Sequence[int]) -> list[int]:
    """The indices of the accepted tokens, from the first on.

    `chosen` are the tokens chosen after the request's last token and after each drafted one. The
    walk begins at the former: where a drafted token follows that is the one that was chosen, it is
    accepted, and the token chosen after it is looked at next. For tokens drafted without chance
    this is rejection sampling (Leviathan et al. 2023, arXiv 2211.17192): one is accepted as often
    as the model chooses it, and another is chosen in its place by what is left.
    """
    places: list[int] = []
    if draft.parents is None:
        for place, token in enumerate(draft.token_ids):
            if token != chosen[place]:
                break
            places.append(place)
        return places
    follows = {
        (parent, token): place
        for place, (parent, token) in enumerate(zip(draft.parents, draft.token_ids, strict=True))
    }
    place = -1
    while (child := follows.get((place, chosen[place + 1]))) is not None:
        places.append(child)
        place = child
    return places
