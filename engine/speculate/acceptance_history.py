"""What was accepted lately, and how likely that makes the tokens drafted next.

Three views of the same events, each forgetting exponentially. Of chains, the chance of a token
given that those before it were accepted, by depth. Of drafts whose proposer has an estimate of its
own, by how much it is too sure or too doubtful of itself, by chance. And of each request, by how
much it does better or worse than these say. The last two are counts of what was accepted and
rejected beside what was expected, and become a factor on the odds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.request import Request
from engine.speculate.draft import MOST_DRAFTED, Draft

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Verified drafts after which a memory fades to 1/e: of all requests, and of one.
SHARED_MEMORY = 256.0
OWN_MEMORY = 16.0
# How much evidence, in tokens, weighs as much as what was believed before.
DEPTH_WEIGHT = 4.0
BIN_WEIGHT = 4.0
OWN_WEIGHT = 4.0
# Believed of a first token before anything was seen: high enough for a try where it may pay.
FIRST_CHANCE = 0.7
LEAST_CHANCE = 1e-4

# Bins of the proposer's chances, evenly by their log-odds.
_LOWEST_LOG_ODDS, _HIGHEST_LOG_ODDS, _NUM_BINS = -6.0, 6.0, 13


class Verified(NamedTuple):
    """A draft that was judged: of which request, how much of it, and which part was right.

    `path` are the indices of the accepted tokens, in order.
    """

    request: Request
    draft: Draft
    path: Sequence[int]


def odds_factor(
    accepted: Floats, rejected: Floats, expected: Floats, unexpected: Floats, weight: float
) -> Floats:
    """By how much the odds of acceptance differ from those that were expected.

    `expected` are the acceptances and `unexpected` the rejections that were expected; `weight` is
    how much evidence, in tokens, is needed to believe half of the difference.
    """
    return ((accepted + weight) / (expected + weight)) / (
        (rejected + weight) / (unexpected + weight)
    )


def with_odds_factor(chances: Floats, factor: Floats) -> Floats:
    """Chances whose odds are multiplied by `factor`; both broadcast."""
    scaled = chances * factor
    return scaled / (1.0 - chances + scaled)


class AcceptanceHistory:
    """Estimates, for each drafted token, the chance that it and all it follows are accepted."""

    def __init__(self) -> None:
        # Row 1: of requests whose last draft was accepted whole, row 0: of the others. Text is
        # copied in runs, so that these differ widely.
        self._tried = np.zeros((2, MOST_DRAFTED))
        self._accepted = np.zeros((2, MOST_DRAFTED))
        # By a tree's index, of all drafts that reached so far, whatever came before.
        self._tree_tried = np.zeros(MOST_DRAFTED)
        self._tree_accepted = np.zeros(MOST_DRAFTED)
        self._bin_tried = np.zeros(_NUM_BINS)
        self._bin_accepted = np.zeros(_NUM_BINS)
        self._bin_expected = np.zeros(_NUM_BINS)
        self._slots: dict[Request, int] = {}
        self._free: list[int] = []
        # Of each request: accepted, rejected, expected, unexpected tokens, its last draft whole.
        self._own = np.zeros((16, 5))
        self._hazards: Floats | None = None
        self.sees_trees = False

    def survival(
        self, requests: Sequence[Request], depth: int, optimism: float = 0.0
    ) -> Floats:
        """Chances of a chain's tokens, whose proposer has none of its own: [requests, depth].

        `optimism`: so many standard errors above the likeliest.
        """
        own = self._own_of(requests)
        shared = self._conditional()[:, :depth]
        if optimism:
            errors = np.sqrt(shared * (1.0 - shared) / (self._tried[:, :depth] + DEPTH_WEIGHT))
            shared = np.minimum(shared + optimism * errors, 1.0 - LEAST_CHANCE)
        hazards = shared[own[:, 4].astype(np.int64)]
        steps = with_odds_factor(hazards, self._factor(own)[:, None])
        return np.cumprod(steps, axis=1, out=steps)

    def calibrated(self, requests: Sequence[Request], chances: Floats) -> Floats:
        """What the proposer's own chances, float64 [requests, tokens], come to by experience."""
        own = self._own_of(requests)
        calibrated = with_odds_factor(
            chances, self._bin_factor(chances) * self._factor(own)[:, None]
        )
        return np.minimum.accumulate(calibrated, axis=1)

    def of_tree(self, requests: Sequence[Request], size: int) -> Floats:
        """Chances of a tree's tokens before it is drafted: [requests, size]."""
        marginals = np.empty(size)
        chance = FIRST_CHANCE
        for i in range(size):
            chance = (self._tree_accepted[i] + DEPTH_WEIGHT * chance) / (
                self._tree_tried[i] + DEPTH_WEIGHT
            )
            marginals[i] = chance
            chance *= 0.8
        own = self._own_of(requests)
        return with_odds_factor(np.minimum.accumulate(marginals), self._factor(own)[:, None])

    def record(self, verified: Sequence[Verified]) -> None:
        """Take in a step's judged drafts; of each request at most one."""
        if not verified:
            return
        chains = [v for v in verified if v.draft.parents is None]
        if chains:
            self._record_by_depth(chains)
        claimed = [v for v in verified if v.draft.chances is not None]
        if claimed:
            self._record_chances(claimed)
        for one in verified:
            if one.draft.parents is not None:
                self._record_tree(one)

    def forget(self, request: Request) -> None:
        """The request left; nothing of it was lost for the others."""
        slot = self._slots.pop(request, None)
        if slot is not None:
            self._own[slot] = 0.0
            self._free.append(slot)

    def _record_by_depth(self, verified: Sequence[Verified]) -> None:
        """Chains: the chance of each depth, where it was reached."""
        hazards = self._conditional()
        slots = self._slots_of([v.request for v in verified])
        lengths = np.array([len(v.draft) for v in verified])
        accepted = np.array([len(v.path) for v in verified])
        tried = np.minimum(accepted + 1, lengths)
        own = self._own[slots]
        runs = own[:, 4].astype(np.int64)
        plain = np.array([v.draft.chances is None for v in verified])
        if plain.any():
            expected = np.cumsum(hazards, axis=1)[runs, tried - 1]
            self._record_own(
                slots[plain], own[plain], accepted[plain], tried[plain], expected[plain]
            )
        self._own[slots, 4] = accepted == lengths
        for run in (0, 1):
            of = runs == run
            if of.any():
                kept = np.exp(-np.count_nonzero(of) / SHARED_MEMORY)
                self._tried[run] = self._tried[run] * kept + _reached(tried[of])
                self._accepted[run] = self._accepted[run] * kept + _reached(accepted[of])
        self._hazards = None

    def _record_chances(self, verified: Sequence[Verified]) -> None:
        """Own chances: whether each token was accepted, whatever came before it."""
        lengths = np.array([len(v.draft) for v in verified])
        claimed = np.concatenate([np.asarray(v.draft.chances, np.float64) for v in verified])
        claimed = np.clip(claimed, LEAST_CHANCE, 1 - LEAST_CHANCE)
        right = np.zeros(len(claimed))
        begin = 0
        for one in verified:
            for index in one.path:
                right[begin + index] = 1.0
            begin += len(one.draft)
        rows = np.repeat(np.arange(len(verified)), lengths)
        expected = np.bincount(rows, with_odds_factor(claimed, self._bin_factor(claimed)))
        slots = self._slots_of([v.request for v in verified])
        accepted = np.bincount(rows, right)
        self._record_own(slots, self._own[slots], accepted, lengths, expected)
        bins = np.rint(_bin_of(claimed)).astype(np.int64)
        kept = np.exp(-len(verified) / SHARED_MEMORY)
        for memory, values in (
            (self._bin_tried, None),
            (self._bin_accepted, right),
            (self._bin_expected, claimed),
        ):
            memory *= kept
            memory += np.bincount(bins, values, minlength=_NUM_BINS)

    def _record_tree(self, verified: Verified) -> None:
        self.sees_trees = True
        size = len(verified.draft)
        kept = np.exp(-1.0 / SHARED_MEMORY)
        self._tree_tried[:size] = self._tree_tried[:size] * kept + 1.0
        self._tree_accepted[:size] *= kept
        self._tree_accepted[list(verified.path)] += 1.0

    def _record_own(
        self,
        slots: Ints,
        own: Floats,
        accepted: NDArray[np.generic],
        tried: NDArray[np.generic],
        expected: Floats,
    ) -> None:
        """Add to each request's account what was accepted, and what its kind of draft promised."""
        own = own * np.exp(-1.0 / OWN_MEMORY)
        own[:, 0] += accepted
        own[:, 1] += tried - accepted
        own[:, 2] += expected
        own[:, 3] += tried - expected
        self._own[slots, :4] = own[:, :4]

    def _factor(self, own: Floats) -> Floats:
        return odds_factor(own[:, 0], own[:, 1], own[:, 2], own[:, 3], OWN_WEIGHT)

    def _conditional(self) -> Floats:
        """The chance at each depth given all before it, [2, depths], for the two kinds of requests.

        A depth that was seldom reached is believed to be like the one before it, and requests in a
        run like the others.
        """
        if self._hazards is None:
            chances = np.empty((2, MOST_DRAFTED))
            believed = [FIRST_CHANCE] * 2
            for run in (0, 1):
                tried, accepted = self._tried[run].tolist(), self._accepted[run].tolist()
                chance = believed[run]
                for depth in range(MOST_DRAFTED):
                    seen = tried[depth]
                    if seen < 1e-3 and depth:  # nor was anything deeper
                        chances[run, depth:] = chance
                        break
                    chance = (accepted[depth] + DEPTH_WEIGHT * chance) / (seen + DEPTH_WEIGHT)
                    chances[run, depth] = chance
                believed[1] = max(FIRST_CHANCE, chances[0, 0])
            np.clip(chances, LEAST_CHANCE, 1 - LEAST_CHANCE, out=chances)
            self._hazards = chances
        return self._hazards

    def _bin_factor(self, chances: Floats) -> Floats:
        """By how much the odds of such chances are to be corrected."""
        factors = odds_factor(
            self._bin_accepted,
            self._bin_tried - self._bin_accepted,
            self._bin_expected,
            self._bin_tried - self._bin_expected,
            BIN_WEIGHT,
        )
        bins = np.arange(_NUM_BINS, dtype=np.float64)
        clipped = np.clip(chances, LEAST_CHANCE, 1 - LEAST_CHANCE)
        return np.exp(np.interp(_bin_of(clipped), bins, np.log(factors)))

    def _own_of(self, requests: Sequence[Request]) -> Floats:
        """Each request's account; asked for after its slots, for which the array may grow."""
        slots = self._slots_of(requests)
        return np.asarray(self._own[slots])

    def _slots_of(self, requests: Sequence[Request]) -> Ints:
        slots = self._slots
        try:
            return np.array([slots[r] for r in requests], dtype=np.int64)
        except KeyError:
            for request in requests:
                if request not in slots:
                    slots[request] = self._free.pop() if self._free else len(slots)
            while len(slots) + len(self._free) > len(self._own):
                self._own = np.concatenate([self._own, np.zeros_like(self._own)])
            return np.array([slots[r] for r in requests], dtype=np.int64)


def _reached(lengths: NDArray[np.generic]) -> Floats:
    """How many of the lengths are at least 1, 2, ... `MOST_DRAFTED`."""
    counts = np.bincount(lengths.astype(np.int64), minlength=MOST_DRAFTED + 1)[1:]
    return np.cumsum(counts[::-1])[::-1].astype(np.float64)


def _bin_of(chances: Floats) -> Floats:
    """Where chances lie on the scale of bins, between whole numbers."""
    log_odds = np.log(chances / (1.0 - chances))
    scale = (_NUM_BINS - 1) / (_HIGHEST_LOG_ODDS - _LOWEST_LOG_ODDS)
    return np.clip((log_odds - _LOWEST_LOG_ODDS) * scale, 0.0, _NUM_BINS - 1.0)
