"""How many tokens are drafted and verified for each request in each step.

A step's time grows with its tokens, and drafted ones pay by what is accepted of them. What is
maximised is the tokens that a step is expected to yield for each second that it takes: drafted
tokens of all requests are taken in the order of their chances, as many as raise that. So requests
whose drafts are good get more than others, and where the batch keeps the device busy nobody gets
any. What prompts add to a step is left out: they have to be computed anyway.

Pure arithmetic on counts and seconds, so that a simulator decides as an engine does. It has to
draft tokens that the request then gets, or does not get, as by its chances of acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from engine.batch import Batch, BatchResult
from engine.config import EngineConfig
from engine.request import Request
from engine.speculate.acceptance_history import AcceptanceHistory, Floats, Verified
from engine.speculate.back_off import BackOff
from engine.speculate.control_steps import ControlSteps
from engine.speculate.cost_curves import CostCurves, SpeculationCosts, ladder
from engine.speculate.draft import MOST_DRAFTED, Draft
from engine.speculate.output_lengths import OutputLengths
from engine.speculate.promises import Promises
from engine.speculate.unverified import UnverifiedDrafts

__all__ = ["DraftLengths", "LearningCosts", "SpeculationCosts"]

# Drafts must promise so much more than none, as promises err.
MARGIN = 0.02
# Where drafting takes time its chances are estimated so many standard errors too high: what is not
# tried because it went badly at first is never known better.
OPTIMISM = 0.5
# The part of the time that goes to finding out whether a proposer that costs time would pay now.
PROBING_SHARE = 0.01
PROBED_REQUESTS = 4
# Steps for which nothing is chosen where choosing found nothing over and over.
MOST_RESTED = 31
# Drafted tokens after which acceptance is known well enough to catch up with many requests for it.
KNOWN_TOKENS = 100
# Tokens by which the price of catching up is asked for.
CATCH_UP_TOKENS = 256
PROBED_TOKENS = 1
PLAIN_STEPS_TOLD = 4
FEW_DRAFTS = 8
PROBED_NODES = 4  # of trees, whose drafting takes as long for one token


@runtime_checkable
class LearningCosts(SpeculationCosts, Protocol):
    """Costs that are corrected by what steps really took."""

    def learn_verify(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step without prompts took so long; arguments as of `verify_seconds`."""
        ...

    def learn_draft(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        """Drafting took so long; arguments as of `draft_seconds`."""
        ...


@runtime_checkable
class UncertainCosts(Protocol):
    """Costs that know how far they may be off."""

    def uncertainty(self, num_sequences: int) -> float:
        """The standard error of steps' seconds, as a share of them."""
        ...


class DraftLengths:
    """Chooses lengths by measured acceptance and costs; a policy for one engine.

    Before every step in which anything decodes, `limits` and, unless all are 0, `keep` are called
    with all requests that decode; after the step `observe`.

    Args:
        costs: what steps and drafting take. Without them, or where `speculative_adaptive` is off,
            everything is drafted and verified that the knobs allow.
        costs_device: of the proposer. Where proposing costs little, who is to be verified is
            decided when the drafts are there; else before.
        lacking: of the proposer, the tokens of each request that it has to compute before it can
            draft, beyond the newest; None where it never has to.
    """

    def __init__(
        self,
        costs: SpeculationCosts | None,
        *,
        costs_device: bool,
        lacking: Callable[[Sequence[Request]], Sequence[int]] | None = None,
    ) -> None:
        self._costs = costs
        self._lacking = lacking
        self._outputs = OutputLengths()
        self._learning = costs if isinstance(costs, LearningCosts) else None
        self._uncertain = costs if isinstance(costs, UncertainCosts) else None
        self._curves = None if costs is None else CostCurves(costs)
        self._costs_device = costs_device
        self._history = AcceptanceHistory()
        self._back_off = BackOff()
        self._unverified = UnverifiedDrafts()
        self._controls = ControlSteps()
        self._promises = Promises()
        self._limits: list[int] = []
        self._plain_steps = 0
        self._probing = False
        self._spare_seconds = 0.0
        self._probe_seconds = 0.0
        self._tried = 0  # drafted tokens of chains that were verified
        self._rests = self._longest_rest = self._rested_at = 0
        self._behind = False  # whether some who are drafted for must be caught up with

    def limits(self, requests: Sequence[Request], config: EngineConfig) -> list[int]:
        """Most tokens to draft for each request that decodes; all 0: do not propose now."""
        most, n = config.num_speculative_tokens, len(requests)
        curves = self._curves
        self._probing = False
        self._limits = limits = [0] * n
        asked: Sequence[int] = range(n)
        adapts = curves is not None and config.speculative_adaptive
        if adapts and not self._costs_device:
            assert curves is not None
            if self._is_control(n) or not curves.conceivable(
                n, most, config.max_num_batched_tokens, 1.0 + MARGIN
            ):
                return limits
            asked = self._back_off.due(requests)
        for i in asked:
            request = requests[i]
            # A step yields one token beyond what it accepts: a draft ends one before the end.
            left = request.max_total_tokens - len(request.token_ids) - 1
            if left >= most or not request.max_total_tokens:
                limits[i] = most
            elif left > 0:
                limits[i] = left
        if adapts and self._costs_device and any(limits):
            assert curves is not None
            planned = not self._is_control(n)
            limits = self._chosen(curves, requests, limits, config) if planned else [0] * n
            self._limits = limits
        return limits

    def keep(
        self,
        requests: Sequence[Request],
        drafts: Sequence[Draft | None],
        config: EngineConfig,
        draft_seconds: float | None = None,
    ) -> list[int]:
        """How many tokens of each draft to verify; 0 where there is none.

        `requests` and the limits that `drafts` were made by are those of the last `limits`.
        `draft_seconds` is what proposing took.
        """
        lengths = [0 if draft is None else len(draft.token_ids) for draft in drafts]
        curves = self._curves
        if curves is None:
            return lengths
        asked = [i for i, limit in enumerate(self._limits) if limit]
        if draft_seconds is not None and self._learning is not None and asked and not self._behind:
            self._learning.learn_draft(len(asked), max(self._limits), draft_seconds)
        if self._probing and draft_seconds is not None:
            self._spare_seconds += self._probe_seconds - draft_seconds
        # How many tokens that were drawn by chance are verified must not depend on which they are:
        # the distribution of what is generated would change.
        drawn = self._costs_device and any(
            draft is not None and draft.probabilities is not None for draft in drafts
        )
        if self._probing or drawn or not config.speculative_adaptive:
            return lengths
        rows = [i for i, length in enumerate(lengths) if length]
        kept = [0] * len(lengths)
        if rows:
            room = config.max_num_batched_tokens - len(requests)
            seconds = curves.verify(len(requests), max(0, min(room, sum(lengths))))
            margin = self._margin(len(requests))
            counts, yielded, saved = [0] * len(rows), 0.0, 0.0
            if self._is_hopeful(requests, drafts, rows, seconds, margin):
                gains = self._gains([requests[i] for i in rows], [drafts[i] for i in rows])
                gains *= self._promises.factor(len(requests))
                counts, yielded, saved = _best_counts(gains, len(requests), seconds, margin)
                for row, count in zip(rows, counts, strict=True):
                    kept[row] = count
            self._promises.promise(len(requests), sum(counts), yielded)
            if saved > 0.0:
                self._back_off.saved(len(rows) - counts.count(0), saved)
        if not self._costs_device:
            self._note(curves, requests, drafts, kept, asked)
        return kept

    def observe(self, batch: Batch, result: BatchResult, seconds: float | None) -> None:
        """Take in what a step's drafts came to; `seconds` is what it took without drafting."""
        num_decodes = batch.num_decodes
        # Those with drafts come last among the decodes.
        if not num_decodes or batch.sequences[num_decodes - 1].draft is None:
            # Of the many such steps some tell enough, and those on which a draft may be judged.
            self._plain_steps += 1
            if not len(self._unverified) and self._plain_steps % PLAIN_STEPS_TOLD != 1:
                return
        history, followed = self._history, self._unverified
        requests: list[Request] = []
        lengths: list[int] = []
        accepted: list[int] = []
        claimed: list[Verified] = []
        judged: list[Verified] = []
        follows = len(followed) > 0
        drafted = num_decodes > 0 and batch.sequences[num_decodes - 1].draft is not None
        told = num_decodes if follows or drafted else 0
        for sequence, tokens in zip(batch.sequences[:told], result.tokens, strict=False):
            request, draft = sequence.request, sequence.draft
            if follows and request in followed:
                verdict = followed.observe(request, tokens)
                if verdict is not None:
                    judged.append(verdict)
            if draft is None:
                continue
            right = len(tokens) - 1
            if draft.parents is None:
                requests.append(request)
                lengths.append(len(draft.token_ids))
                accepted.append(right)
                if draft.chances is not None:
                    claimed.append(Verified(request, draft, range(right)))
            else:
                verified = Verified(request, draft, accepted_path(draft, tokens))
                history.record_tree(verified)
                if draft.chances is not None:
                    claimed.append(verified)
        if requests:
            self._tried += sum(lengths)
            self._promises.observe(num_decodes, sum(lengths), sum(accepted))
        for verdict in judged:
            requests.append(verdict.request)
            lengths.append(len(verdict.draft.token_ids))
            accepted.append(len(verdict.path))
            if verdict.draft.chances is not None:
                claimed.append(verdict)
        if requests:
            history.record_chains(requests, lengths, accepted, plain=not claimed)
        if claimed:
            history.record_chances(claimed)
        alone = 0 < num_decodes == len(batch.sequences)
        if self._learning is not None and seconds is not None and alone:
            num_tokens = batch.num_tokens if drafted else num_decodes
            self._controls.observe(num_decodes, num_tokens - num_decodes)
            self._plain_steps *= not drafted
            if self._plain_steps % PLAIN_STEPS_TOLD <= 1:
                self._learning.learn_verify(num_decodes, num_tokens, seconds)

    def forget(self, request: Request) -> None:
        """The request left, or will be computed again from the start."""
        self._outputs.note(request)
        self._history.forget(request)
        self._back_off.forget(request)
        self._unverified.forget(request)

    def chances(self, request: Request) -> list[float]:
        """The chance that a chain's first 1, 2, ... tokens are accepted, as it stands now."""
        chances: list[float] = self._history.survival([request], MOST_DRAFTED)[0].tolist()
        return chances

    def _margin(self, num_requests: int) -> float:
        """What drafts have to promise beyond the tokens of a second without them."""
        uncertain = self._uncertain
        return MARGIN + (0.0 if uncertain is None else uncertain.uncertainty(num_requests))

    def _is_control(self, num_requests: int) -> bool:
        return self._learning is not None and self._controls.due(num_requests)

    def _chosen(
        self,
        curves: CostCurves,
        requests: Sequence[Request],
        rooms: list[int],
        config: EngineConfig,
    ) -> list[int]:
        """Limits where proposing takes time: chosen, unless that found nothing lately."""
        if self._resting(curves, len(requests)):
            return [0] * len(requests)
        limits = self._caught_up(curves, requests, rooms, config)
        self._rest(len(requests), planned=any(limits) and not self._probing)
        return limits

    def _resting(self, curves: CostCurves, num_requests: int) -> bool:
        """Whether choosing found nothing lately and would hardly do so now."""
        if not self._rests or num_requests.bit_length() != self._rested_at:
            self._rests = 0
            return False
        self._rests -= 1
        self._spare_seconds += PROBING_SHARE * float(curves.verify(num_requests, 0)[0])
        return True

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

        Catching up pays by all the tokens that a request will yet get; a step's worth of tokens is
        caught up with at a time, and a few requests while little is known of acceptance.
        """
        lacking = None if self._lacking is None else self._lacking(requests)
        if lacking is None or not any(lacking):
            self._behind = False
            return self._plan(curves, requests, rooms, config, [0.0] * len(requests))[0]
        assert self._costs is not None
        per_token = self._costs.catch_up_seconds(CATCH_UP_TOKENS) / CATCH_UP_TOKENS
        prices = [per_token * count for count in lacking]
        limits, saved = self._plan(curves, requests, rooms, config, prices)
        if not self._probing:
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
        most = len(requests) if self._tried >= KNOWN_TOKENS else PROBED_REQUESTS
        for i, count in enumerate(lacking):
            if count and limits[i]:
                if budget <= 0 or not most:
                    limits[i] = 0
                    continue
                budget -= count
                most -= 1
        self._behind = any(c and limit for c, limit in zip(lacking, limits, strict=True))
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
            gains = history.of_tree(requests, deepest)
        else:
            gains = history.survival(requests, deepest, OPTIMISM)
        gains[np.arange(deepest) >= np.asarray(rooms)[:, None]] = 0.0
        verify = curves.verify(n, most)
        chances = gains.T.ravel()
        by_gain = np.argsort(-chances, kind="stable")
        depths = by_gain // n
        plain = n / float(verify[0])
        best, chosen = plain * (1.0 + self._margin(n)), by_gain[:0]
        for depth in ladder(deepest)[1:]:
            order = by_gain[depths < depth][:most]
            drafted = np.cumsum(order < n)  # requests that have a first token
            seconds = verify[1 : len(order) + 1] + curves.draft(n, depth)[drafted]
            rates = (n + np.cumsum(chances[order])) / seconds
            at = int(np.argmax(rates))
            if rates[at] > best:
                best, chosen = float(rates[at]), order[: at + 1]
        if not len(chosen):
            return self._probe(curves, rooms, verify, prices), 0.0
        counts: list[int] = np.bincount(chosen % n, minlength=n).tolist()
        return counts, 1.0 / plain - 1.0 / best

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
        drafting = 0.0
        if any(limits):
            drafting = float(curves.draft(n, max(limits))[len(few)]) + sum(prices[i] for i in few)
        verifying = float(verify[min(sum(limits), len(verify) - 1)] - verify[0])
        price = drafting + verifying
        self._spare_seconds = min(self._spare_seconds + PROBING_SHARE * float(verify[0]), price)
        if not any(limits) or self._spare_seconds < price:
            return [0] * n
        self._probing = True
        self._probe_seconds = drafting
        self._spare_seconds -= price
        return limits

    def _is_hopeful(
        self,
        requests: Sequence[Request],
        drafts: Sequence[Draft | None],
        rows: list[int],
        seconds: Floats,
        margin: float,
    ) -> bool:
        """Whether few drafts may pay at all, which is told faster than how much of them would."""
        if self._costs_device or len(rows) > FEW_DRAFTS or len(seconds) < 2:
            return True
        n, accepted = len(requests), 0.0
        for i in rows:
            draft = drafts[i]
            if draft is None or draft.chances is not None or draft.parents is not None:
                return True
            accepted += self._history.most_accepted(requests[i], len(draft.token_ids))
        return (n + accepted) * float(seconds[0]) > n * (1.0 + margin) * float(seconds[1])

    def _gains(self, requests: Sequence[Request], drafts: Sequence[Draft | None]) -> Floats:
        """The chance of each drafted token, float64 [requests, tokens]; 0 where there is none."""
        lengths = np.array([len(d) if d is not None else 0 for d in drafts])
        size = int(lengths.max())
        history = self._history
        own = [None if d is None else d.chances for d in drafts]
        if any(c is not None for c in own):
            gains = np.zeros((len(drafts), size))
            for i, chances in enumerate(own):
                if chances is not None:
                    gains[i, : len(chances)] = chances
            gains = history.calibrated(requests, gains)
        elif any(d is not None and d.parents is not None for d in drafts):
            gains = history.of_tree(requests, size)
        else:
            gains = history.survival(requests, size)
        gains[np.arange(size) >= lengths[:, None]] = 0.0
        return gains

    def _note(
        self,
        curves: CostCurves,
        requests: Sequence[Request],
        drafts: Sequence[Draft | None],
        kept: list[int],
        asked: list[int],
    ) -> None:
        """Remember for whom cheap drafts were found, and were worth verifying."""
        for i in asked:
            draft = drafts[i]
            if draft is not None and not kept[i]:
                self._unverified.follow(requests[i], draft)
        tried = [(requests[i], kept[i] > 0) for i in asked]
        n = len(requests)
        seconds = float(curves.draft(n, max(self._limits))[n]) / n
        self._back_off.note(tried, n, float(curves.verify(n, 0)[0]), seconds)


def accepted_path(draft: Draft, tokens: Sequence[int]) -> list[int]:
    """The indices of the accepted tokens of a tree, where a step yielded these tokens."""
    assert draft.parents is not None
    path: list[int] = []
    parent = -1
    for token in tokens[:-1]:
        for index in range(parent + 1, len(draft)):
            if draft.parents[index] == parent and draft.token_ids[index] == token:
                path.append(index)
                parent = index
                break
    return path


def _best_counts(
    gains: Floats, num_requests: int, seconds: Floats, margin: float
) -> tuple[list[int], float, float]:
    """How many tokens of each row to verify, so that a second yields most.

    gains: [rows, tokens], each row falling and 0 behind its end; seconds: [most + 1] of a step with
    so many drafted tokens; `margin` is what they have to yield beyond none, as a share.

    Returns also how many are expected to be accepted, and the seconds that as many tokens would
    take longer without drafts.
    """
    rows = len(gains)
    # By depth first, so that of equal chances in a row the first comes first.
    flat = gains.T.ravel()
    order = np.argsort(-flat, kind="stable")[: len(seconds) - 1]
    accepted = np.cumsum(flat[order])
    rates = (num_requests + accepted) / seconds[1 : len(order) + 1]
    if not len(rates):
        return [0] * rows, 0.0, 0.0
    best = int(np.argmax(rates))
    gain = float(rates[best] * seconds[0]) / num_requests
    if gain <= 1.0 + margin:
        return [0] * rows, 0.0, 0.0
    counts: list[int] = np.bincount(order[: best + 1] % rows, minlength=rows).tolist()
    return counts, float(accepted[best]), (gain - 1.0) * float(seconds[best + 1])
