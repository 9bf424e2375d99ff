"""What speculation came to: acceptance by position and tokens a step, with their intervals.

Drafts that are right come in runs, by request and by passage, so that a thousand of them tell less
than a thousand throws of a coin. Intervals of shares are Wilson's at the effective number of trials
(Korn and Graubard 1998): the number over the design effect, which is the variance of the share over
stretches of the load against the one it would have without runs. Those of the tokens a step are
Student's over the same stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.confidence import Z_95, student_95, wilson_interval
from autotune.speculation_gain import gains_by_batch
from engine.config import EngineConfig
from engine.step_record import StepRecord

# Stretches of a load: long enough to hold whole runs, and enough of them for a variance.
_STRETCHES = 30
_LEAST_STRETCHES = 4

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class SpeculationTotals:
    """Counts of the steps of an engine that speculates; `decodes` counts a sequence once a step."""

    decodes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    seconds: float = 0.0

    def count(self, step: StepRecord) -> None:
        """Count a step."""
        self.decodes += step.decode_sequences
        self.seconds += step.seconds
        self.draft_seconds += step.draft_seconds
        if step.drafted_tokens:
            self.drafted_tokens += step.drafted_tokens
            self.accepted_tokens += step.accepted_tokens
            _add(self.drafted_by_depth, step.drafted_by_depth)
            _add(self.accepted_by_depth, step.accepted_by_depth)

    @property
    def drafted_decodes(self) -> int:
        """Decodes that had a draft."""
        return self.drafted_by_depth[0] if self.drafted_by_depth else 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decode got from a step, its own included."""
        return 1.0 + self.accepted_tokens / self.decodes if self.decodes else 1.0

    def to_metrics(
        self, effects: Sequence[float] = (), tokens_margin: float | None = None
    ) -> dict[str, Any]:
        """By the keys of `autotune bench --json` under `speculation`, but for `loads`.

        Args:
            effects: design effects by position; by default there are no runs.
            tokens_margin: half of the interval of the tokens a step; None where it is not known.
        """
        tokens = self.tokens_per_step
        most = 1.0 + len(self.drafted_by_depth)
        low, high = 1.0, most
        if tokens_margin is not None:
            low, high = max(1.0, tokens - tokens_margin), min(most, tokens + tokens_margin)
        positions = [
            {
                "position": place + 1,
                "drafted": drafted,
                "accepted": accepted,
                "share": accepted_share(drafted, accepted, effect),
            }
            for place, (drafted, accepted, effect) in enumerate(
                zip_longest(
                    self.drafted_by_depth,
                    self.accepted_by_depth,
                    effects[: len(self.drafted_by_depth)],
                    fillvalue=0,
                )
            )
        ]
        return {
            "decodes": self.decodes,
            "drafted_decodes": self.drafted_decodes,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "acceptance_rate": self.accepted_tokens / self.drafted_tokens
            if self.drafted_tokens
            else None,
            "hit_share": self.drafted_decodes / self.decodes if self.decodes else 0.0,
            "verified_tokens": self.drafted_tokens / self.decodes if self.decodes else 0.0,
            "tokens_per_step": {"value": tokens, "low": low, "high": high},
            "draft_seconds": self.draft_seconds,
            "draft_time_share": self.draft_seconds / self.seconds if self.seconds > 0 else 0.0,
            "positions": positions,
        }


def accepted_share(drafted: float, accepted: float, effect: float = 1.0) -> dict[str, float] | None:
    """Accepted over drafted with its 95% interval; None where nothing was drafted.

    `effect` is the design effect: by how much runs of equal outcomes widen the variance.
    """
    if not drafted:
        return None
    share, trials = accepted / drafted, drafted / max(1.0, effect)
    low, high = wilson_interval(share * trials, trials)
    assert low is not None
    assert high is not None
    return {"value": share, "low": low, "high": high}


def speculation_metrics(steps: Sequence[StepRecord], config: EngineConfig) -> dict[str, Any] | None:
    """What the steps say of speculation, keyed as in `bench --json`; None of those without it."""
    if config.speculative_method == "none" or not steps:
        return None
    totals = SpeculationTotals()
    for step in steps:
        totals.count(step)
    decoding = [step for step in steps if step.decode_sequences]
    decodes = np.array([step.decode_sequences for step in decoding], dtype=np.float64)
    accepted = np.array([step.accepted_tokens for step in decoding], dtype=np.float64)
    found = totals.to_metrics(design_effects(decoding), ratio_margin(accepted, decodes))
    return {**found, "loads": gains_by_batch(decoding)}


def design_effects(steps: Sequence[StepRecord]) -> list[float]:
    """The design effect of the acceptance of each position, over time."""
    drafting = [step for step in steps if step.drafted_by_depth]
    depth = max((len(step.drafted_by_depth) for step in drafting), default=0)
    return [
        design_effect(
            _at(place, [step.accepted_by_depth for step in drafting]),
            _at(place, [step.drafted_by_depth for step in drafting]),
        )
        for place in range(depth)
    ]


def design_effect(accepted: Floats, drafted: Floats) -> float:
    """By how much more the share of accepted ones varies than throws of a coin; at least 1.

    Counts [n] of what followed each other, of steps or requests.
    """
    margin, trials = ratio_margin(accepted, drafted), float(drafted.sum())
    share = float(accepted.sum()) / trials if trials else 0.0
    coin = share * (1 - share) / trials if trials else 0.0
    return 1.0 if margin is None or coin <= 0 else max(1.0, (margin / Z_95) ** 2 / coin)


def ratio_margin(parts: Floats, wholes: Floats) -> float | None:
    """Half of the 95% interval of the sum of parts over that of wholes, counts [n] in order.

    From the ratio's variance over stretches of about as many wholes (Cochran 1977, eq. 6.13). None
    where there are too few stretches.
    """
    reached = np.cumsum(wholes)
    total = float(reached[-1]) if reached.size else 0.0
    if total <= 0:
        return None
    owner = np.minimum((_STRETCHES * (reached - wholes) / total).astype(np.int64), _STRETCHES - 1)
    _, owner = np.unique(owner, return_inverse=True)
    part, whole = np.bincount(owner, parts), np.bincount(owner, wholes)
    count = len(whole)
    if count < _LEAST_STRETCHES:
        return None
    off = part - parts.sum() / total * whole
    variance = count / (count - 1) * float(off @ off) / total**2
    return student_95(count - 1) * math.sqrt(variance)


def _add(totals: list[int], counts: Sequence[int]) -> None:
    totals += [0] * (len(counts) - len(totals))
    for place, count in enumerate(counts):
        totals[place] += count


def _at(place: int, counts: Sequence[Sequence[int]]) -> Floats:
    return np.array([c[place] if place < len(c) else 0 for c in counts], dtype=np.float64)
