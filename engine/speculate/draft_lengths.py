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
from engine.speculate.cost_curves import CostCurves, SpeculationCosts
from engine.speculate.draft import MOST_DRAFTED, Draft
from engine.speculate.planned_lengths import PlannedLengths
from engine.speculate.promises import Promises
from engine.speculate.unverified import Progress, UnverifiedDrafts
from engine.speculate.yields import MARGIN, Margin, UncertainCosts, best_counts

__all__ = ["DraftLengths", "LearningCosts", "SpeculationCosts", "UncertainCosts"]

# Of the many steps without drafts one in so many is learned from.
PLAIN_STEPS_TOLD = 4
# So few drafts are looked at one by one first, whether any may pay.
FEW_DRAFTS = 8
# Drafts that were made because they pay are all verified, unless leaving most of them out would
# save so much: choosing takes a third of that on two Zen 3 cores, and some of what it leaves out is
# right.
CHOOSING_SECONDS = 1e-3
# Tokens of a draft that was not verified which have to prove right for another look-up.
_PROMISING = 2


@runtime_checkable
class LearningCosts(SpeculationCosts, Protocol):
    """Costs that are corrected by what steps really took."""

    def learn_verify(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """A step without prompts took so long; arguments as of `verify_seconds`."""
        ...

    def learn_draft(self, num_sequences: int, num_drafted: int, seconds: float) -> None:
        """Drafting took so long; arguments as of `draft_seconds`."""
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
        self._margin = None if costs is None else Margin(costs)
        self._learning = costs if isinstance(costs, LearningCosts) else None
        self._curves = None if costs is None else CostCurves(costs)
        self._costs_device = costs_device
        self._history = AcceptanceHistory()
        self._planned: PlannedLengths | None = None
        if costs is not None and self._curves is not None and costs_device:
            self._planned = PlannedLengths(costs, self._curves, self._history, lacking)
        self._back_off = BackOff()
        self._unverified = UnverifiedDrafts()
        # The so manieth step without drafts tells what such steps take.
        self._plain_told = 2 if costs_device else 1
        self._controls = ControlSteps()
        self._promises = Promises()
        self._limits: list[int] = []
        self.floor = 0.0
        """The chance, as told by the proposer, below which a chain is not to be gone on with."""
        self._ran: tuple[int, int] | None = None  # sequences and tokens of the last step
        # Whether the last step was drafted for and the one before it, and what was verified last.
        self._drafted = self._warm = self._verified = False
        self._plain_steps = 0

    def limits(self, requests: Sequence[Request], config: EngineConfig) -> list[int]:
        """Most tokens to draft for each request that decodes; all 0: do not propose now."""
        most, n = config.num_speculative_tokens, len(requests)
        curves, planned = self._curves, self._planned
        self._limits = limits = [0] * n
        self._warm, self._drafted = self._drafted, False
        self.floor = 0.0
        asked: Sequence[int] = range(n)
        adapts = curves is not None and config.speculative_adaptive
        if adapts and not self._costs_device:
            assert curves is not None
            if self._is_control(n) or not curves.conceivable(
                n, most, config.max_num_batched_tokens, 1.0 + MARGIN
            ):
                return limits
            asked = self._back_off.due(requests)
        elif adapts and planned is not None and planned.rests(n):
            return limits
        for i in asked:
            request = requests[i]
            # A step yields one token beyond what it accepts: a draft ends one before the end.
            left = request.max_total_tokens - len(request.token_ids) - 1
            if left >= most or not request.max_total_tokens:
                limits[i] = most
            elif left > 0:
                limits[i] = left
        if adapts and planned is not None and any(limits):
            control = self._is_control(n)
            self._limits = [0] * n if control else planned.limits(requests, limits, config)
            self.floor = planned.floor
        return self._limits

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
        if curves is None or self._margin is None:
            return lengths
        planned, adapts = self._planned, config.speculative_adaptive
        asked = [i for i, limit in enumerate(self._limits) if limit]
        if draft_seconds is not None and asked:
            behind = planned is not None and adapts and planned.behind
            # A model that did not draft just before has its weights yet to be fetched.
            warm = self._warm or not self._costs_device
            if self._learning is not None and warm and not behind:
                self._learning.learn_draft(len(asked), max(self._limits), draft_seconds)
            if planned is not None:
                planned.took(draft_seconds)
        self._drafted = bool(asked)
        # How many tokens that were drawn by chance are verified must not depend on which they are:
        # the distribution of what is generated would change.
        drawn = self._costs_device and any(
            draft is not None and draft.probabilities is not None for draft in drafts
        )
        if drawn or not adapts or (planned is not None and planned.probing):
            return lengths
        rows = [i for i, length in enumerate(lengths) if length]
        kept, n = [0] * len(lengths), len(lengths)
        if rows:
            room = config.max_num_batched_tokens - n
            seconds = curves.verify(n, max(0, min(room, sum(lengths))))
            least_drafted = min(len(rows), len(seconds) - 1)
            if planned is not None and seconds[-1] - seconds[least_drafted] < CHOOSING_SECONDS:
                return lengths
            least = (1.0 + self._margin.of(n)) / (1.0 + self._margin.hope(n)) - 1.0
            counts, yielded, saved = [0] * len(rows), 0.0, 0.0
            if self._is_hopeful(requests, drafts, rows, seconds, least):
                gains = self._gains([requests[i] for i in rows], [drafts[i] for i in rows])
                gains *= self._promises.factor(n)
                counts, yielded, saved = best_counts(gains, n, seconds, least)
                for row, count in zip(rows, counts, strict=True):
                    kept[row] = count
            self._promises.promise(n, sum(counts), yielded)
            if saved > 0.0:
                self._back_off.saved(len(rows) - counts.count(0), saved)
        if not self._costs_device:
            self._note(curves, requests, drafts, kept, asked)
        return kept

    def observe(self, batch: Batch, result: BatchResult, seconds: float | None = None) -> None:
        """Take in what a step's drafts came to; `seconds` as of `took`, if they are known."""
        self._ran = None
        num_decodes = batch.num_decodes
        # Those with drafts come last among the decodes.
        was_verified = self._verified
        self._verified = num_decodes > 0 and batch.sequences[num_decodes - 1].draft is not None
        if not self._verified:
            # Of the many such steps some tell enough, and those on which a draft may be judged.
            self._plain_steps += 1
            if not len(self._unverified) and not self._tells_plain:
                return
        history, followed = self._history, self._unverified
        requests: list[Request] = []
        lengths: list[int] = []
        accepted: list[int] = []
        claimed: list[Verified] = []
        judged: list[tuple[Request, Progress]] = []
        follows = len(followed) > 0
        drafted = self._verified
        # What is computed anew after a preemption gets its next token in a chunk, not as a decode.
        told = len(batch.sequences) if follows else num_decodes if drafted else 0
        for sequence, tokens in zip(batch.sequences[:told], result.tokens, strict=False):
            request, draft = sequence.request, sequence.draft
            if follows and request in followed:
                progress = followed.observe(request, tokens)
                if progress is not None:
                    judged.append((request, progress))
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
                verified = Verified(request, draft, draft.right_path(tokens[:-1]))
                history.record_tree(verified)
                if draft.chances is not None:
                    claimed.append(verified)
        if requests:
            if self._planned is not None:
                self._planned.tried += sum(lengths)
            self._promises.observe(num_decodes, sum(lengths), sum(accepted))
        starts = [0] * len(requests)
        for request, progress in judged:
            right = progress.right
            requests.append(request)
            starts.append(progress.start)
            lengths.append(right + progress.wrong)
            accepted.append(right)
            if right >= _PROMISING and not progress.wrong:
                self._back_off.again(request)
            if progress.draft.chances is not None:
                come = range(right - progress.start)
                claimed.append(Verified(request, progress.judged(), come))
        if requests:
            history.record_chains(requests, lengths, accepted, starts, plain=not claimed)
        if claimed:
            history.record_chances(claimed)
        cold = drafted and self._costs_device and not was_verified
        alone = 0 < num_decodes == len(batch.sequences)
        if self._learning is not None and alone:
            num_tokens = batch.num_tokens if drafted else num_decodes
            if drafted or self._tells_plain:
                self._controls.observe(num_decodes, num_tokens - num_decodes)
                if not cold:
                    self._ran = num_decodes, num_tokens
            self._plain_steps *= not drafted
        if seconds is not None:
            self.took(seconds)

    def took(self, seconds: float) -> None:
        """What the step that was observed last took without drafting; asked for once."""
        if self._ran is not None and self._learning is not None:
            self._learning.learn_verify(*self._ran, seconds)
        self._ran = None

    def forget(self, request: Request) -> None:
        """The request left, or will be computed again from the start."""
        if self._planned is not None:
            self._planned.forget(request)
        self._history.forget(request)
        self._back_off.forget(request)
        self._unverified.forget(request)

    def chances(self, request: Request) -> list[float]:
        """The chance that a chain's first 1, 2, ... tokens are accepted, as it stands now."""
        chances: list[float] = self._history.survival([request], MOST_DRAFTED)[0].tolist()
        return chances

    @property
    def _tells_plain(self) -> bool:
        """Whether this step without drafts is one to learn from."""
        return self._plain_steps % PLAIN_STEPS_TOLD == self._plain_told

    def _is_control(self, num_requests: int) -> bool:
        return self._learning is not None and self._controls.due(num_requests)

    def _is_hopeful(
        self,
        requests: Sequence[Request],
        drafts: Sequence[Draft | None],
        rows: list[int],
        seconds: Floats,
        least: float,
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
        return (n + accepted) * float(seconds[0]) > n * (1.0 + least) * float(seconds[1])

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
        unworthy = []
        for i in asked:
            draft = drafts[i]
            if draft is not None and not kept[i]:
                self._unverified.follow(requests[i], draft)
                unworthy.append(requests[i])
        tried = [(requests[i], kept[i] > 0) for i in asked]
        n = len(requests)
        seconds = float(curves.draft(n, max(self._limits))[n]) / n
        self._back_off.note(tried, n, float(curves.verify(n, 0)[0]), seconds, unworthy)
