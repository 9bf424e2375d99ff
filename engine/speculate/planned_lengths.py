"""Lengths that are chosen before drafting, where drafting takes time.

The proposer's time is part of the step's, so the depth that pays best is looked for, and who is
drafted for. Where nothing pays a few are tried now and then; where the proposer has first to
compute tokens that it lacks, that has to pay by all that the request will yet get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.config import EngineConfig
from engine.request import Request
from engine.speculate.acceptance_history import AcceptanceHistory, Floats
from engine.speculate.cost_curves import CostCurves, SpeculationCosts, ladder
from engine.speculate.output_lengths import OutputLengths
from engine.speculate.yields import MARGIN, Margin

# Chances are estimated so many standard errors too high: what is not tried because it went badly at
# first is never known better.
OPTIMISM = 0.5
TREE_OPTIMISM = 1.0  # those of one request are right or wrong together
# The part of the time that goes to finding out whether drafting would pay now.
PROBING_SHARE = 0.005
PROBED_REQUESTS = 4
PROBED_TOKENS = 1
# Steps that a try lasts: the first one finds nothing of the proposer in the processor's caches.
PROBED_STEPS = 4
PROBED_NODES = 4  # of trees, whose drafting takes as long for one token
# Steps for which nothing is chosen where choosing found nothing over and over.
MOST_RESTED = 63
# Steps for which a choice holds while the same requests decode: choosing takes time.
HELD_STEPS = 4
# Drafted tokens after which acceptance is known well enough to catch up with many requests for it.
KNOWN_TOKENS = 100
# By this share the requests that decode may differ from the step before for the load to be called
# steady: where it grows, what would pay now will not soon.
STEADY = 1.0 / 8.0
# Tokens by which the price of catching up is asked for.
CATCH_UP_TOKENS = 256


class PlannedLengths:
    """Chooses for whom to draft and how far, before it is done.

    `probing` says that the last choice is a try, which is verified whole. `behind` says that some
    who are drafted for must be caught up with. `tried` counts drafted tokens of chains that were
    verified. `floor` is the chance, as the proposer tells it, below which going on with a chain of
    the last choice would not pay.

    Args:
        costs: what steps and drafting take.
        curves: the same, as arrays.
        history: what was accepted.
        lacking: of the proposer, the tokens of each request that it has to compute before it can
            draft, beyond the newest; None where it never has to.
    """

    def __init__(
        self,
        costs: SpeculationCosts,
        curves: CostCurves,
        history: AcceptanceHistory,
        lacking: Callable[[Sequence[Request]], Sequence[int]] | None,
    ) -> None:
        self._costs = costs
        self._curves = curves
        self._margin = Margin(costs)
        self._history = history
        self._lacking = lacking
        self._outputs = OutputLengths()
        self._spare_seconds = 0.0
        self._probe_seconds = 0.0
        self._rests = self._longest_rest = self._rested_at = 0
        self._plain_seconds = 0.0
        self._decoding: int | None = None  # requests of the step before
        self._steady = True
        self._held = 0
        self._held_limits: list[int] = []
        self._held_for: list[int] = []
        self.probing = False
        self.behind = False
        self.tried = 0
        self.floor = 0.0

    def rests(self, num_requests: int) -> bool:
        """Begin a step that decodes so many; whether nothing is to be chosen in it.

        So for a while where choosing found nothing.
        """
        before, self._decoding = self._decoding, num_requests
        self._steady = before is None or abs(num_requests - before) <= STEADY * before
        if self._held:
            return False
        if not self._rests or num_requests.bit_length() != self._rested_at:
            self._rests = 0
            return False
        self._rests -= 1
        self._spare_seconds += PROBING_SHARE * self._plain_seconds
        return True

    def limits(
        self, requests: Sequence[Request], rooms: list[int], config: EngineConfig
    ) -> list[int]:
        """Most tokens to draft for each request, of at most `rooms`, of which some are above 0."""
        if self._held:
            if self._held_for == [id(request) for request in requests]:
                self._held -= 1
                self.behind = False
                return [min(pair) for pair in zip(self._held_limits, rooms, strict=True)]
            self._held = 0
        self.probing = False
        self.floor = 0.0
        limits = self._caught_up(self._curves, requests, rooms, config)
        drafts = any(limits)
        self._rest(len(requests), planned=drafts and not self.probing)
        if drafts and (self.probing or (self._steady and not self.behind)):
            self._held = (PROBED_STEPS if self.probing else HELD_STEPS) - 1
            self._held_limits, self._held_for = limits, [id(request) for request in requests]
        return limits

    def took(self, draft_seconds: float) -> None:
        """What drafting took, for which the last limits were."""
        if self.probing:
            self._spare_seconds += self._probe_seconds - draft_seconds

    def forget(self, request: Request) -> None:
        """The request left."""
        self._held = 0
        self._outputs.note(request)

    def _rest(self, num_requests: int, *, planned: bool) -> None:
        """Choose less often while nothing is found, as choosing takes time too."""
        at = num_requests.bit_length()
        if planned or at != self._rested_at:
            self._longest_rest = 0
        self._rested_at = at
        if not planned:
            self._rests = self._longest_rest = min(2 * self._longest_rest + 1, MOST_RESTED)

    def _caught_up(
        self,
        curves: CostCurves,
        requests: Sequence[Request],
        rooms: list[int],
        config: EngineConfig,
    ) -> list[int]:
        """Limits where the proposer may lack tokens that it needs.

        Catching up pays by all the tokens that a request will yet get, unless others come; a step's
        worth of tokens is caught up with at a time, and a few requests while little is known of
        acceptance.
        """
        lacking = [0] * len(requests) if self._lacking is None else self._lacking(requests)
        if not self._steady:  # only for those who need no catching up
            rooms = [0 if more else room for room, more in zip(rooms, lacking, strict=True)]
            lacking = [0] * len(requests)
        if not any(lacking):
            self.behind = False
            return self._plan(curves, requests, rooms, config, lacking)[0] if any(rooms) else rooms
        per_token = self._costs.catch_up_seconds(CATCH_UP_TOKENS) / CATCH_UP_TOKENS
        prices = [per_token * count for count in lacking]
        limits, saved = self._plan(curves, requests, rooms, config, prices)
        if not self.probing:
            worth = [
                saved * self._outputs.expected(request) > price
                for request, price in zip(requests, prices, strict=True)
            ]
            if not all(w or not limit for w, limit in zip(worth, limits, strict=True)):
                rooms = [r if w else 0 for r, w in zip(rooms, worth, strict=True)]
                limits = [0] * len(requests)
                if any(rooms):
                    limits, _ = self._plan(curves, requests, rooms, config, prices)
        budget = config.max_num_batched_tokens
        most = len(requests) if self.tried >= KNOWN_TOKENS else PROBED_REQUESTS
        for i, count in enumerate(lacking):
            if count and limits[i]:
                if budget <= 0 or not most:
                    limits[i] = 0
                    continue
                budget -= count
                most -= 1
        self.behind = any(c and limit for c, limit in zip(lacking, limits, strict=True))
        return limits

    def _plan(
        self,
        curves: CostCurves,
        requests: Sequence[Request],
        rooms: list[int],
        config: EngineConfig,
        prices: Sequence[float],
    ) -> tuple[list[int], float]:
        """Limits, of the depth that pays best, and for whom; and the seconds a token that it saves.

        `prices` are what requests cost before they can be drafted for, which only probing counts.
        """
        n, deepest = len(requests), max(rooms)
        most = min(n * deepest, config.max_num_batched_tokens - n)
        if not curves.conceivable(n, deepest, config.max_num_batched_tokens, 1.0 + MARGIN):
            return [0] * n, 0.0
        history = self._history
        if history.sees_trees:
            gains = history.of_tree(requests, deepest, TREE_OPTIMISM)
        else:
            gains = history.survival(requests, deepest, OPTIMISM)
        gains[np.arange(deepest) >= np.asarray(rooms)[:, None]] = 0.0
        verify = curves.verify(n, most)
        chances = gains.T.ravel()
        by_gain = np.argsort(-chances, kind="stable")
        depths = by_gain // n
        self._plain_seconds = float(verify[0])
        plain = n / self._plain_seconds
        hope = 1.0 + self._margin.hope(n)
        best, chosen = plain * (1.0 + self._margin.of(n)), by_gain[:0]
        for depth in ladder(deepest)[1:]:
            order = by_gain[depths < depth][:most]
            drafted = np.cumsum(order < n)  # requests that have a first token
            seconds = verify[1 : len(order) + 1] + curves.draft(n, depth)[drafted]
            rates = hope * (n + np.cumsum(chances[order])) / seconds
            at = int(np.argmax(rates))
            if rates[at] > best:
                best, chosen = float(rates[at]), order[: at + 1]
        if not len(chosen):
            return self._probe(curves, rooms, verify, prices), 0.0
        counts: list[int] = np.bincount(chosen % n, minlength=n).tolist()
        verifying = float(verify[len(chosen)] - verify[0]) / len(chosen)
        self.floor = self._least_chance(requests, max(counts), verifying, best)
        return counts, 1.0 / plain - 1.0 / best

    def _least_chance(
        self, requests: Sequence[Request], deepest: int, verifying: float, rate: float
    ) -> float:
        """Below which a chain's next token lowers the tokens of a second, which are `rate`.

        `verifying` is what each drafted token adds to a step.
        """
        if deepest < 2 or self._history.sees_trees:  # trees are drafted all at once
            return 0.0
        n, draft = len(requests), self._curves.draft
        drafting = float(draft(n, deepest)[n] - draft(n, 1)[n]) / (n * (deepest - 1))
        return self._history.told(requests, max(0.0, drafting + verifying) * rate)

    def _probe(
        self, curves: CostCurves, rooms: list[int], verify: Floats, prices: Sequence[float]
    ) -> list[int]:
        """Limits for a few, as soon as the time that may go to that suffices; or none.

        Those come first who are the cheapest to draft for.
        """
        n = len(rooms)
        size = PROBED_NODES if self._history.sees_trees else PROBED_TOKENS
        few = sorted(range(n), key=prices.__getitem__)[:PROBED_REQUESTS]
        if prices[few[-1]]:  # a request that must be caught up with is dear enough alone
            few = few[:1]
        limits = [0] * n
        for i in few:
            limits[i] = min(rooms[i], size)
        drafting = catching_up = 0.0
        if any(limits):
            drafting = float(curves.draft(n, max(limits))[len(few)])
            catching_up = sum(prices[i] for i in few)
        verifying = float(verify[min(sum(limits), len(verify) - 1)] - verify[0])
        price = catching_up + PROBED_STEPS * (drafting + verifying)
        self._spare_seconds = min(self._spare_seconds + PROBING_SHARE * float(verify[0]), price)
        if not any(limits) or self._spare_seconds < price:
            return [0] * n
        self.probing = True
        self._probe_seconds = drafting + catching_up / PROBED_STEPS
        self._spare_seconds -= price
        return limits
