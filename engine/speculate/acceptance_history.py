"""What was accepted lately, and how likely that makes the tokens drafted next.

Three views of the same events, each forgetting exponentially. Of chains, the chance of a token
given that those before it were accepted, by depth. Of drafts whose proposer has an estimate of its
own, by how much it is too sure or too doubtful of itself, by chance. And of each request, by how
much it does better or worse than these say. The last two are counts of what was accepted and
rejected beside what was expected, and become a factor on the odds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from math import exp
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.request import Request
from engine.speculate.draft import MOST_DRAFTED, Draft

Floats = NDArray[np.float64]
_T = TypeVar("_T", float, Floats)

# Verified drafts after which a memory fades to 1/e: of all requests, and of one.
SHARED_MEMORY = 256.0
OWN_MEMORY = 8.0
_OWN_KEPT = exp(-1.0 / OWN_MEMORY)
# Tokens of a request without drafts after which what is known of it fades to 1/e.
OWN_TOKENS = 64.0
# Text is copied in runs, hence the short memory of one: it foretells the drafts of generated
# documentation better than longer ones do, and better than asking whether the last was right.
# How much evidence, in tokens, weighs as much as what was believed before.
DEPTH_WEIGHT = 4.0
BIN_WEIGHT = 4.0
# Verified drafts with chances that are taken in at once.
CLAIMS_TOGETHER = 64
OWN_WEIGHT = 3.0
# Believed of a first token before anything was seen: high enough for a try where it may pay.
FIRST_CHANCE = 0.7
LEAST_CHANCE = 1e-4

# Bins of the proposer's chances, evenly by their log-odds.
_LOWEST_LOG_ODDS, _HIGHEST_LOG_ODDS, _NUM_BINS = -6.0, 6.0, 13
_BIN_CHANCES = 1.0 / (1.0 + np.exp(-np.linspace(_LOWEST_LOG_ODDS, _HIGHEST_LOG_ODDS, _NUM_BINS)))


class Verified(NamedTuple):
    """A draft that was judged, and which part of it was right.

    `path` are the indices of the accepted tokens, in order.
    """

    request: Request
    draft: Draft
    path: Sequence[int]


def odds_factor(accepted: _T, rejected: _T, expected: _T, unexpected: _T, weight: float) -> _T:
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


@dataclass(slots=True)
class _Own:
    """One request's account; `factor` is what it came to, when it had `told_at` tokens."""

    accepted: float = 0.0
    rejected: float = 0.0
    expected: float = 0.0
    unexpected: float = 0.0
    factor: float = 1.0
    told_at: int = 0

    def add(self, accepted: float, tried: float, expected: float) -> None:
        """So many were accepted of those tried, where its kind of draft promised `expected`."""
        self.accepted = self.accepted * _OWN_KEPT + accepted
        self.rejected = self.rejected * _OWN_KEPT + tried - accepted
        self.expected = self.expected * _OWN_KEPT + expected
        self.unexpected = self.unexpected * _OWN_KEPT + tried - expected
        self.factor = odds_factor(
            self.accepted, self.rejected, self.expected, self.unexpected, OWN_WEIGHT
        )

    def faded(self, request: Request) -> float:
        """What the account comes to now: a text that went badly may go well later on."""
        since = len(request.token_ids) - self.told_at
        return self.factor if since <= 0 else self.factor ** exp(-since / OWN_TOKENS)


