"""What prompt lookup would have drafted on the recorded tokens, and how much would have been right.

At each decode step the engine's own rule (`engine.speculate.ngram`) drafts from the tokens before
it. Greedy outputs do not depend on drafts, so that the recorded answer tells exactly which would
have been accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autotune.profiling.counted_cost import CostOfSteps
from autotune.profiling.enough import LEAST_REQUESTS, lacking
from autotune.profiling.evidence import LoadEvidence
from autotune.profiling.speculation_forecast import Drafting, forecast
from autotune.profiling.speculation_schema import AcceptancePosition, Bounded, Speculation
from autotune.profiling.step_columns import StepColumns
from autotune.speculation_counts import accepted_share, design_effect, ratio_margin
from engine.config import EngineConfig
from engine.speculate.ngram import Lookup, continuation, latest_match

DRAFT_TOKENS = (1, 2, 3, 4, 5, 8)
# Enough for an estimate to a percent; beyond it every n-th request is looked at.
_MOST_DECODES = 40_000


def speculation(
    evidence: LoadEvidence,
    config: EngineConfig,
    steps: StepColumns,
    cost: CostOfSteps | None,
    cost_error: float | None,
) -> tuple[Speculation | None, list[str]]:
    """The dry run on a load's requests, or why there is none.

    Args:
        evidence: the load.
        config: the engine's, whose `prompt_lookup_*` say what is looked up.
        steps: the load's.
        cost: of a step; without it nothing is forecast.
        cost_error: by how much it is off for a typical step, as a share; None where not known.
    """
    prompts = evidence.prompts
    usable = [
        (prompts[r.request_id], r.output_token_ids)
        for r in evidence.requests
        if r.request_id in prompts and len(r.output_token_ids) > 1
    ]
    if not any(r.output_token_ids for r in evidence.requests) or not prompts:
        return None, ["what n-gram drafts would get is unknown: the records hold no tokens"]
    if len(usable) < LEAST_REQUESTS:
        return None, [lacking("the dry run of drafts", "requests", LEAST_REQUESTS, len(usable))]
    decodes = sum(len(output) for _, output in usable)
    every = max(1, min(len(usable) // LEAST_REQUESTS, -(-decodes // _MOST_DECODES)))
    found = replayed(usable[::every], Lookup.of(config))
    loads = [] if cost is None else forecast(found.drafting(), config, steps, cost, cost_error)
    return found.to_profile(synthetic=bool(evidence.synthetic_prompts), loads=loads), []


@dataclass(slots=True)
class Replay:
    """What drafting along some answers came to; lists have one entry a request.

    `generated` are the tokens after the first. By the number of draft tokens asked for, `steps` and
    `hits` count the steps that this takes and those of them with a draft. `drafted` and `accepted`
    count, of the longest drafts, those that reach each position and those right up to there; `runs`
    how many times a step finds a draft after one that did not, or as the first.
    """

    lookup: Lookup
    generated: list[int] = field(default_factory=list)
    steps: dict[int, list[int]] = field(default_factory=lambda: {k: [] for k in DRAFT_TOKENS})
    hits: dict[int, list[int]] = field(default_factory=lambda: {k: [] for k in DRAFT_TOKENS})
    drafted: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    runs: int = 0

    def add(self, drafts: Sequence[tuple[int, int]]) -> None:
        """Count a request by what a draft would be at each of its decodes: `lookups`."""
        longest = max(DRAFT_TOKENS)
        drafted, accepted = [0] * longest, [0] * longest
        for k in DRAFT_TOKENS:
            at = steps = hits = 0
            hit = False
            while at < len(drafts):
                length, right = drafts[at]
                if k == longest:
                    for place in range(length):
                        drafted[place] += 1
                        accepted[place] += place < right
                    self.runs += length > 0 and not hit
                    hit = length > 0
                at += min(right, k) + 1
                steps += 1
                hits += length > 0
            self.steps[k].append(steps)
            self.hits[k].append(hits)
        self.generated.append(len(drafts))
        self.drafted.append(drafted)
        self.accepted.append(accepted)

    def tokens_per_step(self, k: int) -> Bounded:
        """Of drafts of k tokens, with its 95% interval over the requests."""
        steps = sum(self.steps[k])
        tokens = sum(self.generated) / steps if steps else 1.0
        margin = ratio_margin(_array(self.generated), _array(self.steps[k]))
        if margin is None:
            return Bounded(value=tokens, low=1.0, high=1.0 + k)
        return Bounded(
            value=tokens, low=max(1.0, tokens - margin), high=min(1.0 + k, tokens + margin)
        )

    def drafting(self) -> list[Drafting]:
        """What each number of draft tokens yields."""
        return [
            Drafting(k, k * sum(self.hits[k]) / max(1, sum(self.steps[k])), self.tokens_per_step(k))
            for k in DRAFT_TOKENS
        ]

    def positions(self) -> list[AcceptancePosition]:
        """Acceptance of the longest drafts by position."""
        drafted, accepted = np.array(self.drafted), np.array(self.accepted)
        rows = []
        for place in range(max(DRAFT_TOKENS)):
            reached, right = drafted[:, place], accepted[:, place]
            total, good = int(reached.sum()), int(right.sum())
            share = accepted_share(total, good, design_effect(right, reached))
            rows.append(
                AcceptancePosition(
                    position=place + 1,
                    drafted=total,
                    accepted=good,
                    share=None if share is None else Bounded(**share),
                )
            )
        return rows

    def to_profile(self, *, synthetic: bool = False, loads: Sequence[object] = ()) -> Speculation:
        """The section of the profile."""
        longest = max(DRAFT_TOKENS)
        hits, steps = sum(self.hits[longest]), sum(self.steps[longest])
        return Speculation.model_validate(
            {
                "num_requests": len(self.generated),
                "min_ngram": self.lookup.shortest,
                "max_ngram": self.lookup.longest,
                "tokens_per_step": {k: self.tokens_per_step(k).value for k in DRAFT_TOKENS},
                "hit_share": hits / steps if steps else 0.0,
                "hit_run": hits / self.runs if self.runs else None,
                "positions": self.positions(),
                "synthetic_prompts": synthetic,
                "loads": list(loads),
            }
        )


def replayed(requests: Sequence[tuple[Sequence[int], Sequence[int]]], lookup: Lookup) -> Replay:
    """Draft along each (prompt, output); the first output token comes with the prompt."""
    replay = Replay(lookup)
    for prompt, output in requests:
        replay.add(lookups((*prompt, *output), len(prompt) + 1, max(DRAFT_TOKENS), lookup))
    return replay


def lookups(
    tokens: Sequence[int], start: int, longest: int, lookup: Lookup
) -> list[tuple[int, int]]:
    """For each position from `start` on, what a draft there would be: (its length, right ones).

    A draft for position i is made of the tokens before i alone, and has `longest` tokens or none.
    Right are as many as agree with what came, up to the end of the sequence.
    """
    array = np.array(tokens, dtype=np.int32)
    result = []
    for i in range(start, len(array)):
        match = latest_match(array[:i], lookup)
        if match is None:
            result.append((0, 0))
            continue
        right = 0
        for mine, real in zip(continuation(array[:i], match, longest), tokens[i:], strict=False):
            if mine != real:
                break
            right += 1
        result.append((longest, right))
    return result


def _array(values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)
