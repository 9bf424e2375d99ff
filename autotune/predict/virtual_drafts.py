"""A proposer in virtual time: its drafts are right as often as is known of the real one's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotune.predict.drafting import DraftProfile, Trace
from autotune.predict.virtual_heads import (
    Heads,
    Place,
    places_by_depth,
    virtual_trees,
)
from engine.batch import ScheduledSequence
from engine.request import Request
from engine.speculate.draft import Draft

# Tokens from `first` on of what a request generates: (request, first, count).
Tokens = Callable[[Request, int, int], Sequence[int]]

# A drafted token that nobody generates.
_WRONG = 1 << 41
# Of how sure a model is of its tokens: the sum of the parameters of a beta distribution whose mean
# is their acceptance. What the embedded draft model says of its tokens, put right by experience,
# tells as much of them, on source code.
SURENESS = 3.0


@dataclass(slots=True)
class _Drafted:
    """What is remembered of a request: its chances, whether its last decode found something."""

    chance: random.Random
    trace: Trace | None
    found: bool
    preemptions: int
    computed: bool = False


class VirtualProposer:
    """Implements `engine.speculate.proposer.Proposer` from a `DraftProfile`.

    Args:
        profile: how drafts fare.
        tokens: what requests generate.
        seed: of chances; each request has its own.
    """

    def __init__(self, profile: DraftProfile, tokens: Tokens, seed: int) -> None:
        # Drafts end with a token whose chance is told to be below.
        self._floor = 0.0
        self.costs_device = profile.costs_device
        self._profile = profile
        self._tokens = tokens
        self._seed = seed
        self._seconds = 0.0
        self._known: dict[Request, _Drafted] = {}
        self._traces = list(profile.traces.values())
        self._strangers = 0  # requests so far that have no trace of their own
        # Chances to go on finding, and to begin to, whose long-run share is the profile's.
        share, run = profile.share, profile.run
        self._again = self._anew = share
        if run is not None and 0 < share < 1:
            stop = min(1.0 / run, (1.0 - share) / share)
            self._again = 1.0 - stop
            self._anew = stop * share / (1.0 - share)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft | None]:
        """See `Proposer`."""
        profile = self._profile
        drafts: list[Draft | None] = []
        trees: list[tuple[Request, _Drafted, int]] = []
        asked = depth = fresh = 0
        for request, limit in zip(requests, limits, strict=True):
            limit = min(limit, profile.deepest)
            if limit <= 0:
                drafts.append(None)
                continue
            known = self._drafted(request)
            asked += 1
            if not known.computed:
                fresh += request.num_prompt_tokens
                known.computed = True
            if profile.heads is not None:
                trees.append((request, known, limit))
                depth, draft = max(depth, limit), None
            else:
                draft = self._draft(request, known, limit)
                if draft is not None or profile.costs_device:
                    depth = max(depth, len(draft) if draft is not None and profile.knows else limit)
            drafts.append(draft)
        if trees and profile.heads is not None:
            found = iter(self._trees(profile.heads, trees))
            drafts = [next(found) if limit > 0 else None for limit in limits]
        self._seconds += profile.seconds(asked, depth, fresh)
        return drafts

    def lacking(self, requests: Sequence[Request]) -> list[int]:
        """Tokens of each request that a draft model has yet to compute."""
        found = []
        for request in requests:
            known = self._known.get(request)
            computed = (
                known is not None
                and known.computed
                and known.preemptions == request.num_preemptions
            )
            found.append(0 if computed else request.num_prompt_tokens)
        return found

    def clear(self) -> None:
        """See `Proposer`; nothing is kept."""

    def forget(self, request: Request) -> None:
        """See `Proposer`."""
        self._known.pop(request, None)

    def clock(self) -> float:
        """Seconds that drafting took in all."""
        return self._seconds

    def _drafted(self, request: Request) -> _Drafted:
        known = self._known.get(request)
        if known is None:
            name = request.request_id
            chance = random.Random(f"{self._seed}/{name}")
            trace = self._profile.traces.get(name)
            if trace is None and self._traces:
                # In turns, so that each counts as much as any other.
                trace = self._traces[self._strangers % len(self._traces)]
                self._strangers += 1
            found = chance.random() < self._profile.share
            known = _Drafted(chance, trace, found, request.num_preemptions)
            self._known[request] = known
        elif known.preemptions != request.num_preemptions:
            known.preemptions, known.computed = request.num_preemptions, False
        return known

    def _draft(self, request: Request, known: _Drafted, limit: int) -> Draft | None:
        generated = request.num_output_tokens
        chances: Sequence[float] | None = None
        if known.trace is not None:
            place = known.trace.place(generated)
            right = known.trace.right[place]
            if right < 0:
                return None
            if known.trace.chances:
                chances = known.trace.chances[place][:limit]
                limit = min(limit, len(chances))
            elif self._profile.knows:
                chances = self._sureness(known.chance, right, limit)
                limit = len(chances)
            right = min(right, limit)
        else:
            draw = known.chance.random
            known.found = draw() < (self._again if known.found else self._anew)
            if not known.found:
                return None
            if self._profile.knows:
                right, chances = self._told(known.chance, limit)
                limit = len(chances)
            else:
                right, chance = 0, self._profile.chance
                while right < limit and draw() < chance(right):
                    right += 1
        if limit <= 0:
            return None
        tokens = [*self._tokens(request, generated, right), *[_WRONG] * (limit - right)]
        return Draft(tokens, chances=chances)

    def _trees(self, heads: Heads, asked: Sequence[tuple[Request, _Drafted, int]]) -> list[Draft]:
        """What heads guess: where a trace says how deep that went, at a place that was as easy."""
        places = []
        for request, known, _ in asked:
            if known.trace is None:
                places.append(Place.drawn(known.chance, len(heads)))
                continue
            depth = known.trace.right[known.trace.place(request.num_output_tokens)]
            places.append(known.chance.choice(places_by_depth(heads)[min(depth, len(heads))]))
        return virtual_trees(
            heads.means,
            places,
            [limit for *_, limit in asked],
            [self._tokens(r, r.num_output_tokens, len(heads)) for r, *_ in asked],
            _WRONG,
        )

    def _sureness(self, draw: random.Random, right: int, limit: int) -> list[float]:
        """The chances that a proposer tells of a draft, of which `right` tokens are."""
        chances: list[float] = []
        chance = 1.0
        while len(chances) < limit and chance >= self._floor:
            place = len(chances)
            mean = min(max(self._profile.chance(place), 0.01), 0.99)
            # By Bayes: a right token makes it likelier that the proposer was sure of it.
            was_right = place < right
            chance *= draw.betavariate(
                SURENESS * mean + was_right, SURENESS * (1.0 - mean) + (not was_right)
            )
            chances.append(chance)
        return chances

    def _told(self, draw: random.Random, limit: int) -> tuple[int, list[float]]:
        """Right tokens of a draft whose proposer knows its chances, and these."""
        chances: list[float] = []
        chance, right, wrong = 1.0, 0, False
        while len(chances) < limit and chance >= self._floor:
            mean = self._profile.chance(len(chances))
            sure = mean if mean in (0.0, 1.0) else _beta(draw, mean)
            chance *= sure
            chances.append(chance)
            wrong = wrong or draw.random() >= sure
            right += not wrong
        return right, chances


class VirtualChains(VirtualProposer):
    """One whose chains end where they promise little: a `ChainProposer` of the engine."""

    @property
    def floor(self) -> float:
        """See `engine.speculate.proposer.ChainProposer`."""
        return self._floor

    @floor.setter
    def floor(self, chance: float) -> None:
        self._floor = chance


def _beta(draw: random.Random, mean: float) -> float:
    return draw.betavariate(SURENESS * mean, SURENESS * (1.0 - mean))


def verified(sequence: ScheduledSequence, tokens: Tokens) -> list[int]:
    """What a decode with a draft yields: the tokens drafted right, and one more."""
    request, draft = sequence.request, sequence.draft
    assert draft is not None
    first = request.num_output_tokens
    generated = list(tokens(request, first, len(draft) + 1))
    return generated[: len(draft.right_path(generated[:-1])) + 1]