class AcceptanceHistory:
    """Estimates, for each drafted token, the chance that it and all it follows are accepted."""

    def __init__(self) -> None:
        # By depth, of the drafts that were right so far.
        self._tried = [0.0] * MOST_DRAFTED
        self._accepted = [0.0] * MOST_DRAFTED
        self._deepest = 0
        # By a tree's index, of all drafts that reached so far, whatever came before.
        self._tree_tried = np.zeros(MOST_DRAFTED)
        self._tree_accepted = np.zeros(MOST_DRAFTED)
        self._bin_tried = np.zeros(_NUM_BINS)
        self._bin_accepted = np.zeros(_NUM_BINS)
        self._bin_expected = np.zeros(_NUM_BINS)
        self._own: dict[Request, _Own] = {}
        self._unread: list[Verified] = []
        self.sees_trees = False
        self._update_conditional()

    def survival(self, requests: Sequence[Request], depth: int, optimism: float = 0.0) -> Floats:
        """Chances of a chain's tokens, whose proposer has none of its own: [requests, depth].

        `optimism`: so many standard errors above the likeliest, and what went badly some text ago
        is forgotten.
        """
        shared = self._conditional[:depth]
        if optimism:
            shared = _hoped(shared, np.array(self._tried[:depth]), optimism)
        factors = self._factors(requests, faded=optimism > 0.0)
        steps = with_odds_factor(shared, factors[:, None])
        return np.multiply.accumulate(steps, axis=1)

    def most_accepted(self, request: Request, length: int) -> float:
        """More of a chain than is expected to be accepted; a bound that is told fast."""
        own = self._own.get(request)
        factor = 1.0 if own is None else own.factor
        first, others = (c * factor / (1.0 - c + c * factor) for c in self._highest)
        # A geometric series from the second token on.
        return first * (1.0 - others**length) / (1.0 - others)

    def calibrated(self, requests: Sequence[Request], chances: Floats) -> Floats:
        """What the proposer's own chances, float64 [requests, tokens], come to by experience."""
        self._read_claims()
        factors = self._bin_factor(chances) * self._factors(requests)[:, None]
        return np.minimum.accumulate(with_odds_factor(chances, factors), axis=1)

    def told(self, requests: Sequence[Request], chance: float) -> float:
        """What a proposer says where that comes to `chance`, of these requests by and large.

        Where little was seen, it is believed to be right.
        """
        factors = self._factors(requests)
        factor = self._bin_factor(_BIN_CHANCES) * np.exp(np.log(factors).mean())
        came_to = np.maximum.accumulate(with_odds_factor(_BIN_CHANCES, factor))
        return float(np.interp(chance, came_to, _BIN_CHANCES))

    def of_tree(self, requests: Sequence[Request], size: int, optimism: float = 0.0) -> Floats:
        """Chances of a tree's tokens before it is drafted: [requests, size].

        `optimism`: so many standard errors above the likeliest, and what went badly some text ago
        is forgotten.
        """
        marginals = np.empty(size)
        chance = FIRST_CHANCE
        for i in range(size):
            chance = (self._tree_accepted[i] + DEPTH_WEIGHT * chance) / (
                self._tree_tried[i] + DEPTH_WEIGHT
            )
            marginals[i] = chance
            chance *= 0.8  # the next is believed to be rarer, until it is seen
        if optimism:
            marginals = _hoped(marginals, self._tree_tried[:size], optimism)
        factors = self._factors(requests, faded=optimism > 0.0)
        return with_odds_factor(np.minimum.accumulate(marginals), factors[:, None])

    def record_chains(
        self,
        requests: Sequence[Request],
        lengths: Sequence[int],
        accepted: Sequence[int],
        starts: Sequence[int] | None = None,
        *,
        plain: bool,
    ) -> None:
        """A step's chains: the chance of each depth, where it was reached.

        What goes on is as good as a chain that begins now: otherwise those that are wrong, which
        begin anew at every step, would be most of all that begin.

        Args:
            requests: whose they are.
            lengths: tokens that were verified, at least 1.
            accepted: tokens that were accepted.
            starts: of both, tokens that were told before; none if it is left out.
            plain: their proposer has no chances of its own.
        """
        promised, known = self._promised, self._own
        # Chains by how many of their tokens were tried, and by how many were accepted.
        tries = [0] * (MOST_DRAFTED + 1)
        hits = [0] * (MOST_DRAFTED + 1)
        for request, length, right, start in zip(
            requests, lengths, accepted, starts or repeat(0, len(requests)), strict=True
        ):
            tried = right + 1 if right < length else length
            if start:
                tries[tried] += 1
                tries[start] -= 1
                hits[right] += 1
                hits[start] -= 1
                tried, right = tried - start, right - start
            tries[tried] += 1
            hits[right] += 1
            if plain:
                own = known.get(request) or self._begin(request)
                own.add(right, tried, promised[tried])
                own.told_at = len(request.token_ids)
        self._deepest = max(self._deepest, *lengths)
        kept = exp(-len(requests) / SHARED_MEMORY)
        num_tried = num_accepted = 0
        for depth in range(self._deepest, 0, -1):
            num_tried += tries[depth]
            num_accepted += hits[depth]
            self._tried[depth - 1] = self._tried[depth - 1] * kept + num_tried
            self._accepted[depth - 1] = self._accepted[depth - 1] * kept + num_accepted
        self._update_conditional()

    def record_chances(self, verified: Sequence[Verified]) -> None:
        """A step's drafts with chances: whether each token was accepted, whatever came before."""
        # Taken in together, when they are asked about at the latest: one by one that takes longer.
        self._unread += verified
        if len(self._unread) >= CLAIMS_TOGETHER:
            self._read_claims()

    def _read_claims(self) -> None:
        verified, self._unread = self._unread, []
        if not verified:
            return
        claimed = np.array([c for v in verified for c in v.draft.chances or ()])
        claimed = np.clip(claimed, LEAST_CHANCE, 1 - LEAST_CHANCE)
        right = np.zeros(len(claimed))
        expected = with_odds_factor(claimed, self._bin_factor(claimed)).tolist()
        begin = 0
        for one in verified:
            end = begin + len(one.draft)
            for index in one.path:
                right[begin + index] = 1.0
            own = self._own.get(one.request) or self._begin(one.request)
            own.add(len(one.path), end - begin, sum(expected[begin:end]))
            own.told_at = len(one.request.token_ids)
            begin = end
        bins = np.rint(_bin_of(claimed)).astype(np.int64)
        kept = exp(-len(verified) / SHARED_MEMORY)
        for memory, values in (
            (self._bin_tried, None),
            (self._bin_accepted, right),
            (self._bin_expected, claimed),
        ):
            memory *= kept
            memory += np.bincount(bins, values, minlength=_NUM_BINS)

    def record_tree(self, verified: Verified) -> None:
        """A tree, whose tokens are told apart by their index."""
        self.sees_trees = True
        size = len(verified.draft)
        kept = exp(-1.0 / SHARED_MEMORY)
        self._tree_tried[:size] = self._tree_tried[:size] * kept + 1.0
        self._tree_accepted[:size] *= kept
        self._tree_accepted[list(verified.path)] += 1.0

    def forget(self, request: Request) -> None:
        """The request left; nothing of it was lost for the others."""
        self._read_claims()
        self._own.pop(request, None)

    def _factors(self, requests: Sequence[Request], *, faded: bool = False) -> Floats:
        """What is known of each; `faded`: of drafts that only a try tells more of."""
        self._read_claims()
        own = self._own
        if faded:
            return np.array([own[r].faded(r) if r in own else 1.0 for r in requests])
        return np.array([own[r].factor if r in own else 1.0 for r in requests])

    def _begin(self, request: Request) -> _Own:
        own = self._own[request] = _Own()
        return own

    def _update_conditional(self) -> None:
        """Find the chance at each depth given all before it.

        A depth that was seldom reached is believed to be like the one before it.
        """
        row: list[float] = []
        chance = FIRST_CHANCE
        for tried, accepted in zip(
            self._tried[: self._deepest], self._accepted[: self._deepest], strict=True
        ):
            chance = (accepted + DEPTH_WEIGHT * chance) / (tried + DEPTH_WEIGHT)
            row.append(min(max(chance, LEAST_CHANCE), 1.0 - LEAST_CHANCE))
        row += [chance] * (MOST_DRAFTED - self._deepest)
        self._conditional = np.array(row)
        self._highest = row[0], max(row)
        # What so many tried tokens of a chain are expected to yield.
        self._promised = [0.0, *accumulate(row)]

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


def _hoped(chances: Floats, tried: Floats, optimism: float) -> Floats:
    """So many standard errors above chances that were learned from so many tries."""
    errors = np.sqrt(chances * (1.0 - chances) / (tried + DEPTH_WEIGHT))
    return np.minimum(chances + optimism * errors, 1.0 - LEAST_CHANCE)


def _bin_of(chances: Floats) -> Floats:
    """Where chances lie on the scale of bins, between whole numbers."""
    log_odds = np.log(chances / (1.0 - chances))
    scale = (_NUM_BINS - 1) / (_HIGHEST_LOG_ODDS - _LOWEST_LOG_ODDS)
    return np.clip((log_odds - _LOWEST_LOG_ODDS) * scale, 0.0, _NUM_BINS - 1.0)
