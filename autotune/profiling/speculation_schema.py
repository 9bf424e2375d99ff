"""What a profile holds of speculative decoding: as it was measured, and as lookups would have done.

Chances are counts: of the drafts that were long enough for a position, those that were right there
and before. Of an estimate `low` and `high` are the bounds of its interval.
"""

from __future__ import annotations

from pydantic import Field

from autotune.profiling.machine_schema import Part


class Bounded(Part):
    """A value and the bounds of its interval."""

    value: float
    low: float
    high: float


class AcceptancePosition(Part):
    """Drafts that reached position `position` (from 1), and how many were right up to there.

    `share` is accepted over drafted with its 95% interval; None where nobody drafted so far, and in
    files of an earlier release.
    """

    position: int
    drafted: int
    accepted: int
    share: Bounded | None = None


class SpeculativeLoad(Part):
    """What speculation is worth while so many sequences decode in a step.

    `sequences` is their mean number, `num_tokens` the drafted tokens of one on the mean (of a
    forecast: those asked for, 0 where none pays), `tokens_per_step` what one gets from a step.
    `predicted` is the speed-up of decoding (above 1 is faster) by the fitted cost of a step, with
    its error; `measured` that by the steps themselves, with its 95% interval: None where no step
    was without drafts, or nothing was measured. `steps` counts the steps behind it.
    """

    sequences: float
    num_tokens: float
    tokens_per_step: float
    predicted: Bounded | None = None
    measured: Bounded | None = None
    steps: int = 0


class Speculation(Part):
    """A dry run of prompt lookup on the recorded tokens: what n-gram drafts would have got.

    `tokens_per_step` is accepted drafts plus the model's own token, by the number of draft tokens
    asked for. With the longest drafts, `hit_share` is the share of steps at which a draft is found
    at all, and `hit_run` how many steps of a request in a row find one on the mean; None where none
    does. `loads` tells what the best number of draft tokens would be worth by load.
    """

    num_requests: int
    min_ngram: int
    max_ngram: int
    tokens_per_step: dict[int, float]
    hit_share: float
    hit_run: float | None = None
    positions: list[AcceptancePosition] = Field(default_factory=list)
    synthetic_prompts: bool = False
    loads: list[SpeculativeLoad] = Field(default_factory=list)


class DraftCost(Part):
    """Seconds that drafting takes in a step, fitted to the steps that drafted.

    base + sequence * n + depth * d + depth_sequence * d * n, with n sequences that decode and d
    tokens in the longest draft.
    """

    base: float
    sequence: float
    depth: float
    depth_sequence: float


class MeasuredSpeculation(Part):
    """What was drafted and accepted in a load that speculated.

    `decodes` counts the sequences that decoded, once a step, `drafted_decodes` those with a draft:
    `hit_share` is their ratio. `tokens_per_step` is what a decode got from a step, its own token
    included, with a 95% interval; `tokens_per_step_by_request` its mean over the requests and the
    central 80% of them, None where too few are known. `verified_tokens` are the drafted tokens of a
    decode on the mean. `draft_seconds` is all time that went to drafting, `draft_time_share` its
    part of the steps' time.
    """

    method: str
    num_speculative_tokens: int
    adaptive: bool
    decodes: int
    drafted_decodes: int
    drafted_tokens: int
    accepted_tokens: int
    hit_share: float
    tokens_per_step: Bounded
    verified_tokens: float
    positions: list[AcceptancePosition] = Field(default_factory=list)
    tokens_per_step_by_request: Bounded | None = None
    draft_seconds: float = 0.0
    draft_time_share: float = 0.0
    draft_cost: DraftCost | None = None
    loads: list[SpeculativeLoad] = Field(default_factory=list)
